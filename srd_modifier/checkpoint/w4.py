"""The int4 weights of compressed-tensors' `pack-quantized` format, in float32.

Eight codes fill an int32 along a row, the first in the lowest bits, each stored as code + 8. Zero points are packed
the same way down the columns. The float32 product of code and scale is exact (4 bits times at most 11), so rounding
it to the model's dtype gives bit for bit what every other loader computes.
"""

from torch import Tensor, contiguous_format, float32, int16, int32, mul, uint8

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
    weight = packed.new_empty((out_features, in_features), dtype=float32)
    grouped = weight.view(out_features, groups, in_features // groups)
    block = max(1, _BLOCK_ENTRIES // in_features)
    for start in range(0, out_features, block):
        rows = slice(start, start + block)
        # a few passes over the codes while they are in the cache
        codes = _nibbles(packed[rows], in_features).float().sub_(_OFFSET).view_as(grouped[rows])
        if zero_point is not None:
            codes -= zero_point[rows].unsqueeze(-1)
        mul(codes, scale[rows].float().unsqueeze(-1), out=grouped[rows])
    return weight


def unpack_zero_points(packed: Tensor | None, out_features: int) -> Tensor | None:
    """Zero points float32 `[out, groups]` from int32 `[ceil(out / 8), groups]`; None stays None."""
    return None if packed is None else _nibbles(packed.t(), out_features).t().float().sub_(_OFFSET)


def _nibbles(packed: Tensor, columns: int) -> Tensor:
    """The unsigned 4-bit values of int32 `[rows, words]`: uint8 `[rows, columns]`."""
    if packed.dtype != int32:
        raise ValueError(f"expected packed codes as int32, got {packed.dtype}")
    # a byte holds two values: spread each to its own byte, first the lower four bits, then the upper
    if packed.stride(-1) != 1:
        packed = packed.clone(memory_format=contiguous_format)
    pairs = packed.view(uint8).to(int16)
    spread = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)
    return spread.view(uint8)[:, :columns]
