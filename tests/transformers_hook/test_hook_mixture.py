"""Experts: a Linear each in the checkpoint, slices of two stacked parameters in the model."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from random_models import make_gemma4_mixture, make_mixtral, make_mixture, save_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from srd_modifier import SRDModifier, hydrate, load_corrected, release, set_alpha
from srd_modifier.errors import CheckpointError
from srd_modifier.transformers.weights import store_weight


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names of the model's parameters: gate above up, one expert after another."""
    dense = {name: weight for name, weight in weights.items() if ".experts." not in name}
    for layer in sorted({name.split(".experts.")[0] for name in weights if ".experts." in name}):
        prefix = f"{layer}.experts"
        experts = range(len([name for name in weights if name.startswith(f"{prefix}.") and "down_proj" in name]))
        both = [torch.cat([weights[f"{prefix}.{e}.gate_proj"], weights[f"{prefix}.{e}.up_proj"]]) for e in experts]
        dense[f"{prefix}.gate_up_proj"] = torch.stack(both)
        dense[f"{prefix}.down_proj"] = torch.stack([weights[f"{prefix}.{e}.down_proj"] for e in experts])
    return dense


@pytest.fixture(scope="module")
def weights(mixture_checkpoint, by_hand):
    return by_hand(mixture_checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_expert_is_corrected(dtype, mixture_checkpoint, weights, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(mixture_checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert len(weights.residual) == 2 * (4 + 4 * 3)
    expected = stacked(weights.weights())
    assert expected["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 128, 64)
    assert_weights(model, expected)


def test_alpha_zero_is_the_plain_model_bit_for_bit(mixture_checkpoint, plain, logits):
    model = load_corrected(mixture_checkpoint, alpha=0)
    expected = plain.tensors["mixture", "bfloat16"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(model), expected["logits"])


def test_the_dial_and_the_chunks_reach_the_experts(mixture_checkpoint, weights, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(mixture_checkpoint)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    layer_alphas = {"re:.*experts.2.": 0.25}
    set_alpha(model, 0.5, layer_alphas=layer_alphas)
    alphas = {name: 0.25 if ".experts.2." in name else 0.5 for name in weights.residual}
    assert_weights(model, stacked(weights.weights(alphas)))
    release(model, chunks=["early"])  # of two layers the first
    kept = {name: alpha for name, alpha in alphas.items() if re.match(r"model\.layers\.1\.", name)}
    assert_weights(model, stacked(weights.weights(kept)))
    hydrate(model)
    assert_weights(model, stacked(weights.weights(alphas)))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_one_expert_of_four(quantize, group_scheme, mixture_checkpoint, by_hand, assert_weights, tmp_path):
    recipe = SRDModifier(
        config_groups=group_scheme(32),
        ignore=["lm_head", "re:.*mlp.gate$"],
        residual_group_size=32,
        correct={"targets": ["re:.*layers.1.mlp.experts.3."]},
    )
    directory = quantize(recipe, tmp_path / "model", model=mixture_checkpoint.with_name("original"))
    weights = by_hand(directory)
    assert sorted(weights.residual) == [
        f"model.layers.1.mlp.experts.3.{projection}_proj" for projection in ("down", "gate", "up")
    ]
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        assert_weights(model, stacked(weights.weights()))
        assert model.model.layers[0].mlp.experts.down_proj.dtype == dtype  # without a residual, and not rounded


def test_a_saved_copy_is_dense(mixture_checkpoint, logits, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixture_checkpoint)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "srd").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    original = load_file(mixture_checkpoint.with_name("original") / "model.safetensors")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == original.keys()


def test_the_correction_is_towards_the_original(mixture_checkpoint, plain, logits):
    original = logits(AutoModelForCausalLM.from_pretrained(mixture_checkpoint.with_name("original"))).float()
    corrected = logits(AutoModelForCausalLM.from_pretrained(mixture_checkpoint)).float()
    w4 = plain.tensors["mixture", "bfloat16"]["logits"].float()
    assert (corrected - original).norm() < 0.2 * (w4 - original).norm()


def test_gptq_of_experts(quantize, group_scheme, mixture_checkpoint, by_hand, assert_weights, tmp_path):
    ignore = ["lm_head", "re:.*mlp.gate$"]
    gptq = GPTQModifier(config_groups=group_scheme(32), ignore=ignore)
    recipe = [SRDModifier(ignore=ignore, residual_group_size=32), gptq]
    original = mixture_checkpoint.with_name("original")
    directory = quantize(recipe, tmp_path / "model", model=original, data=True)
    weights = by_hand(directory)
    tensors = load_file(original / "model.safetensors")
    for name, weight in weights.weights().items():
        lost = (tensors[f"{name}.weight"] - weights.base[name]).abs().max()
        assert (tensors[f"{name}.weight"] - weight).abs().max() < 0.01 * lost, name
    assert_weights(AutoModelForCausalLM.from_pretrained(directory), stacked(weights.weights()))
    importance = load_file(directory / "srd" / "importance.safetensors")
    assert importance.keys() == {f"{name}.importance" for name in weights.residual}


# --- log-probabilities of whole models, and architectures whose experts Transformers does not stack by itself


@pytest.mark.parametrize(
    ("name", "residuals"),
    [("routed", 44), ("gemma4", 14 + 12 + 48), ("gemma4_images", 14 + 12 + 48), ("gemma4_e2b", 33)],
)
def test_log_probabilities_are_those_of_a_model_put_together_by_hand(name, residuals, request, by_hand, logits):
    directory = request.getfixturevalue(f"{name}_checkpoint")
    weights = by_hand(directory)
    assert len(weights.residual) == residuals
    reference = AutoModelForCausalLM.from_pretrained(directory.with_name("original"), dtype=torch.float32)
    model = load_corrected(directory, dtype=torch.float32)
    parameters = dict(reference.named_parameters())
    expected = []
    for alpha in (1, 0):
        set_alpha(model, alpha)
        for module, weight in stacked(weights.weights(alpha)).items():
            with torch.no_grad():
                parameters[f"{module}.weight" if f"{module}.weight" in parameters else module].copy_(weight)
        expected.append(logits(reference).log_softmax(-1))
        assert float((logits(model).log_softmax(-1) - expected[-1]).abs().max()) < 1e-3, alpha
    assert float((expected[0] - expected[1]).abs().max()) > 0.1  # so that the tolerance means something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemma4_is_loaded_without_a_complaint(dtype, gemma4_checkpoint, by_hand, assert_weights, capfd):
    model = AutoModelForCausalLM.from_pretrained(gemma4_checkpoint, dtype=dtype)
    report = capfd.readouterr()
    assert "MISSING" not in report.out + report.err
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_weights(model, stacked(by_hand(gemma4_checkpoint).weights()))
    set_alpha(model, 0)
    assert_weights(model, stacked(by_hand(gemma4_checkpoint).weights(0)))


def test_gemma4_with_few_residuals_has_no_expert_at_random(
    quantize, group_scheme, gemma4_checkpoint, by_hand, assert_weights, tmp_path
):
    recipe = SRDModifier(
        config_groups=group_scheme(32),
        ignore=["lm_head", "re:.*router"],
        residual_group_size=32,
        correct={"targets": ["re:.*layers.1.experts.2."]},
    )
    directory = quantize(recipe, tmp_path / "model", model=gemma4_checkpoint.with_name("original"))
    weights = by_hand(directory)
    assert len(weights.residual) == 3
    assert_weights(AutoModelForCausalLM.from_pretrained(directory), stacked(weights.weights()))


def test_a_saved_copy_of_gemma4_is_the_architecture_s_own(gemma4_checkpoint, logits, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gemma4_checkpoint)
    model.save_pretrained(tmp_path / "again")
    original = load_file(gemma4_checkpoint.with_name("original") / "model.safetensors")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == original.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(
    "make",
    [partial(make_mixture, num_experts=4), make_gemma4_mixture, make_mixtral],
    ids=["qwen3", "gemma4", "mixtral"],
)
def test_experts_that_are_not_quantized(make, quantize, group_scheme, tmp_path):
    original = save_model(make(), tmp_path / "original")
    recipe = SRDModifier(
        config_groups=group_scheme(32),
        ignore=["lm_head", "re:.*mlp.gate$", "re:.*router", "re:.*experts"],
        residual_group_size=32,
    )
    directory = quantize(recipe, tmp_path / "model", model=original)
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = dict(AutoModelForCausalLM.from_pretrained(original).named_parameters())
    stacks = [(name, weight) for name, weight in model.named_parameters() if "experts" in name]
    assert stacks
    for parameter, weight in stacks:
        assert torch.equal(weight, expected[parameter]), parameter
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(original / "model.safetensors").keys()
    )


@pytest.fixture
def asymmetric(quantize, group_scheme, mixture_checkpoint, tmp_path) -> Path:
    recipe = SRDModifier(
        config_groups=group_scheme(32, symmetric=False), ignore=["lm_head", "re:.*mlp.gate$"], residual_group_size=32
    )
    return quantize(recipe, tmp_path / "model", model=mixture_checkpoint.with_name("original"))


def test_experts_with_zero_points_are_refused_in_one_sentence(asymmetric):
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+ has zero points, with which Transformers cannot stack"):
        AutoModelForCausalLM.from_pretrained(asymmetric)


@pytest.mark.parametrize("layout", [{"is_transposed": True}, {"is_concatenated": False}], ids=str)
def test_stacks_of_another_layout_are_refused(layout, mixture_checkpoint, monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    plain: Callable[..., None] = Qwen3MoeExperts.__init__

    def change(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        vars(self).update(layout)

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", change)
    with pytest.raises(CheckpointError, match="stacks transposed or with gate and up interleaved"):
        AutoModelForCausalLM.from_pretrained(mixture_checkpoint)


def test_an_expert_of_another_shape_is_refused(mixture_checkpoint):
    model = load_corrected(mixture_checkpoint)
    model.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 64, 1))  # would be broadcast to
    name = "model.layers.0.mlp.experts.0.down_proj"
    with pytest.raises(CheckpointError, match=r"down_proj is \[64, 64\] in the checkpoint and \[64, 1\] in Qwen3Moe"):
        store_weight(model, name, torch.zeros(64, 64))
