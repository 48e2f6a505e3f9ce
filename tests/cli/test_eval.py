import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from comparisons import accuracy, kld, make_model, make_results, ppl
from random_models import TINY_LLAMA
from typer.testing import CliRunner

from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.cli.eval import ConventionName, evaluate
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.comparison.candidate import Candidate
from srd_modifier.evaluation.comparison.run import Setting
from srd_modifier.evaluation.report import Report
from srd_modifier.evaluation.results import read_results
from srd_modifier.evaluation.scores import Divergence, Perplexity
from srd_modifier.evaluation.tasks.find import TaskOptions
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


# tasks, and models behind an address


PROSE = "The river runs north through the old town and turns east below the bridge.\n" * 8
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def comparisons(monkeypatch):
    """What `srd eval` asks of a comparison, which leaves nothing behind."""
    calls = []

    def compare(reference, candidates, tasks, output, **options):
        models = [reference, *candidates]
        assert output.is_dir()
        calls.append({"models": models, "tasks": tasks, "output": output, **options})
        row = make_model("srd", 8_000_000, ppl(10.5, 95.2, 94.0, 96.1), kld(0.002, stderr=0.0001), accuracy(0.7))
        return make_results(row) if candidates else make_results()

    monkeypatch.setattr("srd_modifier.evaluation.comparison.run.compare", compare)
    monkeypatch.setattr("srd_modifier.cli._quiet.quiet_libraries", lambda *, bars: None)
    return calls


