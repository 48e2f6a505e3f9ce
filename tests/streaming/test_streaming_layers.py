"""Every saved tensor is in one step, and a decoder layer is one step."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_gemma4_e2b, make_llama, make_mixture, save_model
from streamed import scheme, srd, write_recipe

from srd_modifier.planning.modules import saved_layout
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import read_source
from srd_modifier.quantizing import load_recipe
from srd_modifier.streaming.layers import Step, steps_of
from srd_modifier.streaming.pipeline import life_cycle

MODELS = {
    "llama": lambda: make_llama(num_hidden_layers=3, attention_bias=True),
    "tied": lambda: make_llama(tie_word_embeddings=True),
    "mixture": lambda: make_mixture(num_experts=3),
    "Gemma 4 E2B": make_gemma4_e2b,
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": ("SRDModifier", srd()),
    "asymmetric": ("QuantizationModifier", scheme(symmetric=False)),
    "head": ("QuantizationModifier", {**scheme(), "ignore": []}),
    "attention": ("QuantizationModifier", scheme(r"re:.*self_attn\..*_proj$")),
}


def steps(folder: Path, model: Any, recipe: tuple[str, dict[str, Any]]) -> tuple[list[Step], Any]:
    """The steps of a model and a recipe, and the model with its schemes."""
    skeleton = build_skeleton(read_source(str(save_model(model, folder / "model"))))
    with life_cycle(skeleton, load_recipe(write_recipe(folder / "recipe.yaml", recipe))):
        return steps_of(skeleton), skeleton


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_saved_tensor_is_in_one_step(model: str, recipe: str, tmp_path: Path) -> None:
    found, skeleton = steps(tmp_path, MODELS[model](), RECIPES[recipe])
    tensors = Counter(name for step in found for name in step.saved)
    assert tensors == Counter(list(saved_layout(skeleton)))


def test_a_decoder_layer_is_one_step_and_so_is_every_other_module(tmp_path: Path) -> None:
    found, _ = steps(tmp_path, MODELS["llama"](), RECIPES["residual"])
    assert [step.name for step in found] == [
        "model.embed_tokens",
        "layer 0",
        "layer 1",
        "layer 2",
        "model.norm",
        "lm_head",
    ]
    layer = found[2]
    assert [name.removeprefix("model.layers.1.") for name, _ in layer.quantized] == [
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    ]
    assert layer.copied == [
        *(f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkvo"),
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]
    assert found[0].quantized == []
    assert found[0].copied == ["model.embed_tokens.weight"]


def test_a_tied_tensor_is_copied_once(tmp_path: Path) -> None:
    found, _ = steps(tmp_path, MODELS["tied"](), RECIPES["residual"])
    assert "lm_head" not in [step.name for step in found if step.copied or step.quantized]
    assert found[0].copied == ["model.embed_tokens.weight"]


def test_a_head_that_is_quantized_is_a_step(tmp_path: Path) -> None:
    found, _ = steps(tmp_path, MODELS["llama"](), RECIPES["head"])
    assert [name for name, _ in found[-1].quantized] == ["lm_head"]
    assert found[-1].copied == []


def test_tensors_of_the_root_have_a_name() -> None:
    model = torch.nn.Module()
    model.scalar = torch.nn.Parameter(torch.ones(1))
    assert [(step.name, step.copied) for step in steps_of(model)] == [("", ["scalar"])]
