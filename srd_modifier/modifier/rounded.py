"""The residual of a weight that was rounded without data, a block of rows at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points
from srd_modifier.residual import EncodedResidual, ResidualFormat, concatenate_rows, encode

_BLOCK_ENTRIES = 2**21


def encode_rounded(
    original: Tensor, packed: Mapping[str, Tensor], fmt: ResidualFormat, *, key: str, importance: Tensor | None = None
) -> EncodedResidual:
    """Encode what packing a weight has lost.

    Args:
        original: `[out, in]`, any floating dtype.
        packed: `weight_packed`, `weight_scale` and, where asymmetric, `weight_zero_point`, as they are stored.
        fmt: of the residual.
        key: the module's name.
        importance: mean squared input, float32 `[in]`, where there were inputs.

    Raises:
        ValueError: the residual is not finite.
    """
    out_features, in_features = original.shape
    # a block of rows at a time while it is in the cache, where the format allows it
    block = max(1, _BLOCK_ENTRIES // in_features) if fmt.rows_are_independent else out_features
    zero_points = unpack_zero_points(packed.get("weight_zero_point"), out_features)
    encoded = []
    for start in range(0, out_features, block):
        rows = slice(start, start + block)
        base = dequantize_w4(
            packed["weight_packed"][rows],
            packed["weight_scale"][rows],
            None if zero_points is None else zero_points[rows],
            in_features,
        )
        residual = torch.sub(original[rows].float(), base, out=base)
        encoded.append(encode(residual, fmt, key=key, importance=importance))
    return encoded[0] if len(encoded) == 1 else concatenate_rows(encoded)