@pytest.fixture
def wiki(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(PROSE)
    return tmp_path


def test_a_task_is_a_comparison_of_one(app, comparisons, wiki):
    result = run(app, "out/srd", "--task", "wikitext2", "--data-dir", wiki)
    assert result.exit_code == 0, result.output
    (call,) = comparisons
    assert call["models"] == [Candidate("out/srd", "out/srd")]
    assert [task.name for task in call["tasks"]] == ["wikitext2"]
    assert call["setting"] == Setting(depth_tokens=0)
    assert call["setting"].cache is None
    assert not call["output"].exists()
    assert call["settings"] == {"max_tokens": None, "limit": None}


def test_every_option_of_tasks_arrives(app, comparisons, wiki):
    options = "--task wikitext2 --task wikitext2_llamacpp --reference original --ctx 64 --stride 64 --alpha 0.5"
    options += " --chunk early --chunk reasoning --limit 7 --num-fewshot 2 --max-tokens 1000 --batch-size 2"
    options += " --dtype bfloat16 --device auto --convention llamacpp"
    text = wiki / "wiki.test.raw"
    result = run(app, "out/srd", "--data-dir", wiki, "--text", text, *options.split())
    assert result.exit_code == 0, result.output
    (call,) = comparisons
    assert call["models"] == [
        Candidate("original", "original"),
        Candidate("out/srd", "out/srd", alpha=0.5, chunks=("early", "reasoning")),
    ]
    assert [(task.name, task.rule.ctx, task.max_tokens) for task in call["tasks"]] == [
        ("wikitext2", 64, 1000),
        ("wikitext2_llamacpp", 64, 1000),
        ("text", 64, 1000),
    ]
    assert call["tasks"][2].rule.convention is Convention.LLAMACPP
    assert call["setting"] == Setting(torch.bfloat16, "auto", 2, depth_tokens=0)
    assert call["settings"] == {"max_tokens": 1000, "limit": 7}


def test_options_of_questions_arrive(app, comparisons, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "srd_modifier.evaluation.tasks.find.find_tasks", lambda names, options: asked.append((names, options)) or []
    )
    options = ["--task", "piqa", "--task", "gsm8k", "--data-dir", tmp_path, "--limit", 7, "--num-fewshot", 3]
    assert run(app, "model", *options).exit_code == 0
    ((names, found),) = asked
    assert names == ["piqa", "gsm8k"]
    assert found == TaskOptions(data_dir=tmp_path, limit=7, num_fewshot=3)


def test_a_model_beside_itself_has_two_names(app, comparisons, wiki):
    run(app, "model", "--task", "wikitext2", "--data-dir", wiki, "--reference", "model", "--alpha", 0.5)
    labels = [model.label for model in comparisons[0]["models"]]
    assert labels == ["model (reference)", "model"]


def test_an_address_is_scored_on_a_text_too(app, comparisons, wiki):
    assert run(app, ADDRESS, "--text", wiki / "wiki.test.raw", "--max-tokens", 50).exit_code == 0
    (call,) = comparisons
    assert call["models"] == [Candidate(ADDRESS, ADDRESS)]
    assert [task.name for task in call["tasks"]] == ["text"]


def test_the_table_of_tasks_has_what_is_left_of_the_reference(app, comparisons, wiki, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    output = run(app, "srd", "--reference", "original", "--task", "wikitext2", "--data-dir", wiki).stdout
    for expected in (
        "10.5000 ± 0.5000",
        "10.0000 ± 0.5000",
        "95.20 % [94.00, 96.10]",
        "2.000e-03 ± 1.0e-04",
        "0.7000 ± 0.0100",
        "ARC easy",
        "8,000,000 bytes on disk",
        "windows of 512 tokens",
    ):
        assert expected in output, output


def test_the_table_of_one_model_has_its_values(app, comparisons, wiki, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    output = run(app, "original", "--task", "wikitext2", "--data-dir", wiki).stdout
    assert "10.0000 ± 0.5000" in output
    assert "recovery" not in output


def test_tasks_as_json_are_the_results(app, comparisons, wiki, tmp_path):
    arguments = ["srd", "--reference", "original", "--task", "wikitext2", "--data-dir", wiki]
    result = run(app, *arguments, "--json", "-")
    values = json.loads(result.stdout)
    assert (values["schema"], [model["label"] for model in values["models"]]) == (1, ["bf16", "srd"])
    assert result.stderr == ""
    path = tmp_path / "result.json"
    assert "ARC easy" in run(app, *arguments, "--json", path).stdout
    assert json.loads(path.read_text()) == values
    assert len(read_results(path).models) == 2


def test_tasks_that_could_not_be_written_are_refused_before_scoring(app, comparisons, wiki):
    result = run(app, "srd", "--task", "wikitext2", "--data-dir", wiki, "--json", wiki / "nowhere" / "a.json")
    assert "cannot be written, there is no directory" in str(result.exception)
    assert comparisons == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "--task", "piqa", "--limit", "0"],
        ["model", "--task", "piqa", "--num-fewshot", "-1"],
        ["model", "--task", "piqa", "--device", "tpu"],
        [ADDRESS],
    ],
    ids=["limit", "num-fewshot", "device", "an address and nothing else"],
)
def test_misuse_of_tasks_exits_with_status_two(app, comparisons, arguments):
    assert run(app, *arguments).exit_code == 2
    assert comparisons == []


def test_a_task_the_whole_way(app, wiki, monkeypatch):
    monkeypatch.setattr("srd_modifier.cli._quiet.quiet_libraries", lambda *, bars: None)
    sizes = ["--ctx", 64, "--stride", 32, "--data-dir", wiki, "--max-tokens", 100]
    result = run(app, TINY_LLAMA, "--reference", TINY_LLAMA, "--task", "wikitext2", *sizes, "--json", "-")
    values = json.loads(result.stdout)
    scores = {score["metric"]: score["value"] for score in values["models"][1]["scores"]}
    assert scores["kld_mean"] == 0
    assert scores["top1_agreement"] == 1
    assert 1 < scores["ppl"] < 500
    assert scores["ppl"] == values["models"][0]["scores"][0]["value"]
    assert values["models"][0]["label"] == f"{TINY_LLAMA} (reference)"
    assert values["settings"]["max_tokens"] == 100


def test_a_server_that_is_not_there_is_an_error_for_the_shared_handler(app, wiki, monkeypatch):
    monkeypatch.setattr("srd_modifier.cli._quiet.quiet_libraries", lambda *, bars: None)
    result = run(app, "http://127.0.0.1:1", "--text", wiki / "wiki.test.raw")
    assert isinstance(result.exception, SRDError)
    assert str(result.exception).startswith("http://127.0.0.1:1")
