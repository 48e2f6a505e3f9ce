"""`srd qat`: what reaches the library, what is printed, and what is refused."""

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from random_models import make_llama, save_model

from srd_modifier.qat import train as train_module
from srd_modifier.qat.exports.destination import Destination
from srd_modifier.qat.settings import TrainingSettings
from srd_modifier.qat.train import Data, Trained, train

DEMO = Path(__file__).parents[2] / "examples" / "text" / "demo.txt"

_SIZES = {"group-size": 32, "batch-size": 4, "micro-batch-size": 2, "num-samples": 12, "max-seq-length": 32}
QUICK = ["--start", "nearest", *(word for name, value in _SIZES.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_llama(), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the library would have been asked."""
    calls: list[dict[str, Any]] = []
    file = tmp_path / "model-Q8_0.gguf"
    file.write_bytes(b"x" * 12345)

    def recorded(model: str, data: Data, settings: TrainingSettings, output: Path, **options: Any) -> Trained:
        calls.append({"model": model, "data": data, "settings": settings, "output": output, **options})
        options["say"]("this [is] said")
        return Trained(output, 1500, 96000, 0.0123456, (file,), ("this [is] a note",))

    monkeypatch.setattr(train_module, "train", recorded)
    return calls


def test_defaults_are_those_of_the_library(srd, calls, tmp_path):
    assert srd("qat", "model", "--text", "text.txt", "--output", tmp_path / "out").status == 0
    (call,) = calls
    assert (call["model"], call["data"], call["output"]) == ("model", Data(text=Path("text.txt")), tmp_path / "out")
    assert call["settings"] == TrainingSettings()
    assert call["exports"] == [Destination.parse("bf16"), Destination.parse("w4a16")]
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    for name in ("device", "save_steps", "resume", "overwrite"):
        assert call[name] == defaults[name]


def test_the_defaults_in_the_help_are_those_of_the_library(srd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    lines = srd("qat", "--help").stdout.splitlines()
    for field in fields(TrainingSettings):
        (line,) = [line for line in lines if f"--{field.name.replace('_', '-')} " in line]
        if field.name == "ignore":
            continue
        shown = line.partition("Default: ")[2].split()[0].rstrip(".")
        assert type(field.default)(shown) == field.default, line


def test_every_setting_arrives(srd, calls, tmp_path):
    given = {
        "grid": "gguf:Q8_0",
        "schedule": "0:16,0.9:8",
        "start": "nearest",
        "group_size": 32,
        "scales": "searched",
        "train": "all",
        "distill": 0.0,
        "temperature": 2.0,
        "epochs": 0.5,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 12,
        "micro_batch_size": 3,
        "num_samples": 7,
        "max_seq_length": 33,
        "products": "float32",
        "seed": 0,
    }
    assert {*given, "ignore"} == {field.name for field in fields(TrainingSettings)}
    # what an option gives wins, also where it is the default or nothing
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("distill: 0.5\nweight_decay: 0.5\nseed: 5\ntrain: linear\n")
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    options += ["--ignore", "re:.*k_proj", "--ignore", "model.layers.0.mlp.up_proj", "--recipe", recipe]
    assert srd("qat", "model", "--text", "t", "--output", tmp_path / "out", *options).status == 0
    expected = TrainingSettings(**given, ignore=("re:.*k_proj", "model.layers.0.mlp.up_proj"))
    assert calls[0]["settings"] == expected
    assert calls[0]["exports"] == [Destination.parse("bf16"), Destination.parse("gguf:Q8_0")]


def test_every_option_arrives(srd, calls, tmp_path):
    options = "--dataset self --device cpu --save-steps 5 --overwrite --export bf16,srd --export gguf:Q8_0,bf16"
    assert srd("qat", "model", "--output", tmp_path / "out", *options.split()).status == 0
    (call,) = calls
    assert call["data"] == Data(dataset="self")
    assert (call["device"], call["save_steps"], call["resume"], call["overwrite"]) == ("cpu", 5, False, True)
    assert [str(export) for export in call["exports"]] == ["bf16", "srd", "gguf:Q8_0"]
    srd("qat", "model", "--output", tmp_path / "out", "--text", "t", "--resume")
    assert calls[1]["resume"]


@pytest.mark.parametrize(("text", "number"), [("all", None), ("12", 12)])
def test_the_number_of_samples(text, number, srd, calls, tmp_path):
    assert srd("qat", "model", "--text", "t", "--output", tmp_path, "--num-samples", text).status == 0
    assert calls[0]["settings"].num_samples == number


def test_a_recipe(srd, calls, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("grid: gguf:Q4_K_M\nlearning_rate: 1e-4\nepochs: 3\nnum_samples: all\n")
    srd("qat", "model", "--text", "t", "--output", tmp_path / "out", "--recipe", recipe, "--epochs", 2)
    expected = TrainingSettings(grid="gguf:Q4_K_M", learning_rate=1e-4, epochs=2.0, num_samples=None)
    assert calls[0]["settings"] == expected
    assert [str(export) for export in calls[0]["exports"]] == ["bf16", "gguf:Q4_K_M"]


def test_what_is_printed(srd, calls, tmp_path):
    done = srd("qat", "model", "--text", "t", "--output", tmp_path / "out")
    for part in ("1,500", "96,000", "0.01235", "model-Q8_0.gguf", "12,345 bytes", "this [is] a note"):
        assert part in done.stdout
    assert done.stdout.endswith(f"the loss over the training is in {tmp_path / 'out' / 'loss.png'}\n")
    assert done.stderr == "this [is] said\n"


def test_json(srd, calls, tmp_path):
    done = srd("qat", "model", "--text", "t", "--output", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "out"),
        "steps": 1500,
        "samples": 96000,
        "loss": 0.0123456,
        "exports": [{"path": str(tmp_path / "model-Q8_0.gguf"), "bytes": 12345}],
        "notes": ["this [is] a note"],
    }


def test_a_training(srd, small, tmp_path):
    arguments = ("qat", small, "--text", DEMO, "--output", tmp_path / "out", *QUICK, "--device", "cpu")
    done = srd(*arguments, "--export", "bf16,w4a16", "--json")
    assert done.status == 0, done
    written = json.loads(done.stdout)
    assert (written["steps"], written["samples"]) == (3, 12)
    for export in written["exports"]:
        assert export["bytes"] == (Path(export["path"]) / "model.safetensors").stat().st_size
    assert srd(*arguments, "--resume").status == 0
    assert "already exists" in srd(*arguments).sentence
    assert srd(*arguments, "--overwrite").status == 0


def test_the_libraries_keep_their_level_of_warnings(srd, small, tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity()
    arguments = ("qat", small, "--text", DEMO, "--output", tmp_path / "out", *QUICK, "--device", "cpu")
    assert srd(*arguments, "--export", "bf16").status == 0
    assert srd(*arguments, "--export", "bf16").status == 1
    assert logging.get_verbosity() == before


@pytest.mark.slow
@pytest.mark.parametrize("start", ["nearest", "calibrated"])
def test_the_installed_command_is_quiet(start, srd_process, small, tmp_path):
    """Nothing but what it does and the table: no bar, no log and no warning of the libraries below."""
    options = (*QUICK, "--start", start, "--device", "cpu", "--save-steps", 1, "--export", "bf16,w4a16,srd,gguf:Q8_0")
    done = srd_process("qat", small, "--text", DEMO, "--output", tmp_path / "out", *options)
    assert done.status == 0, done
    assert done.stderr.splitlines() == [
        f"training on 12 samples of 32 tokens from {DEMO}",
        f"choosing the first levels: {start}",
        "exporting bf16",
        "exporting w4a16",
        "exporting srd",
        "exporting gguf:Q8_0",
    ]
    assert done.stdout.startswith("┌")
    assert "small-Q8_0.gguf" in done.stdout
    assert "gguf:Q8_0 is rounded by ggml from the trained model, which was trained for w4a16" in done.stdout


@pytest.mark.slow
def test_verbose_shows_the_bars(srd_process, small, tmp_path):
    options = (*QUICK, "--device", "cpu", "--verbose", "--export", "bf16")
    done = srd_process("qat", small, "--text", DEMO, "--output", tmp_path / "out", *options, LOGLEVEL="INFO")
    assert done.status == 0, done
    assert "mtime may not be reliable" in done.stderr


# usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --text or --dataset"),
        (("--text", "t", "--dataset", "self"), "give either --text or --dataset"),
        (("--text", "t", "--resume", "--overwrite"), "give either --resume or --overwrite, not both"),
        (("--text", "t", "--save-steps", "0"), "--save-steps"),
        (("--text", "t", "--device", "tpu"), "--device"),
    ],
)
def test_wrong_usage(options, message, srd, calls, tmp_path):
    done = srd("qat", "model", "--output", tmp_path / "out", *options)
    assert done.status == 2
    assert message in done.stderr
    assert not calls


# faults: one sentence each


def test_a_library_that_is_missing(srd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    sentence = srd("qat", "model", "--text", "t", "--output", tmp_path / "out").sentence
    assert sentence == "accelerate is not installed; it comes with: pip install 'srd-modifier[qat]'"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--export", "int4"), "there is no export 'int4': give bf16, w4a16, srd, or gguf: and a type"),
        (("--export", ","), None),
        (("--num-samples", "some"), "num_samples is 'some'; expected a whole number"),
        (("--num-samples", "-1"), "num_samples is '-1'; expected a whole number"),
        (("--grid", "w8"), "grid is 'w8'; expected w4a16, or gguf: and a type, as gguf:Q4_K_M"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml: there is no such recipe"),
        (("--schedule", "0:4,0.5:8"), "the width of a schedule never rises, but its milestone 0.5:8 comes after 0:4"),
    ],
)
def test_an_option_at_fault(options, sentence, srd, calls, tmp_path):
    done = srd("qat", "model", "--text", "t", "--output", tmp_path / "out", *options)
    if sentence is None:  # commas alone ask for nothing
        assert [str(export) for export in calls[0]["exports"]] == ["bf16", "w4a16"]
        return
    assert done.sentence == sentence
    assert not calls


def test_input_at_fault(srd, small, tmp_path):
    arguments = ("qat", small, "--text", "nowhere.txt", "--output", tmp_path / "out", "--device", "cpu")
    assert srd(*arguments, *QUICK).sentence == "nowhere.txt: there is no such file or folder to train on"
    assert srd(*arguments).sentence.startswith("max_seq_length is 512, but the model's context has 256 tokens")


def test_a_training_that_diverges(srd, small, tmp_path):
    arguments = (*QUICK, "--device", "cpu", "--schedule", "linear", "--learning-rate", "1e30", "--save-steps", "1")
    done = srd("qat", small, "--text", DEMO, "--output", tmp_path / "out", *arguments)
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("srd: training diverged at step ")
    assert "the last good checkpoint is " in done.stderr
