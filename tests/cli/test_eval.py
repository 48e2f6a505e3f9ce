import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from random_models import TINY_LLAMA
from typer.testing import CliRunner

from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.cli.eval import ConventionName, evaluate
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.report import Report
from srd_modifier.evaluation.scores import Divergence, Perplexity
from srd_modifier.evaluation.windows import Convention, window_rule

REPORT = Report(
    model="candidate",
    reference="original",
    text_path="text.txt",
    text_sha256="ab" * 32,
    rule=window_rule(Convention.LLAMACPP),
    perplexity=Perplexity(tokens=12345, ppl=7.5, ppl_stderr=0.25),
    divergence=Divergence(0.0005, 0.00025, 0.004, 0.0001, 0.955),
    size=CheckpointSize(bytes_on_disk=1000, bits_per_weight=12.5, quantized_weights=640, total_weights=800),
    dtype="float32",
    alpha=0.5,
    chunks=("early", "reasoning"),
    seconds=1.5,
    versions={},
)


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(evaluate)
    return app


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def evaluate_text(*args, progress, **options):
        progress(0, 4)
        progress(4, 4)
        calls.append((args, options))
        return REPORT

    monkeypatch.setattr("srd_modifier.evaluation.evaluate.evaluate_text", evaluate_text)
    return calls


def run(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_defaults_are_left_to_the_library(app, calls):
    assert run(app, "model", "--text", "text.txt").exit_code == 0
    assert calls == [
        (
            ("model", Path("text.txt")),
            {
                "reference": None,
                "convention": Convention.SLIDING,
                "ctx": None,
                "stride": None,
                "alpha": None,
                "chunks": None,
                "max_tokens": None,
                "batch_size": None,
                "dtype": torch.float32,
                "device": "cpu",
            },
        )
    ]


def test_every_option_arrives(app, calls):
    options = "--reference original --ctx 64 --stride 64 --convention llamacpp --alpha 0.5 --chunk early"
    options += " --chunk reasoning --max-tokens 1000 --batch-size 2 --dtype bfloat16 --device auto"
    assert run(app, "model", "--text", "text.txt", *options.split()).exit_code == 0
    assert calls[0][1] == {
        "reference": "original",
        "convention": Convention.LLAMACPP,
        "ctx": 64,
        "stride": 64,
        "alpha": 0.5,
        "chunks": ["early", "reasoning"],
        "max_tokens": 1000,
        "batch_size": 2,
        "dtype": torch.bfloat16,
        "device": "auto",
    }


def test_the_conventions_are_those_of_the_library():
    assert [name.value for name in ConventionName] == [convention.value for convention in Convention]


def test_the_table_says_how_it_was_measured(app, calls):
    output = run(app, "model", "--text", "text.txt").stdout
    for expected in (
        "llamacpp, ctx 512, stride 512",
        "12,345",
        "7.5000 ± 0.2500",
        "original",
        "5.000e-04 ± 1.0e-04 nats",
        "2.500e-04, 4.000e-03 nats",
        "95.50%",
        "early, reasoning",
        "1,000 bytes",
        "12.500, 10.000 with embeddings and headers",
    ):
        assert expected in output


def with_report(monkeypatch, **changes):
    monkeypatch.setattr("srd_modifier.evaluation.evaluate.evaluate_text", lambda *_, **__: replace(REPORT, **changes))


def test_the_prediction_is_shown_beside_the_measured_divergence(app, monkeypatch):
    with_report(monkeypatch, predicted_kld=0.0006)
    lines = run(app, "model", "--text", "text.txt").stdout.splitlines()
    (row,) = [number for number, line in enumerate(lines) if "KLD predicted" in line]
    assert "6.000e-04 nats, 1.2 times the measured" in lines[row]
    assert "KLD mean" in lines[row - 1]


def test_without_a_reference_the_prediction_stands_alone(app, monkeypatch):
    with_report(monkeypatch, predicted_kld=0.0006, divergence=None, reference=None)
    output = run(app, "model", "--text", "text.txt").stdout
    assert "6.000e-04 nats" in output
    assert "times the measured" not in output


def test_without_a_sensitivity_nothing_is_predicted(app, calls):
    assert "predicted" not in run(app, "model", "--text", "text.txt").stdout


def test_json_to_stdout_is_json_and_nothing_else(app, calls):
    result = run(app, "model", "--text", "text.txt", "--json", "-")
    assert json.loads(result.stdout) == REPORT.as_json()
    assert result.stderr == ""


def test_json_to_a_file_comes_with_the_table(app, calls, tmp_path):
    path = tmp_path / "result.json"
    result = run(app, "model", "--text", "text.txt", "--json", path)
    assert json.loads(path.read_text()) == REPORT.as_json()
    assert "perplexity" in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_result_that_could_not_be_written_is_refused_before_scoring(app, calls, tmp_path):
    result = run(app, "model", "--text", "text.txt", "--json", tmp_path / "nowhere" / "result.json")
    assert isinstance(result.exception, SRDError)
    assert "cannot be written, there is no directory" in str(result.exception)
    assert calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["model"],
        ["model", "--text", "t", "--max-tokens", "0"],
        ["model", "--text", "t", "--batch-size", "0"],
        ["model", "--text", "t", "--convention", "other"],
        ["model", "--text", "t", "--dtype", "int8"],
    ],
    ids=["no-text", "max-tokens", "batch-size", "convention", "dtype"],
)
def test_misuse_exits_with_status_two(app, calls, arguments):
    assert run(app, *arguments).exit_code == 2
    assert calls == []


def test_errors_are_left_to_the_shared_handler(app, tmp_path):
    result = run(app, TINY_LLAMA, "--text", tmp_path / "missing.txt")
    assert isinstance(result.exception, SRDError)


def test_the_whole_way(app, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs north through the old town and turns east below the bridge.\n" * 8)
    result = run(app, TINY_LLAMA, "--reference", TINY_LLAMA, "--text", text, "--ctx", 64, "--stride", 32, "--json", "-")
    found = json.loads(result.stdout)
    assert found["kld_mean"] == 0
    assert found["top1_agreement"] == 1
    assert 1 < found["ppl"] < 500
    assert math.isfinite(found["ppl_stderr"])
    assert (found["ctx"], found["stride"], found["convention"]) == (64, 32, "sliding")


def test_a_gguf_file_is_scored_from_its_own_bytes(app, tmp_path):
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType

    path, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    export_gguf(TINY_LLAMA, path, file_type=FileType.Q8_0)
    text.write_text("The river runs north through the old town and turns east below the bridge.\n" * 8)
    result = run(app, path, "--reference", TINY_LLAMA, "--text", text, "--ctx", 64, "--stride", 32, "--json", "-")
    found = json.loads(result.stdout)
    assert 0 < found["kld_mean"] < 1e-3
    assert found["bits_per_weight"] == 8.5
    assert found["bytes_on_disk"] == path.stat().st_size
