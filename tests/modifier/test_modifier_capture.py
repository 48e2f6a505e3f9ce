import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from pack_quantized import all_w4
from safetensors.torch import load_file, save_file

from srd_modifier import SRDModifier
from srd_modifier.errors import CheckpointError, RecipeError
from srd_modifier.modifier.capture import ResidualCapture

IMPORTANCE = "srd/importance.safetensors"


class Held:
    """The names of the originals that were held, each time some were added, and the captures that held them."""

    def __init__(self) -> None:
        self.moments: list[list[str]] = []
        self.captures: list[ResidualCapture] = []


@pytest.fixture
def held(monkeypatch) -> Held:
    held = Held()
    keep, make = ResidualCapture.keep_originals, ResidualCapture.__init__

    def keep_originals(self: ResidualCapture, modules: Any, *, overwritten: bool) -> None:
        keep(self, modules, overwritten=overwritten)
        held.moments.append([self.modules[module].name for module in self._originals])

    def init(self: ResidualCapture, *args: Any) -> None:
        make(self, *args)
        held.captures.append(self)

    monkeypatch.setattr(ResidualCapture, "keep_originals", keep_originals)
    monkeypatch.setattr(ResidualCapture, "__init__", init)
    return held


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_no_more_than_one_layer_of_originals_is_held(pipeline, quantize, make_recipe, held, tmp_path):
    quantize(make_recipe("gptq"), tmp_path / "srd", data=True, pipeline=pipeline)
    moments = [names for names in held.moments if names]
    assert len(moments) == 6
    for layer, names in enumerate(moments):
        assert len(names) == 7
        assert all(name.startswith(f"model.layers.{layer}.") for name in names)
    (capture,) = held.captures
    assert not capture._originals


def test_two_modifiers_hold_no_more_than_one(quantize, group_scheme, held, tmp_path):
    gptq = GPTQModifier(config_groups=group_scheme(32), ignore=["lm_head"])
    recipe = [SRDModifier(targets=["re:.*self_attn"]), SRDModifier(targets=["re:.*mlp"]), gptq]
    quantize(recipe, tmp_path / "srd", data=True)
    assert max(len(names) for names in held.moments) == 7
    (capture,) = held.captures
    assert not capture._originals


def test_only_corrected_modules_are_copied(quantize, make_recipe, held, tmp_path):
    quantize(make_recipe("gptq", correct={"targets": ["re:.*layers.2.*up_proj"]}), tmp_path / "srd", data=True)
    assert [names for names in held.moments if names] == [["model.layers.2.mlp.up_proj"]]


@pytest.mark.parametrize("kind", ["itself", "round-to-nearest"])
def test_round_to_nearest_needs_no_copies(kind, quantize, make_recipe, held, tmp_path):
    quantize(make_recipe(kind), tmp_path / "srd", data=True)
    (capture,) = held.captures
    assert held.moments == []
    assert not capture._originals


