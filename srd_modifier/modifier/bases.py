"""The quantized weight of a module: taken off it, and put back bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn

from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points

_WEIGHT = "weight"
_CODES = "weight_packed"


def packed_base(module: nn.Module, weight: Tensor | None = None) -> dict[str, Tensor]:
    """What is saved of a quantized module: the tensors of compressed-tensors' `pack-quantized` format, by suffix.

    Args:
        module: with its scales.
        weight: in place of the module's own, `[out, in]`.
    """
    scheme: Any = module.quantization_scheme
    state = {name: tensor for name, tensor in get_direct_state_dict(module).items() if tensor is not None}
    if weight is not None:
        state[_WEIGHT] = weight
    return BaseCompressor.get_value_from_registry(infer_module_format(type(module), scheme).value).compress(
        state, scheme
    )


def dequantized(packed: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
    """The weight float32 `[out, in]` that a loader reads from what is saved of a module."""
    zero_points = unpack_zero_points(packed.get("weight_zero_point"), out_features)
    return dequantize_w4(packed[_CODES], packed["weight_scale"], zero_points, in_features)


def base_state(
    module: nn.Linear, packed: Mapping[str, Tensor] | None, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """What a quantizer set in a module, for `put_back`: codes take a quarter of the weight that they stand for.

    Args:
        module: that was quantized.
        packed: of `packed_base`; None if the weight is the original, and only its scales were set.
        weight: the quantized one, where the module's own is another for now.
    """
    state = {
        name: tensor.detach()
        for name, tensor in get_direct_state_dict(module).items()
        if tensor is not None and name not in (_WEIGHT, "bias")
    }
    if packed is None:
        return state
    weight = module.weight.detach() if weight is None else weight
    coded = state | {_CODES: packed[_CODES]}
    if torch.equal(_weight_of(coded, module.in_features).to(weight.dtype), weight):
        return coded
    return state | {_WEIGHT: weight}  # an order of columns that the codes do not tell, or no value of the grid


def put_back(module: nn.Linear, state: Mapping[str, Tensor]) -> Tensor | None:
    """Set scales and zero points as they were.

    Returns:
        The quantized weight `[out, in]`, float32 or as it was, which is for the caller to set; None if the original
        stays.
    """
    for name, tensor in state.items():
        if name not in (_WEIGHT, _CODES):
            update_offload_parameter(module, name, tensor)
    if _CODES in state:
        return _weight_of(state, module.in_features)
    return state.get(_WEIGHT)


def _weight_of(state: Mapping[str, Tensor], in_features: int) -> Tensor:
    """The weight float32 `[out, in]` of packed codes, and of scales and zero points as a module has them."""
    zero_point = state.get("weight_zero_point")
    return dequantize_w4(
        state[_CODES], state["weight_scale"], None if zero_point is None else zero_point.float(), in_features
    )
