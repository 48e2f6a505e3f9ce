from collections.abc import Mapping
from typing import Any

import pytest
import torch
from random_models import make_llama
from torch import Tensor, nn

from srd_modifier.errors import ConfigError
from srd_modifier.simulate import fake_quantize_

IN_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
CORRECTED = [f"model.layers.{layer}.{module}" for layer in range(2) for module in IN_LAYER]


@pytest.fixture
def model() -> nn.Module:
    """Two random decoder layers; the group of 64 does not divide the intermediate size."""
    return make_llama(vocab_size=64, intermediate_size=144, max_position_embeddings=32)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def published(weight: Tensor, alpha: float, group: int) -> Tensor:
    """The formula of the published simulation, one group of columns after the other."""
    done = []
    for part in weight.float().split(weight.shape[1] if group == -1 else group, dim=1):
        s4 = part.abs().max(dim=1, keepdim=True).values / 7
        base = torch.clamp(torch.round(part / s4), -8, 7) * s4
        rest = part - base
        s8 = rest.abs().max(dim=1, keepdim=True).values / 127
        done.append(base + alpha * (torch.clamp(torch.round(rest / s8), -127, 127) * s8))
    return torch.cat(done, dim=1).to(weight.dtype)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_equals_the_published_formula(model: nn.Module, alpha: float, group_size: int) -> None:
    before = weights(model)
    assert fake_quantize_(model, alpha, group_size) == CORRECTED
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in CORRECTED:
            expected = published(before[name], alpha, group_size)
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-9)
            assert alpha != 0.0 or torch.equal(parameter, expected)
        else:
            assert torch.equal(parameter, before[name]), name


def test_lm_head_and_embeddings_stay_and_the_model_still_runs(model: nn.Module) -> None:
    tokens = torch.arange(16).reshape(1, 16)
    with torch.no_grad():
        reference = model(tokens).logits
        fake_quantize_(model)
        corrected = model(tokens).logits
        fake_quantize_(model, alpha=0.0)
        plain = model(tokens).logits
    assert 0 < (corrected - reference).norm() < 0.1 * (plain - reference).norm()


def test_alpha_is_a_dial_on_the_error(model: nn.Module) -> None:
    weight = model.get_parameter(f"{CORRECTED[0]}.weight").data
    original = weight.clone()
    errors = []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        weight.copy_(original)
        fake_quantize_(model, alpha)
        errors.append(float((weight - original).norm()))
    assert errors == sorted(errors, reverse=True)
    # what is left of the residual is 1 - alpha of it, until its own rounding shows
    assert [error / errors[0] for error in errors[:4]] == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.01)
    assert errors[4] < 0.01 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_kept(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    before = weights(model)
    fake_quantize_(model, alpha=1.0)
    for name in CORRECTED:
        weight = model.get_parameter(f"{name}.weight")
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, published(before[f"{name}.weight"], 1.0, 64))


def test_the_change_is_in_place(model: nn.Module) -> None:
    parameter = model.get_parameter(f"{CORRECTED[0]}.weight")
    address = parameter.data_ptr()
    fake_quantize_(model)
    assert model.get_parameter(f"{CORRECTED[0]}.weight") is parameter
    assert parameter.data_ptr() == address
    assert parameter.requires_grad


@pytest.mark.parametrize(
    ("layer_alphas", "expected"),
    [
        ({CORRECTED[0]: 0.0}, {CORRECTED[0]: 0.0}),
        ({r"re:model\.layers\.1\.": 0.25}, dict.fromkeys(CORRECTED[7:], 0.25)),
        ({CORRECTED[7]: 1.0, r"re:model\.layers\.1\.": 0.25}, dict.fromkeys(CORRECTED[8:], 0.25) | {CORRECTED[7]: 1.0}),
    ],
    ids=str,
)
def test_layer_alphas(model: nn.Module, layer_alphas: Mapping[str, float], expected: Mapping[str, float]) -> None:
    before = weights(model)
    fake_quantize_(model, 0.5, layer_alphas=layer_alphas)
    for name in CORRECTED:
        wanted = published(before[f"{name}.weight"], expected.get(name, 0.5), 64)
        torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), wanted, rtol=1e-6, atol=1e-9)


