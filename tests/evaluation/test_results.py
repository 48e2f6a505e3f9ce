import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparisons import REFERENCE, accuracy, kld, make_model, make_results, ppl

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.evaluation.results import SCHEMA_VERSION, Results, read_results, write_results

CANDIDATE = make_model(
    "srd",
    8_000_000,
    ppl(10.5, 95.2, 94.0, 96.1),
    kld(0.002, stderr=0.0001),
    accuracy(0.7, 87.5, 80.0, 95.0),
    digest="a" * 64,
    alpha=0.5,
    chunks=("early", "reasoning"),
    bits_per_weight=12.5,
    total_bits_per_weight=13.0,
    residual_bytes=3_000_000,
    notes=("measured on a Tuesday",),
    depth=(0.0, 0.001, 0.002),
)
SERVER = make_model("server", None, ppl(10.4), model="http://127.0.0.1:8000", format="server")


@pytest.fixture
def results() -> Results:
    return make_results(CANDIDATE, SERVER)


@pytest.fixture
def written(results: Results, tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    write_results(results, path)
    return path


def test_what_is_written_is_read_again(results, written):
    assert read_results(written) == results
    assert json.loads(written.read_text()) == results.as_json()
    assert [path.name for path in written.parent.iterdir()] == ["results.json"]


def test_the_file_is_plain_json_with_the_version_first(results, written):
    values = json.loads(written.read_text(), parse_constant=pytest.fail)  # no NaN, which JSON does not have
    assert next(iter(values.items())) == ("schema", SCHEMA_VERSION)
    assert values["models"][1]["chunks"] == ["early", "reasoning"]
    assert values["models"][1]["scores"][0]["recovery"] == {"value": 95.2, "low": 94.0, "high": 96.1}


def test_rows_and_tasks_are_found_by_their_names(results):
    assert results.reference == REFERENCE
    assert results.candidates == (CANDIDATE, SERVER)
    assert results.task("arc_easy").title == "ARC easy"
    assert CANDIDATE.score("wikitext2", "kld_mean") == CANDIDATE.scores[1]
    assert SERVER.score("wikitext2", "kld_mean") is None


Change = Callable[[dict[str, Any]], Any]

FAULTS: dict[str, tuple[Change, str]] = {
    "a key is missing": (lambda values: values.pop("machine"), r"\$: 'machine' is a required property"),
    "a key is unknown": (lambda values: values.update(pending=1), r"\$: Additional properties .*'pending' was unexp"),
    "no command": (lambda values: values.update(command=[]), r"\$\.command: \[\] should be non-empty"),
    "a command of words": (lambda values: values.update(command="srd"), r"\$\.command: 'srd' is not of type 'array'"),
    "no machine": (lambda values: values["machine"].pop("cores"), r"\$\.machine: 'cores' is a required property"),
    "a version of numbers": (
        lambda values: values["versions"].update(torch=2.1),
        r"\$\.versions\.torch: 2\.1 is not of type 'string'",
    ),
    "no models": (lambda values: values.update(models=[]), r"\$\.models: \[\] should be non-empty"),
    "no tasks": (lambda values: values.update(tasks=[]), r"\$\.tasks: \[\] should be non-empty"),
    "a task without a name": (lambda values: values["tasks"][1].pop("name"), r"\$\.tasks\[1\]: 'name' is a required"),
    "a digest that is none": (
        lambda values: values["tasks"][0].update(sha256="12"),
        r"\$\.tasks\[0\]\.sha256: '12' does not match",
    ),
    "a model with a digest that is none": (
        lambda values: values["models"][1].update(digest="A" * 64),
        r"\$\.models\[1\]\.digest: 'A+' does not match",
    ),
    "a row without scores": (
        lambda values: values["models"][1].pop("scores"),
        r"\$\.models\[1\]: 'scores' is a required property",
    ),
    "a row with a column too many": (
        lambda values: values["models"][1].update(speed=9),
        r"\$\.models\[1\]: Additional properties .*'speed' was",
    ),
    "a value of words": (
        lambda values: values["models"][1]["scores"][0].update(value="pending"),
        r"\$\.models\[1\]\.scores\[0\]\.value: 'pending' is not of type 'number'",
    ),
    "a score of nothing": (
        lambda values: values["models"][0]["scores"][0].update(count=0),
        r"\$\.models\[0\]\.scores\[0\]\.count: 0 is less than the minimum of 1",
    ),
    "half an interval": (
        lambda values: values["models"][1]["scores"][0]["recovery"].pop("low"),
        r"\$\.models\[1\]\.scores\[0\]\.recovery: 'low' is a required property",
    ),
    "chunks in one word": (
        lambda values: values["models"][1].update(chunks="early"),
        r"\$\.models\[1\]\.chunks: 'early' is not of type 'array', 'null'",
    ),
    "a depth of words": (
        lambda values: values["models"][1].update(depth=["deep"]),
        r"\$\.models\[1\]\.depth\[0\]: 'deep' is not of type 'number'",
    ),
    "no reference": (
        lambda values: values["models"][0].update(reference=False),
        r"models: 0 are marked as the reference, expected one",
    ),
    "two references": (
        lambda values: values["models"][1].update(reference=True),
        r"models: 2 are marked as the reference, expected one",
    ),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=list(FAULTS))
def test_what_the_schema_refuses_is_named_with_its_field(written, change, message):
    values = json.loads(written.read_text())
    change(values)
    written.write_text(json.dumps(values))
    with pytest.raises(SRDError, match=rf"results\.json: {message}") as raised:
        read_results(written)
    assert "\n" not in str(raised.value)


def test_a_list_is_refused(written):
    written.write_text("[]")
    with pytest.raises(SRDError, match=r"results\.json: \$: \[\] is not of type 'object'"):
        read_results(written)


def test_a_future_schema_is_refused_by_its_number(written):
    values = json.loads(written.read_text()) | {"schema": 2, "something": "new"}
    written.write_text(json.dumps(values))
    with pytest.raises(SRDError, match=r"results\.json: schema is 2, this version reads 1; measure again with srd com"):
        read_results(written)


def test_a_file_without_a_schema_is_refused(written):
    values = json.loads(written.read_text())
    del values["schema"]
    written.write_text(json.dumps(values))
    with pytest.raises(SRDError, match=r"\$: 'schema' is a required property"):
        read_results(written)


def test_what_is_not_json_is_refused(written):
    written.write_text(written.read_text()[:-50])
    with pytest.raises(SRDError, match=r"results\.json is not JSON: "):
        read_results(written)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SRDError, match=r"results\.json: the results cannot be read: No such file or directory$"):
        read_results(tmp_path / "results.json")


def test_what_the_schema_refuses_is_not_written(results, written):
    before = written.read_text()
    two = replace(results, models=(REFERENCE, REFERENCE))
    with pytest.raises(SRDError, match="2 are marked as the reference"):
        write_results(two, written)
    assert written.read_text() == before


def test_a_figure_that_is_none_is_not_written(results, tmp_path):
    broken = replace(results, models=(REFERENCE, replace(CANDIDATE, seconds=math.nan)))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(broken, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_named_where_jsonschema_is_missing(written, monkeypatch):
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"jsonschema is not installed; .*srd-modifier\[eval\]"):
        read_results(written)
