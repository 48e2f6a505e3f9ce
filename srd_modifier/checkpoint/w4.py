"""The int4 weights of compressed-tensors' `pack-quantized` format, in float32.

Eight codes fill an int32 along a row, the first in the lowest bits, each stored as code + 8. Zero points are packed
the same way down the columns. The float32 product of code and scale is exact (4 bits times at most 11), so rounding
it to the model's dtype gives bit for bit what every other loader computes.
"""

from torch import Tensor, int32, stack, uint8

_OFFSET = 8  # of a signed 4-bit code as stored
_BLOCK_ENTRIES = 2**20


def dequantize_w4(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int) -> Tensor:
    """The weight `[out, in]` in float32, on the packed codes' device.

    Args:
        packed: int32 `[out, ceil(in / 8)]`.
        scale: any floating dtype, `[out, groups]`; one group is one scale per row.
        zero_point: of `unpack_zero_points`, `[out, groups]`, or None when symmetric.
        in_features: columns of the weight.

    Raises:
        ValueError: the scales do not divide the columns.
    """
    out_features, groups = len(packed), scale.shape[1]
    if in_features % groups:
        raise ValueError(f"{groups} scales per row do not divide {in_features} columns")
    weight = packed.new_empty((out_features, in_features), dtype=scale.float().dtype)
    block = max(1, _BLOCK_ENTRIES // in_features)
    for start in range(0, out_features, block):
        rows = slice(start, start + block)
        # one pass over the codes while they are in the cache
        codes = _nibbles(packed[rows], in_features).float().sub_(_OFFSET).view(-1, groups, in_features // groups)
        if zero_point is not None:
            codes -= zero_point[rows].unsqueeze(-1)
        weight[rows] = codes.mul_(scale[rows].float().unsqueeze(-1)).view(-1, in_features)
    return weight


def unpack_zero_points(packed: Tensor | None, out_features: int) -> Tensor | None:
    """Zero points float32 `[out, groups]` from int32 `[ceil(out / 8), groups]`; None stays None."""
    return None if packed is None else _nibbles(packed.t(), out_features).t().float().sub_(_OFFSET)


def _nibbles(packed: Tensor, columns: int) -> Tensor:
    """The unsigned 4-bit values of int32 `[rows, words]`: uint8 `[rows, columns]`."""
    if packed.dtype != int32:
        raise ValueError(f"expected packed codes as int32, got {packed.dtype}")
    pairs = packed.contiguous().view(uint8)
    return stack((pairs & 15, pairs >> 4), dim=-1).view(len(packed), -1)[:, :columns]
