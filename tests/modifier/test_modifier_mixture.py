"""Mixtures of experts from recipe to checkpoint: which experts are corrected, and what a budget spends on them."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from random_models import (
    make_gemma4_e2b,
    make_gemma4_mixture,
    make_mixtral,
    make_mixture,
    make_routed_mixture,
    save_model,
)

from srd_modifier import SRDModifier, load_corrected
from srd_modifier.checkpoint.sensitivity import read_sensitivity
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import RecipeError
from srd_modifier.selection.depth import CHUNKS

IGNORE = ["lm_head", "re:.*mlp.gate$", "re:.*router"]
ATTENTION = [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
MLP = [f"{leaf}_proj" for leaf in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def srd(group_scheme) -> Callable[..., SRDModifier]:
    def make(**settings) -> SRDModifier:
        return SRDModifier(config_groups=group_scheme(32), **{"ignore": IGNORE, **settings})

    return make


@pytest.fixture(scope="module")
def deep_mixture(tmp_path_factory) -> Path:
    """Ten layers of three experts."""
    return save_model(make_mixture(num_experts=3, num_hidden_layers=10), tmp_path_factory.mktemp("deep") / "model")


@pytest.fixture(scope="module")
def routed_mixture(tmp_path_factory) -> Path:
    """Six experts in each of two layers, of which the router uses the fifth seldom and the last one never."""
    return save_model(make_routed_mixture(), tmp_path_factory.mktemp("routed") / "model")


def corrected_by(directory: Path) -> set[str]:
    return set(json.loads((directory / "config.json").read_text())["srd_config"]["modules"])


# --- chunks

LAYERS = {"early": (0, 1), "factual": (2, 3), "reasoning": (4, 5, 6, 7), "governance": (8, 9)}


@pytest.mark.parametrize("chunks", [["early"], ["factual"], ["reasoning"], ["governance"], ["early", "governance"]])
def test_chunks_take_the_experts_of_their_layers(chunks, srd, quantize, deep_mixture, tmp_path):
    directory = quantize(srd(correct={"chunks": chunks}), tmp_path / "srd", model=deep_mixture)
    assert corrected_by(directory) == {
        f"model.layers.{layer}.{module}"
        for chunk in chunks
        for layer in LAYERS[chunk]
        for module in [*ATTENTION, *(f"mlp.experts.{expert}.{leaf}" for expert in range(3) for leaf in MLP)]
    }
    # the others are W4, and nothing but the chunks decides that
    assert len(Sidecar.open(directory).base.quantized_modules) == 10 * (4 + 3 * 3)


def test_chunks_of_gemma4_take_experts_and_the_mlp_beside_them(srd, quantize, tmp_path):
    model = save_model(make_gemma4_mixture(), tmp_path / "model")
    directory = quantize(srd(correct={"chunks": ["factual"]}), tmp_path / "srd", model=model)
    assert CHUNKS["factual"] == (0.20, 0.40)  # of four layers the second
    experts = [f"experts.{expert}.{leaf}" for expert in range(4) for leaf in MLP]
    # full attention has no v_proj: its keys are its values
    expected = [*(f"self_attn.{leaf}_proj" for leaf in "qko"), *(f"mlp.{leaf}" for leaf in MLP), *experts]
    assert corrected_by(directory) == {f"model.layers.1.{module}" for module in expected}


# --- what a budget spends on experts


def used(directory: Path, expert: int) -> list[str]:
    return [name for name in corrected_by(directory) if f".experts.{expert}." in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "all_experts"),
    [("gradient", True), ("gradient", False), ("forward", True)],
    ids=["gradient-all-experts", "gradient-routed-experts", "forward-all-experts"],
)
def test_a_budget_is_spent_on_the_experts_that_the_router_uses(
    method, all_experts, srd, quantize, routed_mixture, tmp_path
):
    recipe = srd(correct={"budget": "7bpw"}, sensitivity=method)
    directory = quantize(
        recipe, tmp_path / "srd", model=routed_mixture, data=True, moe_calibrate_all_experts=all_experts
    )
    found = read_sensitivity(directory)
    assert found is not None
    assert found.method == method
    damage = {
        expert: sum(module.w4 for name, module in found.modules.items() if f".experts.{expert}." in name)
        for expert in range(6)
    }
    assert damage[5] == 0.0
    assert 0.0 < damage[4] < 0.25 * min(damage[expert] for expert in range(4))
    sidecar = Sidecar.open(directory)
    spent = {expert: sum(sidecar.entries[name].bytes() for name in used(directory, expert)) for expert in range(6)}
    assert spent[5] == 0
    assert spent[4] < min(spent[expert] for expert in range(4))


# --- Gemma 4 E2B


def test_e2b_is_quantized_whole_and_exported(srd, quantize, tmp_path):
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType

    original = save_model(make_gemma4_e2b(), tmp_path / "model")
    directory = quantize(srd(residual_group_size=32), tmp_path / "srd", model=original)
    names = corrected_by(directory)
    assert "model.per_layer_model_projection" in names
    assert {
        f"model.layers.{layer}.per_layer_{part}" for layer in range(4) for part in ("input_gate", "projection")
    } < names
    assert not {f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in (2, 3) for leaf in "kv"} & names  # shared
    model = load_corrected(directory, dtype=torch.float32)
    assert model.model.layers[3].mlp.up_proj.weight.shape == (2 * 128, 64)  # double-wide where keys are shared

    for source in (original, directory):
        export_gguf(source, tmp_path / "model.gguf", file_type=FileType.F32, overwrite=True)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        assert "per_layer_token_embd.weight" in tensors
    gates = torch.from_numpy(tensors["blk.3.inp_gate.weight"].data.copy())
    assert torch.equal(gates, model.model.layers[3].per_layer_input_gate.weight)


# --- Mixtral


def test_mixtral_is_refused_before_calibration(srd, quantize, tmp_path, forwards):
    model = save_model(make_mixtral(), tmp_path / "model")
    message = (
        r"^MixtralForCausalLM saves model\.layers\.0\.mlp\.experts\.0\.up_proj as "
        r"model\.layers\.0\.block_sparse_moe\.experts\.0\.up_proj, which residuals do not follow and Transformers may "
        r"not read back; leave such modules out with ignore \(docs/upstream\.md\)$"
    )
    with pytest.raises(RecipeError, match=message):
        quantize(srd(rounding="feedback", residual_bits=4), tmp_path / "srd", model=model, data=True)
    assert not forwards
    assert not (tmp_path / "srd").exists()