def test_nothing_outlives_the_model(quantized_model, make_recipe, tmp_path):
    def run() -> weakref.ref[torch.nn.Module]:
        model = quantized_model(make_recipe("itself"), data=False)
        model.save_pretrained(tmp_path / "model")
        return weakref.ref(model)

    alive = run()
    reset_session()
    gc.collect()
    assert alive() is None
    # the residual's own files are hard links into this folder, or copies that would fill the disk
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_residuals_wait_where_the_recipe_says(quantize, make_recipe, held, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    output = quantize(make_recipe("gptq", spool_dir=str(spool)), tmp_path / "srd", data=True)
    (capture,) = held.captures
    files = capture.files()
    assert {file.parent.name for file in files} == {"sidecar"}
    assert {file.parent.parent.parent for file in files} == {spool}
    assert {file.name for file in files} == {file.name for file in (output / "srd").iterdir()} - {
        "importance.safetensors"
    }


@pytest.mark.parametrize(("kind", "pipeline"), [("gptq", "independent"), ("gptq", "sequential"), ("itself", "basic")])
def test_importance_is_the_mean_squared_input(
    kind, pipeline, quantize, make_recipe, first_layer_importance, mean_squares, tmp_path
):
    # of the first layer, whose inputs no quantization has touched; all modules count, corrected or not
    recipe = make_recipe(kind, correct={"chunks": ["governance"]})
    found = load_file(quantize(recipe, tmp_path / "srd", data=True, pipeline=pipeline) / IMPORTANCE)
    assert found.keys() == {f"{name}.importance" for name in mean_squares if name != "lm_head"}
    for name, expected in first_layer_importance.items():
        importance = found[f"{name}.importance"]
        assert importance.dtype == torch.float32
        torch.testing.assert_close(importance, expected, rtol=1e-5, atol=0)


def test_importance_of_every_layer_where_nothing_is_quantized_meanwhile(quantize, make_recipe, mean_squares, tmp_path):
    found = load_file(quantize(make_recipe("gptq"), tmp_path / "srd", data=True, pipeline="basic") / IMPORTANCE)
    for name, expected in mean_squares.items():
        if name != "lm_head":
            torch.testing.assert_close(found[f"{name}.importance"], expected.float(), rtol=1e-5, atol=0)


def test_two_modifiers_do_not_count_an_input_twice(quantize, group_scheme, first_layer_importance, tmp_path):
    gptq = GPTQModifier(config_groups=group_scheme(32), ignore=["lm_head"])
    recipe = [SRDModifier(targets=["re:.*self_attn"]), SRDModifier(targets=["re:.*mlp"]), gptq]
    found = load_file(quantize(recipe, tmp_path / "srd", data=True) / IMPORTANCE)
    for name, expected in first_layer_importance.items():
        torch.testing.assert_close(found[f"{name}.importance"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["itself", "round-to-nearest"])
def test_without_data_there_is_no_importance(kind, quantize, make_recipe, tmp_path):
    output = quantize(make_recipe(kind), tmp_path / "srd")
    assert not (output / IMPORTANCE).exists()
    assert (output / "srd" / "residual-00001-of-00001.safetensors").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "itself"},
        {"kind": "gptq", "residual_bits": 3, "density": 0.5},
        {"kind": "itself", "residual_bits": 4, "rounding": "dithered"},
        {"kind": "itself", "rounding": "stochastic", "scale_dtype": "float32"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_large_weights_are_encoded_in_blocks_of_rows_with_the_same_result(
    settings, quantize, make_recipe, group_scheme, directory_bytes, monkeypatch, tmp_path
):
    def run(name: str) -> dict[str, bytes]:
        recipe = make_recipe(scheme=group_scheme(32, symmetric=False), **settings)
        return directory_bytes(quantize(recipe, tmp_path / name, data=True))

    whole = run("whole")
    monkeypatch.setattr("srd_modifier.modifier.rounded._BLOCK_ENTRIES", 1000)  # 7 or 15 rows, which divide nothing
    assert run("blocks") == whole


@pytest.fixture(scope="module")
def on_the_grid(random_llama, tmp_path_factory) -> Path:
    """The random Llama with weights that asymmetric groups of 32 hold exactly: codes times a power of two."""
    directory = tmp_path_factory.mktemp("grid") / "model"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(random_llama / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            codes = torch.randint(-8, 8, tensor.shape, generator=generator).view(len(tensor), -1, 32)
            codes[..., 0], codes[..., 1] = -8, 7  # both ends of the range, so that it is found again
            tensors[name] = (codes.view(tensor.shape) / 128).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((random_llama / file).read_bytes())
    return directory


@pytest.mark.parametrize("kind", ["gptq", "itself", "round-to-nearest"])
def test_a_model_that_was_quantized_before_is_refused(kind, on_the_grid, quantize, make_recipe, group_scheme, tmp_path):
    scheme = group_scheme(32, symmetric=False)
    alone = quantize(make_recipe("gptq", scheme, alone=True), tmp_path / "alone", model=on_the_grid, data=True)
    original = load_file(on_the_grid / "model.safetensors")
    for name, weight in all_w4(load_file(alone / "model.safetensors")).items():  # nothing is lost, as intended
        assert torch.equal(weight, original[f"{name}.weight"].double())
    with pytest.raises(RecipeError, match="lost nothing, its weights were on the 4-bit grid before"):
        quantize(make_recipe(kind, scheme), tmp_path / "srd", model=on_the_grid, data=True)
    assert not (tmp_path / "srd").exists()


def test_one_module_without_loss_is_no_reason_to_refuse(
    on_the_grid, random_llama, quantize, make_recipe, group_scheme, tmp_path
):
    # the second model has weights of its own everywhere but in one module
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    tensors = load_file(random_llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = load_file(on_the_grid / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (mixed / file).write_bytes((random_llama / file).read_bytes())
    scheme = group_scheme(32, symmetric=False)
    output = quantize(make_recipe("gptq", scheme), tmp_path / "srd", model=mixed, data=True)
    codes = load_file(output / "srd/residual-00001-of-00001.safetensors")
    assert not codes[f"{name}.weight_d8"].any()
    assert codes["model.layers.1.mlp.up_proj.weight_d8"].any()


def test_weights_of_zero_are_no_reason_to_refuse(random_llama, quantize, make_recipe, tmp_path):
    zero = tmp_path / "zero"
    zero.mkdir()
    tensors = load_file(random_llama / "model.safetensors")
    for name in tensors:
        if name.startswith("model.layers.0.") and "_proj" in name:
            tensors[name].zero_()
    save_file(tensors, zero / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (zero / file).write_bytes((random_llama / file).read_bytes())
    output = quantize(make_recipe("gptq"), tmp_path / "srd", model=zero, data=True)
    assert not load_file(output / "srd/residual-00001-of-00001.safetensors")[
        "model.layers.0.mlp.up_proj.weight_d8"
    ].any()


def change_a_weight(model: torch.nn.Module) -> Callable[[], None]:
    weight = model.get_submodule("model.layers.3.mlp.down_proj").weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.05)
    return lambda: weight.data.copy_(before)


def test_weights_that_changed_before_saving_are_noticed(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("gptq"))
    change_a_weight(model)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.3\.mlp\.down_proj\.weight_packed was saved with other bytes"
    ):
        model.save_pretrained(tmp_path / "srd")
    assert not (tmp_path / "srd").exists()


def test_scales_that_changed_before_saving_are_noticed(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("gptq"))
    with torch.no_grad():
        model.get_submodule("model.layers.3.mlp.down_proj").weight_scale.mul_(2)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj.* was saved with other bytes"):
        model.save_pretrained(tmp_path / "srd")


def test_a_new_scale_zero_point_or_weight_is_bound_by_the_digest(quantize, make_recipe, group_scheme, tmp_path):
    output = quantize(make_recipe("gptq", group_scheme(32, symmetric=False)), tmp_path / "srd", data=True)
    config = json.loads((output / "config.json").read_text())["srd_config"]
    assert config["base_digest"].startswith("sha256:")
    assert config["base_fingerprint"].startswith("sha256:")
