import json
import math
from dataclasses import replace

import pytest

from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.evaluation.report import Report
from srd_modifier.evaluation.scores import Divergence, Perplexity
from srd_modifier.evaluation.windows import window_rule

REPORT = Report(
    model="candidate",
    reference="original",
    text_path="text.txt",
    text_sha256="ab" * 32,
    rule=window_rule(),
    perplexity=Perplexity(tokens=100, ppl=7.5, ppl_stderr=0.25),
    divergence=Divergence(0.5, 0.25, 4.0, 0.125, 0.75),
    size=CheckpointSize(bytes_on_disk=1000, bits_per_weight=12.5, quantized_weights=640, total_weights=800),
    dtype="float32",
    alpha=1.0,
    chunks=("early",),
    seconds=1.23456,
    versions={"torch": "2"},
)

DIVERGENCE_KEYS = {"kld_mean", "kld_median", "kld_p99", "kld_stderr", "top1_agreement"}


def test_json_is_flat_and_complete():
    assert REPORT.as_json() == {
        "model": "candidate",
        "reference": "original",
        "text": {"path": "text.txt", "sha256": "ab" * 32},
        "tokens": 100,
        "ppl": 7.5,
        "ppl_stderr": 0.25,
        "kld_mean": 0.5,
        "kld_median": 0.25,
        "kld_p99": 4.0,
        "kld_stderr": 0.125,
        "top1_agreement": 0.75,
        "predicted_kld": None,
        "predicted_ratio": None,
        "bytes_on_disk": 1000,
        "bits_per_weight": 12.5,
        "total_bits_per_weight": 10.0,
        "convention": "sliding",
        "ctx": 2048,
        "stride": 512,
        "dtype": "float32",
        "alpha": 1.0,
        "chunks": ["early"],
        "seconds": 1.235,
        "versions": {"torch": "2"},
    }


def test_divergence_keys_are_absent_without_a_reference():
    alone = replace(REPORT, reference=None, divergence=None).as_json()
    assert not DIVERGENCE_KEYS & alone.keys()
    assert REPORT.as_json().keys() - alone.keys() == DIVERGENCE_KEYS
    assert alone["reference"] is None


def test_bits_that_are_not_defined_are_null():
    unknown = replace(REPORT, size=CheckpointSize(1000, math.nan, 0, 0))
    values = json.loads(json.dumps(unknown.as_json(), allow_nan=False))
    assert values["bits_per_weight"] is None
    assert values["total_bits_per_weight"] is None


def test_a_prediction_stands_beside_the_measured_divergence():
    predicted = replace(REPORT, predicted_kld=0.6)
    assert predicted.predicted_ratio == 0.6 / 0.5
    values = predicted.as_json()
    assert (values["predicted_kld"], values["predicted_ratio"]) == (0.6, 0.6 / 0.5)


@pytest.mark.parametrize("divergence", [None, Divergence(0.0, 0.0, 0.0, 0.0, 1.0)], ids=["no-reference", "equal"])
def test_without_a_divergence_there_is_no_ratio(divergence):
    values = replace(REPORT, predicted_kld=0.6, divergence=divergence).as_json()
    assert (values["predicted_kld"], values["predicted_ratio"]) == (0.6, None)
