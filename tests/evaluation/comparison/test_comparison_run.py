"""Comparisons of small models: every figure against what measures it alone, and nothing is measured twice."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
import torch
import yaml
from random_models import TINY_LLAMA, make_llama, save_model
from rtn import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.cache import TooLargeError
from srd_modifier.evaluation.comparison.candidate import Candidate, Described
from srd_modifier.evaluation.comparison.run import Setting, compare, default_cache
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.results import Interval, ModelResult, Results, read_results, write_results
from srd_modifier.evaluation.tasks.base import Task
from srd_modifier.evaluation.tasks.harness import HarnessTask
from srd_modifier.evaluation.tasks.text import TextTask
from srd_modifier.evaluation.text import read_text
from srd_modifier.evaluation.windows import Convention, window_rule
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.transformers import load_corrected

PROSE = "The river runs north through the old town, and turns east below the bridge: 40 feet of timber, says he.\n" * 6
CTX, STRIDE = 64, 48
PLACES = ["river", "bridge", "church", "market", "square", "mill"]
# the models are small and their divergences large: steps of the stored reference are lost in them
CACHE_ERROR = {"rel": 1e-3, "abs": 1e-6}


@dataclass
class Workplace:
    """Models, texts and questions, made once, and nothing measured yet.

    Attributes:
        original: the reference, bf16.
        srd: its W4A16 with a residual of 8 bits.
        gguf: its Q8_0.
        prose: a text.
        data: a directory with a task of six questions, `own_choices`.
    """

    original: Path
    srd: Path
    gguf: Path
    prose: Path
    data: Path

    @property
    def text(self) -> TextTask:
        rule = window_rule(Convention.SLIDING, ctx=CTX, stride=STRIDE)
        return TextTask("text", "prose", read_text(self.prose), rule)

    @property
    def halves(self) -> TextTask:
        rule = window_rule(Convention.LLAMACPP, ctx=32)
        return TextTask("halves", "prose in halves", read_text(self.prose), rule, max_tokens=100)

    @property
    def questions(self) -> HarnessTask:
        return HarnessTask("own_choices", self.data)

    @property
    def reference(self) -> Candidate:
        return Candidate.parse(f"original={self.original}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("place")
    original = save_model(make_llama(num_hidden_layers=3, initializer_range=0.2), folder / "original")
    export_gguf(original, folder / "original.gguf", file_type=FileType.Q8_0)
    (folder / "prose.txt").write_text(PROSE)
    data = folder / "data"
    data.mkdir()
    rows = [
        {"question": f"Where is the {name}?", "choices": ["north", f"by the {name}", "gone"], "answer": number % 3}
        for number, name in enumerate(PLACES)
    ]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (data / "own_choices.yaml").write_text(yaml.safe_dump(definition))
    srd = write_checkpoint(original, folder / "srd", group_size=32)
    return Workplace(original, srd, folder / "original.gguf", folder / "prose.txt", data)


@pytest.fixture(autouse=True, scope="module")
def without_a_report_of_the_machine() -> Iterator[None]:
    """The harness asks pip and a dozen programs about the machine at the end of every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@dataclass
class Opened:
    """Which models were loaded, or which servers connected to."""

    labels: list[str] = field(default_factory=list)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    seen = Opened()
    inner = Described.open

    def record(described: Described, **options: Any) -> Any:
        seen.labels.append(described.candidate.label)
        return inner(described, **options)

    monkeypatch.setattr(Described, "open", record)
    return seen


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(cache=tmp_path / "cache", depth_tokens=0)


def assert_same(found: ModelResult, expected: ModelResult) -> None:
    """All but how long it took."""
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)


# everything at once


