"""W4 weights in float64 from the definition of `pack-quantized`, which no library reads here."""

from collections.abc import Mapping

import torch
from torch import Tensor


def nibbles(packed: Tensor) -> Tensor:
    """The eight 4-bit values of every int32, lowest bits first: int64 `[rows, 8 * words]`."""
    return ((packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(1)


def w4(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The weight of a module of symmetric or asymmetric groups."""
    out_features, in_features = tensors[f"{module}.weight_shape"].tolist()
    scale = tensors[f"{module}.weight_scale"].double()
    columns = in_features // scale.shape[1]
    codes = nibbles(tensors[f"{module}.weight_packed"])[:, :in_features] - 8
    if f"{module}.weight_zero_point" in tensors:
        zeros = nibbles(tensors[f"{module}.weight_zero_point"].t())[:, :out_features].t() - 8
        codes = codes - zeros.repeat_interleave(columns, dim=1)
    return codes * scale.repeat_interleave(columns, dim=1)


def all_w4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight of every packed module."""
    suffix = ".weight_packed"
    return {name: w4(tensors, name) for name in (n.removesuffix(suffix) for n in tensors if n.endswith(suffix))}
