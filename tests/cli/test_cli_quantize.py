import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.cli.quantize import PipelineName
from srd_modifier.quantizing import quantize

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SCHEME = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}, "ignore": ["lm_head"]}
SRD = {"ignore": ["lm_head"], "residual_group_size": 32}


def write(path: Path, modifiers: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False))
    return path


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    return write(tmp_path / "gptq.yaml", {"SRDModifier": SRD, "GPTQModifier": SCHEME})


@pytest.fixture
def nearest(tmp_path: Path) -> Path:
    return write(tmp_path / "nearest.yaml", {"SRDModifier": {**SCHEME, **SRD}})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches the library, which then does nothing."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("srd_modifier.quantizing.quantize", lambda *args, **kwargs: calls.append((*args, kwargs)))
    return calls


def test_defaults_are_those_of_the_library(srd, calls, finished_checkpoint):
    assert srd("quantize", "model", "--recipe", "r.yaml", "--output", finished_checkpoint).status == 0
    ((*positional, options),) = calls
    assert positional == ["model", Path("r.yaml"), finished_checkpoint]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(quantize).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert options == defaults


def test_every_option_arrives(srd, calls, finished_checkpoint):
    options = "--dataset self --num-samples 7 --max-seq-length 33 --seed 5 --pipeline sequential --overwrite --resume"
    options += " --max-memory 6GB"
    srd("quantize", "model", "--recipe", "r.yaml", "--output", finished_checkpoint, *options.split())
    assert calls[0][-1] == {
        "dataset": "self",
        "num_samples": 7,
        "max_seq_length": 33,
        "seed": 5,
        "pipeline": "sequential",
        "overwrite": True,
        "resume": True,
        "max_memory": 6_000_000_000,
    }


@pytest.mark.parametrize("size", ["much", "5bpw", "-1GB"])
def test_a_size_that_is_none(srd, calls, finished_checkpoint, size):
    done = srd("quantize", "model", "--recipe", "r.yaml", "--output", finished_checkpoint, "--max-memory", size)
    assert done.status == 1
    assert f"--max-memory is '{size}', expected a size such as 8GB, 512MiB" in done.stderr
    assert calls == []


def test_the_pipelines_are_llm_compressors():
    from llmcompressor.pipelines import CalibrationPipeline

    assert {pipeline.value for pipeline in PipelineName} <= set(CalibrationPipeline.registered_names())


def test_the_result_is_shown_as_inspect_shows_it(srd, random_llama, nearest, tmp_path):
    done = srd("quantize", random_llama, "--recipe", nearest, "--output", tmp_path / "out")
    assert done.status == 0
    assert done.stdout == srd("inspect", tmp_path / "out").stdout


@pytest.mark.slow
def test_the_installed_command_is_quiet_and_repeatable(srd_process, random_llama, gptq, tmp_path):
    """Nothing but the table: no bar, no log and no warning of the libraries below, with data or without."""
    arguments = (random_llama, "--recipe", gptq, "--dataset", "self", "--num-samples", 4, "--max-seq-length", 32)
    done = srd_process("quantize", *arguments, "--output", tmp_path / "out")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == srd_process("inspect", tmp_path / "out").stdout
    Sidecar.open(tmp_path / "out").verify()
    # another process, the same bytes
    quantize(str(random_llama), gptq, tmp_path / "here", dataset="self", num_samples=4, max_seq_length=32)
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "here")).read_bytes(), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq.yaml", "here", "out"]


@pytest.mark.slow
def test_verbose_shows_the_log(srd_process, random_llama, nearest, tmp_path):
    done = srd_process("quantize", random_llama, "--recipe", nearest, "--output", tmp_path / "out", "--verbose")
    assert done.status == 0
    assert "SRD keeps the residual of 42 of 42 quantized modules" in done.stdout + done.stderr


# faults: one sentence each


def test_a_recipe_at_fault(srd, random_llama, tmp_path):
    path = write(tmp_path / "recipe.yaml", {"SRDModifier": {"scheme": "W4A16", "alpha": 2}})
    sentence = srd("quantize", random_llama, "--recipe", path, "--output", tmp_path / "out").sentence
    assert sentence == f"{path}: SRDModifier: alpha is 2.0, expected a number from 0 to 1"


def test_a_missing_recipe(srd, random_llama, tmp_path):
    sentence = srd("quantize", random_llama, "--recipe", "nowhere.yaml", "--output", tmp_path / "out").sentence
    assert sentence == "nowhere.yaml: there is no such recipe"


def test_an_output_that_is_there(srd, random_llama, nearest, checkpoint):
    before = (checkpoint / "config.json").read_bytes()
    sentence = srd("quantize", random_llama, "--recipe", nearest, "--output", checkpoint).sentence
    assert sentence == f"{checkpoint} already exists; choose another directory or pass --overwrite"
    assert (checkpoint / "config.json").read_bytes() == before


def test_an_output_that_is_there_is_replaced_if_asked(srd, random_llama, nearest, checkpoint):
    (checkpoint / "old.txt").write_text("old")
    assert srd("quantize", random_llama, "--recipe", nearest, "--output", checkpoint, "--overwrite").status == 0
    assert not (checkpoint / "old.txt").exists()


def test_a_recipe_that_needs_data(srd, random_llama, gptq, tmp_path):
    sentence = srd("quantize", random_llama, "--recipe", gptq, "--output", tmp_path / "out").sentence
    assert sentence == f"{gptq}: GPTQModifier needs calibration data; give --dataset a text file, or --dataset self"


def test_data_at_fault(srd, random_llama, gptq, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("{}")
    arguments = ("--recipe", gptq, "--output", tmp_path / "out", "--dataset", data)
    assert srd("quantize", random_llama, *arguments).sentence == f"{data} is not a list of records"
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none(srd, nearest, tmp_path):
    sentence = srd("quantize", tmp_path, "--recipe", nearest, "--output", tmp_path / "out").sentence
    assert sentence == f"{tmp_path} has no config.json: this is not a model directory"


def test_an_output_that_cannot_be_made_is_an_error_of_the_system(srd, random_llama, nearest, tmp_path):
    (tmp_path / "file").write_text("text")
    sentence = srd("quantize", random_llama, "--recipe", nearest, "--output", tmp_path / "file" / "out").sentence
    assert sentence == f"{tmp_path / 'file'}: File exists"


def test_a_missing_llm_compressor(srd, nearest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    sentence = srd("quantize", "model", "--recipe", nearest, "--output", tmp_path / "out").sentence
    assert sentence == "llmcompressor is not installed; it comes with: pip install 'srd-modifier[quantize]'"


# what the command does to the libraries


def test_bars_are_disabled_whoever_draws_them(monkeypatch, capsys):
    import tqdm.auto
    from tqdm import tqdm as plain

    from srd_modifier.cli._quiet import hide_bars

    monkeypatch.setattr(plain, "__init__", vars(plain)["__init__"])  # put back afterwards
    hide_bars()
    assert list(plain(range(3), disable=False)) == [0, 1, 2]
    assert list(tqdm.auto.tqdm(range(3), desc="bar")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_bars_are_left_alone_at_a_terminal(monkeypatch):
    from tqdm import tqdm

    from srd_modifier.cli._quiet import quiet_libraries

    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(import_module("llmcompressor.logger"), "configure_logger", lambda config: None)
    before = vars(tqdm)["__init__"]
    quiet_libraries(bars=True)
    assert vars(tqdm)["__init__"] is before


def test_what_the_command_writes_is_json_where_it_says_so(srd, random_llama, nearest, tmp_path):
    srd("quantize", random_llama, "--recipe", nearest, "--output", tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text())