@pytest.fixture(scope="module")
def whole(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Any]]:
    """A comparison with one of everything, and how it was made."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "output").mkdir()
    words = [
        f"off={place.srd}@alpha=0",
        f"half={place.srd}@alpha=0.5",
        f"full={place.srd}",
        f"early={place.srd}@chunks=early+factual",
        f"gguf={place.gguf}",
    ]
    titles: list[str] = []
    made = {
        "candidates": [Candidate.parse(word) for word in words],
        "tasks": [place.text, place.halves, place.questions],
        "output": folder / "output",
        "setting": Setting(cache=folder / "cache", depth_tokens=128),
        "titles": titles,
    }
    with LlamaCpp(place.gguf, context=256, exact=True) as llama:
        made["candidates"].append(Candidate.parse(f"server={llama.address}"))
        results = compare(
            place.reference,
            made["candidates"],
            [replace(place.text, max_tokens=80), *made["tasks"][1:]],
            made["output"],
            setting=made["setting"],
            command=["srd", "compare"],
            settings={"max_tokens": None, "limit": None},
            progress=lambda title: titles.append(title) or (lambda done, total: None),
        )
    return results, made


def row(results: Results, label: str) -> ModelResult:
    return next(model for model in results.models if model.label == label)


def test_rows_are_in_the_order_of_the_command(whole):
    results, _ = whole
    assert [model.label for model in results.models] == ["original", "off", "half", "full", "early", "gguf", "server"]
    assert [model.reference for model in results.models] == [True] + [False] * 6
    assert [task.name for task in results.tasks] == ["text", "halves", "own_choices"]
    families = ["original", "W4A16", *["W4A16 + residual"] * 3, "GGUF", "server"]
    assert [model.family for model in results.models] == families


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("off", {"alpha": 0.0}),
        ("half", {"alpha": 0.5}),
        ("full", {}),
        ("early", {"chunks": ["early", "factual"]}),
        ("gguf", {}),
    ],
)
def test_figures_of_texts_are_those_of_a_single_evaluation(whole, place, label, options):
    model = row(whole[0], label)
    name = str(place.gguf if label == "gguf" else place.srd)
    for task, sizes in (
        ("text", {"ctx": CTX, "stride": STRIDE, "max_tokens": 80}),
        ("halves", {"ctx": 32, "convention": Convention.LLAMACPP, "max_tokens": 100}),
    ):
        report = evaluate_text(name, place.prose, reference=str(place.original), **sizes, **options)
        ppl = model.score(task, "ppl")
        assert (ppl.value, ppl.stderr, ppl.count) == (
            report.perplexity.ppl,
            report.perplexity.ppl_stderr,
            report.perplexity.tokens,
        )
        assert model.score(task, "kld_mean").value == pytest.approx(report.divergence.kld_mean, **CACHE_ERROR)
        assert model.score(task, "kld_mean").stderr == pytest.approx(report.divergence.kld_stderr, **CACHE_ERROR)
        assert model.score(task, "kld_median").value == pytest.approx(report.divergence.kld_median, **CACHE_ERROR)
        assert model.score(task, "kld_p99").value == pytest.approx(report.divergence.kld_p99, **CACHE_ERROR)
        assert model.score(task, "top1_agreement").value == report.divergence.top1_agreement
        own = row(whole[0], "original").score(task, "ppl").value
        assert ppl.recovery.value == pytest.approx(100 * own / ppl.value, rel=1e-6)
        assert ppl.recovery.low <= ppl.recovery.value <= ppl.recovery.high
        assert model.score(task, "kld_mean").recovery is None
    assert model.bytes_on_disk == report.size.bytes_on_disk
    assert model.bits_per_weight == report.bits_per_weight


def test_a_stronger_residual_diverges_less(whole):
    labels = ("full", "half", "early", "off")
    full, half, early, off = (row(whole[0], label).score("text", "kld_mean").value for label in labels)
    assert full < min(half, early)
    assert max(half, early) < off
    assert full < off / 100


def test_the_reference_has_no_divergence_and_no_recovery(whole, place):
    reference = row(whole[0], "original")
    assert {score.metric for score in reference.scores} == {"ppl", "acc", "acc_norm"}
    assert all(score.recovery is None for score in reference.scores)
    report = evaluate_text(str(place.original), place.prose, ctx=CTX, stride=STRIDE, max_tokens=80)
    assert reference.score("text", "ppl").value == pytest.approx(report.perplexity.ppl, rel=1e-6)
    assert (reference.alpha, reference.residual_bytes, reference.depth) == (None, None, None)


def test_questions_are_compared_one_by_one(whole):
    reference = row(whole[0], "original").score("own_choices", "acc")
    assert reference.value > 0
    for label in ("off", "full", "gguf", "server"):
        score = row(whole[0], label).score("own_choices", "acc")
        assert score.count == len(PLACES)
        assert score.recovery.value == pytest.approx(100 * score.value / reference.value)


def test_a_server_has_likelihoods_and_nothing_that_needs_a_distribution(whole):
    server, file = row(whole[0], "server"), row(whole[0], "gguf")
    assert {score.metric for score in server.scores} == {"ppl", "acc", "acc_norm"}
    assert server.score("text", "ppl").value == pytest.approx(file.score("text", "ppl").value, rel=0.02)
    assert server.score("text", "ppl").recovery.value == pytest.approx(100, abs=5)
    assert (server.digest, server.bytes_on_disk, server.bits_per_weight, server.depth) == (None,) * 4


def test_the_curve_over_depth_ends_at_the_models_divergence(whole, place):
    reference = AutoModelForCausalLM.from_pretrained(place.original, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(place.original)(PROSE, return_tensors="pt").input_ids[0, :64].view(1, 64)
    other = row(whole[0], "off")
    model = load_corrected(place.srd, alpha=0.0, dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (reference, model))
    assert len(other.depth) == 3
    assert other.depth[-1] == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    assert row(whole[0], "full").depth[-1] < other.depth[-1] / 100
    assert row(whole[0], "early").depth[0] < other.depth[0] / 100


def test_what_was_measured_passes_the_schema(whole, tmp_path):
    results, _ = whole
    write_results(results, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results
    assert results.settings == {"dtype": "float32", "device": "cpu", "max_tokens": None, "limit": None}
    assert results.command == ("srd", "compare")
    assert {"srd-modifier", "python", "torch", "lm_eval"} <= results.versions.keys()
    assert results.machine["cores"] >= 1


def test_bars_are_named_after_the_model_and_the_task(whole):
    _, made = whole
    titles = set(made["titles"])
    assert {"original: prose", "full: prose in halves", "server: own_choices"} <= titles


def test_the_same_again_loads_no_model(whole, place, monkeypatch):
    results, made = whole
    monkeypatch.setattr(
        Described, "open", lambda described, **_: pytest.fail(f"{described.candidate.label} was opened")
    )
    again = compare(
        place.reference,
        made["candidates"][:-1],  # what an address serves may have changed
        [replace(place.text, max_tokens=80), *made["tasks"][1:]],
        made["output"],
        setting=made["setting"],
    )
    assert again.models == results.models[:-1]
    assert again.tasks == results.tasks


# what is measured, and what is not


def test_an_added_candidate_measures_only_itself(place, output, setting, opened):
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")
    first = compare(place.reference, [full], [place.text], output, setting=setting)
    assert opened.labels == ["original", "full"]
    opened.labels.clear()
    second = compare(place.reference, [full, off], [place.text], output, setting=setting)
    assert opened.labels == ["off"]
    assert second.models[:2] == first.models
    opened.labels.clear()
    compare(place.reference, [off], [place.text, place.halves], output, setting=setting)
    assert opened.labels == ["original", "off"]


def test_an_added_candidate_has_its_curve_from_the_reference_alone(place, output, setting, opened):
    with_depth = replace(setting, depth_tokens=64)
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")
    compare(place.reference, [full], [place.text], output, setting=with_depth)
    opened.labels.clear()
    compare(place.reference, [full, off], [place.text], output, setting=with_depth)
    assert opened.labels == ["original", "off"]


def test_a_model_of_another_depth_is_not_asked_for_its_curve_again(place, output, setting, opened, tmp_path):
    other = save_model(make_llama(), tmp_path / "shallow")
    arguments = (place.reference, [Candidate(str(other), "shallow")], [place.text], output)
    first = compare(*arguments, setting=replace(setting, depth_tokens=64))
    assert first.models[1].depth is None
    opened.labels.clear()
    assert compare(*arguments, setting=replace(setting, depth_tokens=64)).models == first.models
    assert opened.labels == []


def test_what_is_interrupted_goes_on(place, output, setting, opened, monkeypatch):
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")

    def broken() -> Any:
        raise KeyboardInterrupt

    third = Candidate(str(place.original), "broken", read=broken)
    with pytest.raises(KeyboardInterrupt):
        compare(place.reference, [full, third, off], [place.text], output, setting=setting)
    assert opened.labels == ["original", "full", "broken"]
    opened.labels.clear()
    compare(place.reference, [full, off], [place.text], output, setting=setting)
    assert opened.labels == ["off"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"cache": None},
    ],
    ids=["dtype", "cache"],
)
def test_other_circumstances_are_measured_again(place, output, setting, opened, change):
    arguments = (place.reference, [Candidate.parse(f"full={place.srd}")], [place.text], output)
    compare(*arguments, setting=setting)
    opened.labels.clear()
    compare(*arguments, setting=replace(setting, **change))
    assert opened.labels == ["original", "full"]


def test_other_files_are_measured_again(place, output, setting, opened, tmp_path):
    model = save_model(make_llama(), tmp_path / "model")
    arguments = (place.reference, [Candidate(str(model), "model")], [place.text], output)
    first = compare(*arguments, setting=setting)
    opened.labels.clear()
    save_model(make_llama(seed=1), model)
    second = compare(*arguments, setting=setting)
    assert opened.labels == ["model"]
    assert first.models[1].digest != second.models[1].digest
    assert first.models[1].scores != second.models[1].scores


def test_one_directory_read_in_two_ways_is_measured_twice(place, output, setting):
    """As a package that computes in its own way, and by its weights alone."""
    ways = [Candidate(str(place.original), f"seed {seed}", read=partial(make_llama, seed=seed)) for seed in (1, 2)]
    results = compare(place.reference, ways, [place.text], output, setting=setting)
    values = [model.score("text", "ppl").value for model in results.models]
    assert len(set(values)) == 3
    assert all(model.score("text", "kld_mean").value > 0 for model in results.candidates)


def test_the_reference_may_be_a_candidate_too(place, output, setting):
    results = compare(
        place.reference,
        [Candidate(str(place.original), "itself")],
        [place.text, place.questions],
        output,
        setting=replace(setting, depth_tokens=64),
    )
    itself = results.models[1]
    assert itself.score("text", "kld_mean").value == pytest.approx(0, abs=1e-7)
    assert itself.score("text", "top1_agreement").value == 1
    assert itself.score("text", "ppl").recovery.value == pytest.approx(100, rel=1e-6)
    assert itself.score("own_choices", "acc").recovery == Interval(100.0, 100.0, 100.0)
    assert itself.depth == pytest.approx((0.0,) * 3, abs=1e-9)


# what was kept is damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-40]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"value": ', '"value": 1')),
        lambda path: path.write_text(path.read_text().replace("srd-outcome-1", "srd-outcome-9")),
    ],
    ids=["cut short", "a list", "another figure", "another format"],
)
def test_a_damaged_score_is_named_and_measured_again(place, output, setting, opened, damage):
    arguments = (place.reference, [Candidate.parse(f"full={place.srd}")], [place.text], output)
    before = compare(*arguments, setting=setting)
    paths = sorted((output / "scores").iterdir())
    assert len(paths) == 2
    (path,) = [each for each in paths if "kld_mean" in each.read_text()]
    damage(path)
    opened.labels.clear()
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged \(.*\); it is measured again"):
        again = compare(*arguments, setting=setting)
    assert opened.labels == ["full"]
    for found, expected in zip(again.models, before.models, strict=True):
        assert_same(found, expected)


def test_a_damaged_shard_brings_the_reference_back(place, output, setting, opened):
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")
    compare(place.reference, [full], [place.text], output, setting=setting)
    (shard,) = setting.cache.glob("*/00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    opened.labels.clear()
    with pytest.warns(UserWarning, match=r"00000\.safetensors is damaged .*; the reference original is computed again"):
        compare(place.reference, [full, off], [place.text], output, setting=setting)
    assert opened.labels == ["off", "original"]


# the stored reference


def test_without_a_cache_the_figures_are_the_same(place, output, setting, opened):
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")
    kept = compare(place.reference, [full, off], [place.text], output, setting=setting)
    assert opened.labels == ["original", "full", "off"]
    opened.labels.clear()
    fresh = compare(place.reference, [full, off], [place.text], output, setting=replace(setting, cache=None))
    assert opened.labels == ["original", "full", "off"]
    for ours, theirs in zip(kept.models, fresh.models, strict=True):
        for found, expected in zip(ours.scores, theirs.scores, strict=True):
            if found.metric in ("ppl", "top1_agreement"):
                assert (found.value, found.stderr) == (expected.value, expected.stderr)
            else:
                assert found.value == pytest.approx(expected.value, **CACHE_ERROR)


def test_what_would_be_too_large_is_not_kept_and_said(place, output, setting, opened):
    said: list[str] = []
    limited = replace(setting, cache_limit=1000)
    full, off = Candidate.parse(f"full={place.srd}"), Candidate.parse(f"off={place.srd}@alpha=0")
    results = compare(place.reference, [full, off], [place.text], output, setting=limited, say=said.append)
    (line,) = said
    assert "more than 0.0 GB" in line
    assert line.endswith(": not kept, --cache-dir DIR would keep it")
    assert opened.labels == ["original", "full", "off"]
    assert results.models[1].score("text", "kld_mean").value > 0
    assert not any(setting.cache.rglob("*.safetensors"))


def test_a_cache_that_was_asked_for_and_does_not_fit_is_an_error(place, output, setting, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(TooLargeError, match="are free; choose another --cache-dir"):
        compare(place.reference, [], [place.text], output, setting=setting)


def test_the_cache_lies_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "srd-modifier" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_cache() == tmp_path / "home" / ".cache" / "srd-modifier" / "reference"


# what cannot be compared


@pytest.fixture
def other_words(place: Workplace, tmp_path: Path) -> Path:
    """The same model with a tokenizer that puts BOS before a text."""
    directory = Path(shutil.copytree(place.original, tmp_path / "other"))
    values = json.loads((directory / "tokenizer.json").read_text())
    token = values["added_tokens"][0]["content"]
    values["post_processor"]["single"].insert(0, {"SpecialToken": {"id": token, "type_id": 0}})
    values["post_processor"]["special_tokens"] = {token: {"id": token, "ids": [0], "tokens": [token]}}
    (directory / "tokenizer.json").write_text(json.dumps(values))
    return directory


def test_other_tokens_are_not_compared(place, output, setting, other_words):
    with pytest.raises(
        SRDError, match=r"other and the reference original tokenize \S+prose\.txt differently: their div"
    ):
        compare(place.reference, [Candidate(str(other_words), "other")], [place.text], output, setting=setting)


def test_a_server_with_other_tokens_has_its_perplexity_and_no_recovery(place, output, setting, other_words, tmp_path):
    export_gguf(other_words, tmp_path / "other.gguf", file_type=FileType.F16)
    text = replace(place.halves, max_tokens=70)
    with LlamaCpp(tmp_path / "other.gguf", context=64) as llama:
        results = compare(place.reference, [Candidate(llama.address, "server")], [text], output, setting=setting)
    score = results.models[1].score("halves", "ppl")
    assert score.count == results.models[0].score("halves", "ppl").count
    assert score.recovery is None


@pytest.mark.parametrize(
    ("words", "label"),
    [(["a/srd", "b/srd"], "srd"), (["original=b/srd"], "original"), (["x=a", "x=b"], "x")],
)
def test_two_models_of_one_name_are_refused(place, output, words, label):
    with pytest.raises(ConfigError, match=f"two models are called '{label}'; name one with LABEL=MODEL"):
        compare(place.reference, [Candidate.parse(word) for word in words], [place.text], output)


def test_a_server_cannot_be_the_reference(place, output):
    with pytest.raises(
        ConfigError, match=r"^http://127\.0\.0\.1:1: the reference must be a model on this machine, a ser"
    ):
        compare(Candidate.parse("http://127.0.0.1:1"), [place.reference], [place.text], output)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all: there is no such directory"),
        ("{original}@alpha=0.5", "has no residual, leave @alpha and @chunks out"),
        ("{gguf}@alpha=0.5", "has no residual, leave @alpha and @chunks out"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_measured(place, output, setting, opened, word, message):
    candidate = Candidate.parse(word.format(original=place.original, gguf=place.gguf))
    with pytest.raises(SRDError, match=message):
        compare(place.reference, [candidate], [place.text], output, setting=setting)
    assert opened.labels == []
    assert list(output.iterdir()) == []


def test_a_window_longer_than_the_reference_reads_is_refused(place, output, setting):
    text: Task = replace(place.text, rule=window_rule(ctx=512))
    with pytest.raises(SRDError, match=r"ctx 512 exceeds the 256 positions"):
        compare(place.reference, [], [text], output, setting=setting)
    assert not any(setting.cache.rglob("*.safetensors"))


def test_a_device_that_is_not_there_is_refused(place, output, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SRDError, match="finds no CUDA device"):
        compare(place.reference, [], [place.text], output, setting=Setting(device="cuda"))


def test_the_trained_example_alone_is_a_comparison(output, place):
    task = replace(place.text, max_tokens=40)
    results = compare(Candidate.parse(str(TINY_LLAMA)), [], [task], output)
    assert [model.label for model in results.models] == ["tiny-llama"]
    assert results.reference.score("text", "ppl").value < 500
