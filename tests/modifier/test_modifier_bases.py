"""A module's quantized weight, taken off it and put back on one that has its original weight."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from torch import Tensor, nn

from srd_modifier.modifier.bases import base_state, dequantized, packed_base, put_back

SHAPE = (40, 96)


def make(dtype: torch.dtype = torch.bfloat16, **weights: Any) -> nn.Linear:
    """A linear layer with scales of its own weight, as an observer sets them."""
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype))
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}}}
    apply_quantization_config(model, QuantizationConfig(**config))
    module = model[0]
    initialize_observer(module, base_name="weight")
    observe([module], base_name="weight")
    update_qparams([module], "weight")
    return module


def grid(module: nn.Linear) -> Tensor:
    """The weight that a loader reads."""
    return dequantized(packed_base(module), *SHAPE)


SETTINGS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "channel": {"strategy": "channel", "group_size": None},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_weight_on_the_grid_takes_its_codes_and_comes_back(settings: dict[str, Any]) -> None:
    quantized, fresh = make(**settings), make(**settings)
    with torch.no_grad():
        quantized.weight.copy_(grid(quantized))
        quantized.weight_scale.mul_(1)
        fresh.weight_scale.fill_(7)
    state = base_state(quantized, packed_base(quantized))
    assert "weight" not in state
    assert state["weight_packed"].nbytes == SHAPE[0] * SHAPE[1] // 2
    weight = put_back(fresh, state)
    assert weight is not None
    assert torch.equal(weight.to(quantized.weight.dtype), quantized.weight)
    assert torch.equal(fresh.weight_scale, quantized.weight_scale)
    if "asymmetric" in settings:
        assert torch.equal(fresh.weight_zero_point, quantized.weight_zero_point)


def test_a_weight_off_the_grid_is_kept_whole() -> None:
    module = make()
    state = base_state(module, packed_base(module))
    assert torch.equal(state["weight"], module.weight)
    assert "weight_packed" not in state
    assert torch.equal(put_back(make(), state), module.weight)


def test_an_original_weight_is_not_kept() -> None:
    module, fresh = make(symmetric=False), make(symmetric=False)
    state = base_state(module, None)
    assert set(state) == {"weight_scale", "weight_zero_point"}
    with torch.no_grad():
        fresh.weight_scale.zero_()
        fresh.weight_zero_point.zero_()
    before = fresh.weight.clone()
    assert put_back(fresh, state) is None
    assert torch.equal(fresh.weight, before)
    assert torch.equal(fresh.weight_scale, module.weight_scale)
    assert torch.equal(fresh.weight_zero_point, module.weight_zero_point)


def test_a_weight_that_waits_is_kept_in_place_of_the_modules_own() -> None:
    """Error feedback leaves a mixture of both in the module until the next layer's turn."""
    module = make()
    quantized = grid(module).to(module.weight.dtype)
    state = base_state(module, packed_base(module, quantized), quantized)
    assert "weight_packed" in state
    assert torch.equal(put_back(make(), state).to(quantized.dtype), quantized)