def test_ignore_replaces_the_default(model: nn.Module) -> None:
    ignore = ["re:.*self_attn", "model.layers.0.mlp.up_proj"]
    expected = [name for name in CORRECTED if "self_attn" not in name and name not in ignore]
    assert fake_quantize_(model, ignore=ignore) == [*expected, "lm_head"]


def test_ignore_may_be_an_iterator(model: nn.Module) -> None:
    assert fake_quantize_(model, ignore=iter(["lm_head", "re:.*mlp"])) == [n for n in CORRECTED if "mlp" not in n]


def test_only_linear_weights_are_changed() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Conv1d(16, 16, 3))
    before = weights(model)
    assert fake_quantize_(model) == ["1"]
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["1.weight"]


def test_a_weight_of_zero_stays_zero() -> None:
    linear = nn.Linear(16, 4)
    nn.init.zeros_(linear.weight)
    fake_quantize_(nn.Sequential(linear))
    assert not linear.weight.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 2},
        {"bits": 1},
        {"density": 0.25},
        {"rounding": "stochastic"},
        {"rounding": "dithered"},
        {"rounding": "dithered", "density": 0.5, "bits": 4},
        {"scale_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_format_helps_and_none_is_the_default(model: nn.Module, settings: dict[str, Any]) -> None:
    weight = model.get_parameter(f"{CORRECTED[0]}.weight")
    original = weight.detach().clone()
    fake_quantize_(model, 1.0, **settings)
    error = (weight - original).norm()
    assert not torch.equal(weight, published(original, 1.0, 64))
    assert error < (published(original, 0.0, 64) - original).norm()


def test_seed_and_module_name_select_the_noise() -> None:
    shared = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def quantized(seed: int) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
        for name in ("0.weight", "1.weight"):
            model.get_parameter(name).data.copy_(shared)
        fake_quantize_(model, rounding="stochastic", seed=seed)
        return [model.get_parameter(name) for name in ("0.weight", "1.weight")]

    first, again, other = quantized(0), quantized(0), quantized(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_out_of_range(model: nn.Module, alpha: float) -> None:
    before = weights(model)
    with pytest.raises(ConfigError, match=r"alpha is .*, expected a number from 0 to 1"):
        fake_quantize_(model, alpha)
    with pytest.raises(ConfigError, match=r"layer_alphas\[.*\] is .*, expected a number from 0 to 1"):
        fake_quantize_(model, layer_alphas={"re:.*": alpha})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"group_size": 0}, "group_size is 0"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"density": 0.0}, "density is"),
        ({"scale_dtype": "float16"}, "scale_dtype is 'float16'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fake_quantize_(model, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_names_its_module(model: nn.Module, value: float) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite entries"):
        fake_quantize_(model)


def test_an_ignored_module_may_be_anything(model: nn.Module) -> None:
    model.get_parameter("lm_head.weight").data[0, 0] = float("nan")
    assert fake_quantize_(model) == CORRECTED


def test_nothing_is_left_to_quantize(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no Linear module of LlamaForCausalLM is left .* ignore=\('re:\.\*',\)"):
        fake_quantize_(model, ignore=["re:.*"])


def test_a_model_without_linear_modules() -> None:
    with pytest.raises(ConfigError, match="no Linear module of Sequential is left to quantize"):
        fake_quantize_(nn.Sequential(nn.Embedding(4, 4)))


def test_feedback_is_for_recipes():
    with pytest.raises(ConfigError, match="rounding is 'feedback', which needs calibration data"):
        fake_quantize_(nn.Sequential(nn.Linear(64, 8)), rounding="feedback")
