import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.checkpoint.config import IMPORTANCE, read_srd_config
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, MissingExtraError, RecipeError, SRDError
from srd_modifier.loading import loaded_model
from srd_modifier.modifier.capture import ResidualCapture
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.modifier.rounded import encode_rounded
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import ModelSource
from srd_modifier.quantizing import SELF, load_recipe, quantize

MODULES = 42  # seven in each of the random Llama's six layers
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SCHEME = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}, "ignore": ["lm_head"]}
SRD = {"ignore": ["lm_head"], "residual_group_size": 32}
NEAREST = {"SRDModifier": {**SCHEME, **SRD}}
GPTQ = {"SRDModifier": SRD, "GPTQModifier": SCHEME}
FEW = {"num_samples": 4, "max_seq_length": 32}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Any], Path]:
    """Write modifiers, or any text at all, as a YAML recipe in a folder of its own."""

    def write(content: Any, name: str = "recipe.yaml") -> Path:
        path = tmp_path / "recipes" / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else yaml.safe_dump(staged(content), sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a checkpoint goes: alone in its folder, so that a test sees what is left beside it."""
    return tmp_path / "out" / "checkpoint"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text("The river runs north through the old town and turns east below the bridge. " * 40)
    return str(path)


def staged(modifiers: dict[str, Any]) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": modifiers}}


def names(directory: Path) -> list[str]:
    """Every file below a directory, hidden ones included."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names(directory)}


# the whole way


@pytest.mark.parametrize("modifiers", [NEAREST, GPTQ], ids=["round-to-nearest", "gptq"])
def test_a_whole_checkpoint_appears(random_llama, recipe, output, text, modifiers):
    quantize(str(random_llama), recipe(modifiers), output, dataset=text, **FEW)
    assert names(output) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        IMPORTANCE,
        "srd/residual-00001-of-00001.safetensors",
        "srd/residual.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    sidecar = Sidecar.open(output)
    sidecar.verify()
    assert len(sidecar.entries) == len(sidecar.base.quantized_modules) == MODULES
    assert json.loads((output / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert AutoTokenizer.from_pretrained(output)("the old town") == AutoTokenizer.from_pretrained(random_llama)(
        "the old town"
    )


def test_the_checkpoint_loads_corrected(random_llama, recipe, output):
    quantize(str(random_llama), recipe(NEAREST), output)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)(ids).logits
        corrected = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(ids).logits
    assert (corrected - original).norm() < 2e-3 * original.norm()


def test_nothing_is_left_beside_the_checkpoint(random_llama, recipe, output, text):
    quantize(str(random_llama), recipe(GPTQ), output, dataset=text, **FEW)
    quantize(str(random_llama), recipe(NEAREST), output.with_name("second"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["checkpoint", "second"]


def test_a_plain_recipe_gives_a_plain_checkpoint(random_llama, recipe, output):
    quantize(str(random_llama), recipe({"QuantizationModifier": SCHEME}), output)
    assert read_srd_config(output) is None
    assert names(output) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_relative_output_is_below_the_working_directory(random_llama, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantize(str(random_llama), recipe(NEAREST), Path("made/here"))
    Sidecar.open(tmp_path / "made" / "here").verify()


def test_two_runs_give_the_same_bytes(random_llama, recipe, output):
    for name in ("first", "second"):
        quantize(str(random_llama), recipe(GPTQ), output.with_name(name), dataset=SELF, **FEW, seed=3)
    first, second = contents(output.with_name("first")), contents(output.with_name("second"))
    assert [name for name in first if first[name] != second[name]] == []
    assert first.keys() == second.keys()


def test_another_seed_samples_other_text(random_llama, recipe, output):
    for seed in (0, 1):
        quantize(str(random_llama), recipe(NEAREST), output.with_name(str(seed)), dataset=SELF, **FEW, seed=seed)
    first, second = (load_file(output.with_name(str(seed)) / IMPORTANCE) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("modifiers", [NEAREST, GPTQ], ids=["round-to-nearest", "gptq"])
def test_the_model_itself_gives_importance(random_llama, recipe, output, modifiers):
    quantize(str(random_llama), recipe(modifiers), output, dataset=SELF, **FEW)
    importance = load_file(output / IMPORTANCE)
    assert sorted(importance) == sorted(f"{module}.importance" for module in Sidecar.open(output).entries)
    assert all(bool((value > 0).all()) for value in importance.values())


def test_no_data_gives_no_importance(random_llama, recipe, output):
    quantize(str(random_llama), recipe(NEAREST), output)
    assert not (output / IMPORTANCE).exists()


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_other_pipelines_correct_every_module_too(random_llama, recipe, output, text, pipeline):
    quantize(str(random_llama), recipe(GPTQ), output, dataset=text, **FEW, pipeline=pipeline)
    sidecar = Sidecar.open(output)
    sidecar.verify()
    assert len(sidecar.entries) == MODULES


def test_no_file_of_the_checkpoint_names_a_path_of_this_machine(random_llama, recipe, output, text, tmp_path):
    quantize(str(random_llama), recipe(GPTQ), output, dataset=text, **FEW)
    paths = (str(tmp_path).encode(), str(random_llama).encode(), str(Path.home()).encode() + b"/")
    assert [name for name, content in contents(output).items() if any(path in content for path in paths)] == []
    assert "spool_dir" not in (output / "recipe.yaml").read_text()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_finished_model_is_let_go(streamed, random_llama, recipe, output, monkeypatch):
    """Quantizing many models in one process must not keep them all; with data, llm-compressor's own tracing does."""
    from llmcompressor.core import active_session

    models = []

    @contextmanager
    def load(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with loaded_model(*args, **kwargs) as model:
            models.append(weakref.ref(model))
            yield model

    def build(source: ModelSource) -> Any:
        model = build_skeleton(source)
        if streamed:
            models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("srd_modifier.quantizing.loaded_model", load)
    monkeypatch.setattr("srd_modifier.streaming.run.build_skeleton", build)
    if not streamed:
        monkeypatch.setattr("srd_modifier.quantizing._STREAMED_PIPELINES", ())
    quantize(str(random_llama), recipe(NEAREST), output)
    active_session().reset()
    gc.collect()
    assert [model() for model in models] == [None]


def test_a_damaged_model_is_a_sentence(random_llama, recipe, output, text, tmp_path):
    model = tmp_path / "damaged"
    shutil.copytree(random_llama, model)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    for modifiers, options in ((NEAREST, {}), (GPTQ, {"dataset": text, **FEW})):
        with pytest.raises(SRDError, match=r"model\.safetensors is truncated: its tensors end at byte"):
            quantize(str(model), recipe(modifiers), output, **options)
    assert not output.exists()


def test_a_spool_directory_of_the_recipe_is_used_and_left_empty(random_llama, recipe, output, text, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    modifiers = {**GPTQ, "SRDModifier": {**SRD, "spool_dir": str(spool)}}
    quantize(str(random_llama), recipe(modifiers), output, dataset=text, **FEW)
    Sidecar.open(output).verify()
    assert list(spool.iterdir()) == []


# the output


@pytest.fixture
def finished(finished_checkpoint: Path, output: Path) -> Path:
    """An older checkpoint where the new one should go, with a file of its user's in it."""
    shutil.copytree(finished_checkpoint, output)
    (output / "notes.txt").write_text("measured on Monday")
    return output


def test_an_existing_checkpoint_is_refused_before_anything_is_read(finished):
    before = contents(finished)
    with pytest.raises(CheckpointError, match=r"checkpoint already exists; choose another directory or pass --overw"):
        quantize("no/such-model", Path("no-such-recipe.yaml"), finished)
    assert contents(finished) == before


def test_an_existing_checkpoint_is_replaced_whole_if_asked(random_llama, recipe, finished):
    before = contents(finished)
    quantize(str(random_llama), recipe({"QuantizationModifier": SCHEME}), finished, overwrite=True)
    assert "notes.txt" not in names(finished)
    assert not (finished / "srd").exists()
    assert (finished / "config.json").read_bytes() != before["config.json"]
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]


def test_an_empty_directory_is_filled(random_llama, recipe, output):
    output.mkdir(parents=True)
    quantize(str(random_llama), recipe(NEAREST), output)
    Sidecar.open(output).verify()


def test_a_directory_that_is_no_model_is_never_overwritten(random_llama, recipe, output):
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a model directory and is not overwritten; remove it yourself"):
        quantize(str(random_llama), recipe(NEAREST), output, overwrite=True)
    assert contents(output) == {"thesis.tex": b"years of work"}


def test_a_file_is_never_overwritten(random_llama, recipe, output):
    output.parent.mkdir()
    output.write_text("years of work")
    with pytest.raises(CheckpointError, match="is a file, expected a directory"):
        quantize(str(random_llama), recipe(NEAREST), output, overwrite=True)
    assert output.read_text() == "years of work"


def fail_in_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibrationInputs, "add", fail)


def fail_in_the_fourth_module(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = ResidualCapture._encode, []

    def sometimes(self: Any, *args: Any) -> Any:
        calls.append(args)
        return fail() if len(calls) == 4 else encode(self, *args)

    monkeypatch.setattr(ResidualCapture, "_encode", sometimes)


def fail_in_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srd_modifier.modifier.saving.attach_sidecar", fail)


def fail_in_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("midway")


STAGES = [fail_in_calibration, fail_in_the_fourth_module, fail_in_attaching, fail_in_the_tokenizer]


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_midway_leaves_nothing(random_llama, recipe, output, text, monkeypatch, stage):
    stage(monkeypatch)
    with pytest.raises(RuntimeError, match="midway"):
        quantize(str(random_llama), recipe(GPTQ), output, dataset=text, **FEW)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_midway_leaves_the_old_checkpoint(random_llama, recipe, finished, text, monkeypatch, stage):
    before = contents(finished)
    stage(monkeypatch)
    with pytest.raises(RuntimeError, match="midway"):
        quantize(str(random_llama), recipe(GPTQ), finished, dataset=text, **FEW, overwrite=True)
    assert contents(finished) == before
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]


def fail_in_the_fourth_streamed_module(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = encode_rounded, []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return fail() if len(calls) == 4 else encode(*args, **kwargs)

    monkeypatch.setattr("srd_modifier.modifier.rounded.encode_rounded", sometimes)


def fail_in_attaching_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srd_modifier.streaming.run.attach_sidecar", fail)


@pytest.mark.parametrize(
    "stage", [fail_in_the_fourth_streamed_module, fail_in_attaching_streamed, fail_in_the_tokenizer]
)
def test_a_failure_midway_of_round_to_nearest_leaves_nothing(random_llama, recipe, output, monkeypatch, stage):
    stage(monkeypatch)
    with pytest.raises(RuntimeError, match="midway"):
        quantize(str(random_llama), recipe(NEAREST), output)
    assert list(output.parent.iterdir()) == []


def test_a_full_disk_is_a_sentence(random_llama, recipe, output, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint: No space left on device"):
        quantize(str(random_llama), recipe(NEAREST), output)
    assert list(output.parent.iterdir()) == []


# recipes


def test_modifiers_come_in_the_order_of_the_recipe(recipe):
    loaded = load_recipe(recipe(GPTQ))
    assert [type(modifier).__name__ for modifier in loaded.modifiers] == ["SRDModifier", "GPTQModifier"]


@pytest.mark.parametrize("name", ["recipe.yml", "recipe.json", "recipe"])
def test_other_names_of_yaml_are_read(recipe, name):
    text = json.dumps(staged(NEAREST))  # JSON is YAML
    assert len(load_recipe(recipe(text, name)).modifiers) == 1


def srd(**settings: Any) -> dict[str, Any]:
    return {"SRDModifier": {"scheme": "W4A16", **settings}}


BAD_RECIPES: dict[str, tuple[Any, str]] = {
    "not yaml": ("quant_stage: [", r"is not a recipe: while parsing a flow"),
    "empty": ("", r"is not a recipe: it is empty, expected a mapping"),
    "a list": ("- SRDModifier\n", r"is not a recipe: it is a list, expected a mapping"),
    "a word": ("W4A16\n", r"is not a recipe: it is a str, expected a mapping"),
    "stage without _stage": (
        {"quant": {"quant_modifiers": srd()}},
        "has no modifiers: its keys must end in _stage and",
    ),
    "group without _modifiers": (
        {"quant_stage": {"modifiers": srd()}},
        r"must end in _stage and, below, in _modifiers",
    ),
    "modifiers in a list": ({"quant_stage": {"quant_modifiers": [srd()]}}, "has no modifiers"),
    "unknown modifier": ({"NoSuchModifier": {}}, "No modifier of type 'NoSuchModifier' found"),
    "modifier without settings": (
        "quant_stage: {quant_modifiers: {SRDModifier: }}",
        r"SRDModifier has no settings; write",
    ),
    "unknown field": (srd(alhpa=1), r"SRDModifier\.alhpa: Extra inputs are not permitted"),
    "unknown field of another": ({"GPTQModifier": {"shceme": "W4A16"}}, r"GPTQModifier\.shceme: Extra inputs"),
    "word for a number": (srd(alpha="much"), r"SRDModifier\.alpha: Input should be a valid number"),
    "alpha": (srd(alpha=2), r"SRDModifier: alpha is 2\.0, expected a number from 0 to 1"),
    "layer alpha": (srd(layer_alphas={"x": -1}), r"layer_alphas\['x'\] is -1\.0, expected a number from 0 to 1"),
    "bits": (srd(residual_bits=7), r"SRDModifier: residual_bits is 7, expected one of"),
    "group size": (srd(residual_group_size=0), r"SRDModifier: residual_group_size is 0, expected"),
    "rounding": (srd(rounding="up"), r"SRDModifier: rounding is 'up', expected one of"),
    "density": (srd(density=0), r"SRDModifier: density is 0\.0, expected"),
    "scale dtype": (srd(scale_dtype="int8"), r"SRDModifier: scale_dtype is 'int8', expected one of"),
    "seed": (srd(seed=-1), r"SRDModifier: seed is -1, expected"),
    "choice": (srd(correct="most"), r"SRDModifier: correct is 'most', expected 'all' or one of"),
    "depth": (srd(correct={"depth": [1, 0]}), r"correct\.depth is \[1, 0\], expected \[start, end\]"),
    "chunk": (srd(correct={"chunks": ["late"]}), r"chunk 'late' is unknown, expected some of"),
    "transform alone": ({"AWQModifier": {}}, "AWQ must be run with a subsequent quantization modifier"),
}


@pytest.mark.parametrize(("content", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipes_are_refused_in_a_sentence(recipe, content, message):
    if isinstance(content, dict) and not any("quant" in key for key in content):
        content = staged(content)
    path = recipe(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path)


def test_bytes_that_are_no_text_are_no_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a recipe: 'utf-8' codec"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_card_without_a_recipe_is_no_recipe(recipe):
    with pytest.raises(RecipeError, match="is not a recipe: Could not extract YAML front matter"):
        load_recipe(recipe("# A model\n", "README.md"))


def test_a_bad_recipe_is_refused_before_the_model_is_loaded(recipe, output):
    with pytest.raises(RecipeError, match="alpha is 2"):
        quantize("no/such-model", recipe(srd(alpha=2)), output)


def test_a_recipe_that_needs_data_is_refused_without(recipe, output):
    with pytest.raises(
        SRDError, match=r"recipe\.yaml: GPTQModifier needs calibration data; give --dataset a text file"
    ):
        quantize("no/such-model", recipe(GPTQ), output)
    assert not output.parent.exists()


def test_a_recipe_that_does_not_fit_the_model_is_refused(random_llama, recipe, output):
    with pytest.raises(RecipeError, match="q_proj has 64 input features, which groups of 128 do not divide"):
        quantize(str(random_llama), recipe(srd(ignore=["lm_head"])), output)
    assert list(output.parent.iterdir()) == []


def test_what_llm_compressor_refuses_becomes_one_sentence(random_llama, recipe, output, text):
    path = recipe({"GPTQModifier": {"scheme": "W4A16", "targets": ["NoSuchLayer"]}})
    with pytest.raises(
        RecipeError, match="llm-compressor refuses it: GPTQModifier was unable to find any modules"
    ) as caught:
        quantize(str(random_llama), path, output, dataset=text, **FEW)
    assert "\n" not in str(caught.value)
    assert list(output.parent.iterdir()) == []


# model, data, environment


def test_a_directory_without_config_is_no_model(recipe, output, tmp_path):
    with pytest.raises(SRDError, match=r"has no config\.json: this is not a model directory"):
        quantize(str(tmp_path), recipe(NEAREST), output)


def test_a_model_that_is_not_there_is_named(recipe, output, tmp_path):
    with pytest.raises(SRDError, match=r"cannot load .*nowhere: "):
        quantize(str(tmp_path / "nowhere"), recipe(NEAREST), output)


def test_a_model_without_tokenizer_is_refused(random_llama, recipe, output, tmp_path):
    model = shutil.copytree(random_llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SRDError, match=r"cannot load .*model: "):
        quantize(str(model), recipe(NEAREST), output)


def test_a_model_that_is_quantized_already_is_refused(random_llama, recipe, output):
    quantize(str(random_llama), recipe({"QuantizationModifier": SCHEME}), output)
    with pytest.raises(SRDError, match=r"checkpoint is quantized already; start from the original model"):
        quantize(str(output), recipe(NEAREST), output.with_name("twice"))
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint"]


def test_a_missing_file_of_data_is_named(random_llama, recipe, output):
    with pytest.raises(SRDError, match=r"nowhere\.txt: there is no such file to calibrate on"):
        quantize(str(random_llama), recipe(GPTQ), output, dataset="nowhere.txt")
    assert list(output.parent.iterdir()) == []


def test_a_data_set_that_nobody_knows_is_refused(random_llama, recipe, output):
    with pytest.raises(SRDError, match="no-such-set is neither a file nor a data set that llm-compressor knows: c4, "):
        quantize(str(random_llama), recipe(GPTQ), output, dataset="no-such-set")
    assert list(output.parent.iterdir()) == []


def test_a_missing_llm_compressor_names_the_extra(recipe, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'srd-modifier\[quantize\]'"):
        quantize("model", recipe(NEAREST), output)
