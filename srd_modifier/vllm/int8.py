"""Weights and residuals as groups of int8, in the layout of `pack-quantized`: what vLLM's W8A16 kernels read.

    W ~ codes * scale,   one scale per row and group of columns, codes from -127 to 127

Four codes fill an int32 along a row, the first in the lowest bits, each stored as code + 128. Computed in float32 on
the weight's own device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 127  # the codes are symmetric, so that no sign has the finer step
_OFFSET = 128


class Int8Weight(NamedTuple):
    """A matrix `[out, in]` in groups of int8.

    Attributes:
        codes: int8 `[out, in]`.
        scale: of the kernel's dtype, `[out, in / group_size]`.
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The weight, float32 `[out, in]`; kernels may round the products to their own dtype."""
        groups = self.scale.shape[1]
        grouped = self.codes.float().view(len(self.codes), groups, -1)
        return (grouped * self.scale.float().unsqueeze(-1)).flatten(1)


def to_int8(weight: Tensor, group_size: int, dtype: torch.dtype) -> Int8Weight:
    """Quantize a weight to int8, each group by its largest entry; no entry is off by more than half a step.

    Args:
        weight: `[out, in]`, any floating dtype.
        group_size: columns per scale; divides `in`.
        dtype: of the scale, bfloat16 or float16.

    Raises:
        ValueError: the group size does not divide the columns.
    """
    out_features, in_features = weight.shape
    if in_features % group_size:
        raise ValueError(f"groups of {group_size} do not divide {in_features} columns")
    grouped = weight.float().view(out_features, -1, group_size)
    return on_grid(weight, grouped.abs().amax(-1) / LIMIT, dtype)


def on_grid(weight: Tensor, step: Tensor, dtype: torch.dtype) -> Int8Weight:
    """A weight in steps of a given size; one that is made of at most 127 such steps is kept as it is.

    The step is rounded to `dtype` before the codes are taken, so its rounding costs little. Where the largest entry
    would then be clipped, which happens to float16's smallest numbers, it is rounded up instead.

    Args:
        weight: `[out, in]`, any floating dtype.
        step: of each group, float32 `[out, groups]`; may be negative.
        dtype: of the scale, bfloat16 or float16.
    """
    grouped = weight.float().view(*step.shape, -1)
    scale = step.to(dtype)
    clips = (LIMIT + 0.5) * scale.float().abs() < grouped.abs().amax(-1)
    # the next number away from zero is the next integer of the same bits
    scale = (scale.view(torch.int16) + clips.to(torch.int16)).view(dtype)
    # a group of zeros has the scale 0 and keeps the code 0
    divisor = torch.where(scale == 0, torch.inf, scale).float().unsqueeze(-1)
    codes = (grouped / divisor).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)
    return Int8Weight(codes.flatten(1), scale)


def pack_int8(codes: Tensor) -> Tensor:
    """int32 `[out, in / 4]` from int8 codes `[out, in]`.

    Raises:
        ValueError: the columns do not fill whole words.
    """
    if codes.shape[1] % 4:
        raise ValueError(f"{codes.shape[1]} columns do not fill words of 4 codes")
    stored = (codes.to(torch.int16) + _OFFSET).to(torch.uint8)
    return stored.contiguous().view(torch.int32)  # little-endian: the first code has the lowest bits


def kernel_group_size(preferred: int, in_features: int, ranks: int) -> int | None:
    """Columns per scale that the kernels take and that no border between ranks cuts.

    Args:
        preferred: columns per scale of what is to be represented; the result divides it or at least is no larger, if
            one such is possible.
        in_features: columns of the weight.
        ranks: among which the columns may be divided.

    Returns:
        128, 64 or 32, which Marlin takes (Machete takes the first two); None if none divides the columns.
    """
    fitting = [size for size in (128, 64, 32) if in_features % (size * ranks) == 0]
    dividing = [size for size in fitting if preferred % size == 0]
    no_larger = [size for size in fitting if size <= preferred]
    return next(iter(dividing or no_larger or fitting[-1:]), None)
