"""Encode a residual to integer codes and group scales, and decode it again.

    R ~ levels * scale,   one scale per output row and group of columns

The levels are the codes themselves at 8 bits and the codes + 1/2 below (`levels`). The scale is `absmax` over the
highest level, rounded up to its dtype so that no entry is ever clipped. Below 8 bits nearest rounding searches
each group's scale for the least squared error instead, because with so few levels a clipped extreme is often worth
a finer step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from srd_modifier.residual.format import ResidualFormat
from srd_modifier.residual.levels import as_divisor, code_range, level_offset, level_range, nearest_levels
from srd_modifier.residual.packing import pack, unpack
from srd_modifier.residual.rounding import round_, uniform_noise

# scales that the search tries besides the covering one, and the least of them as a share of it; what lies beneath,
# the least squares after them reach
_SEARCH_CANDIDATES = 20
_SEARCH_LEAST = 0.1

_BLOCK_ENTRIES = 2**20


class EncodedResidual(NamedTuple):
    """A residual as it is stored; shapes and dtypes are `ResidualFormat.layout`'s.

    Attributes:
        codes: int8 `[out, in]`, or packed uint8.
        scale: bfloat16 or float32 `[out, ceil(in / group_size)]`, not negative.
        mask: uint8 `[out, ceil(in / 8)]` of the kept entries, or None when all are kept.
    """

    codes: Tensor
    scale: Tensor
    mask: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their suffix in the sidecar."""
        named = {"weight_d8": self.codes, "weight_d8_scale": self.scale}
        return named if self.mask is None else {**named, "weight_d8_mask": self.mask}


def encode(
    residual: Tensor, fmt: ResidualFormat, *, key: str = "", importance: Tensor | None = None
) -> EncodedResidual:
    """Quantize a residual.

    Args:
        residual: `[out, in]`, any floating dtype; computed in float32 on its own device.
        fmt: width, group size, rounding (not `feedback`), density, scale dtype, seed.
        key: the module's name; it selects the noise of `stochastic` and `dithered`.
        importance: `[in]`, mean squared input of each column. Weighs the errors in the scale search and in
            the choice of the entries to keep.

    Returns:
        Codes, scales and mask on the residual's device.

    Raises:
        ValueError: the residual is not a matrix or not finite, or the rounding is `feedback`.
    """
    if fmt.rounding == "feedback":
        raise ValueError(
            "rounding 'feedback' needs the Hessian of the layer's inputs, which encode() does not have; "
            "encode_calibrated() does it"
        )
    if residual.dim() != 2 or residual.numel() == 0:
        raise ValueError(f"expected a residual [out_features, in_features], got shape {tuple(residual.shape)}")
    out_features, in_features = residual.shape
    residual = residual.float()
    weight = None if importance is None else _checked_importance(importance, in_features).to(residual)
    if weight is not None and not bool(weight.any()):
        weight = None  # an expert that no calibration token reached: no column is known to matter more
    keep = None
    if fmt.sparse:
        keep = _most_important(residual, fmt.kept(out_features, in_features), weight)
        residual = residual * keep

    noise = None
    if fmt.rounding != "nearest":
        noise = uniform_noise((out_features, in_features), fmt.seed, key, residual.device)
    blocks = [
        _encode_rows(
            residual[rows],
            fmt,
            None if noise is None else noise[rows],
            weight,
            None if keep is None else keep[rows],
        )
        for rows in row_blocks(out_features, in_features)
    ]
    return _encoded(torch.cat([block for block, _ in blocks]), torch.cat([block for _, block in blocks]), fmt, keep)


def from_levels(levels: Tensor, scale: Tensor, fmt: ResidualFormat, keep: Tensor | None = None) -> EncodedResidual:
    """Store levels that were chosen elsewhere.

    Args:
        levels: float `[out, in]`, levels of `fmt.bits` in units of the scale (`levels.nearest_levels`). Of a
            dithered residual these are the ones before the noise is taken off again, which `decode` does.
        scale: `fmt.torch_scale_dtype` `[out, groups]`, not negative.
        fmt: width, density and scale dtype count.
        keep: bool `[out, in]` with `fmt.kept(out, in)` entries that are True, the others are dropped; None when
            all are kept.

    Raises:
        ValueError: the scale's shape or dtype, or the number of kept entries, is not the format's.
    """
    out_features, in_features = levels.shape
    expected = (out_features, fmt.groups(in_features))
    if scale.dtype != fmt.torch_scale_dtype or scale.shape != expected:
        raise ValueError(f"expected a scale {fmt.torch_scale_dtype} {expected}, got {scale.dtype} {tuple(scale.shape)}")
    count = levels.numel() if keep is None else int(keep.sum())
    if (keep is None) == fmt.sparse or count != fmt.kept(out_features, in_features):
        raise ValueError(f"expected {fmt.kept(out_features, in_features)} entries to keep, got {count}")
    return _encoded((levels - level_offset(fmt.bits)).to(torch.int8), scale, fmt, keep)


def _encoded(codes: Tensor, scale: Tensor, fmt: ResidualFormat, keep: Tensor | None) -> EncodedResidual:
    """Codes int8 `[out, in]`, scales `[out, groups]` and the kept entries bool `[out, in]`, as they are stored."""
    if keep is None:
        return EncodedResidual(_store(codes, fmt.bits), scale)
    return EncodedResidual(_store(codes[keep].unsqueeze(0), fmt.bits), scale, pack(keep.to(torch.uint8), 1))


def _encode_rows(
    residual: Tensor, fmt: ResidualFormat, noise: Tensor | None, importance: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes int8 `[rows, in]` and scales `[rows, groups]` of some rows of a residual."""
    rows, in_features = residual.shape
    grouped = _grouped(residual, fmt)
    absmax = grouped.abs().amax(dim=-1)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("the residual has NaN or infinite entries")
    if fmt.bits == 8 or noise is not None:
        scale = _covering_scale(absmax, fmt)
    else:
        scale = _searched_scale(grouped, absmax, fmt, _error_weight(residual, fmt, importance, keep))
    steps = _divide(grouped, scale)
    if noise is not None:
        noise = _grouped(noise, fmt)
    if fmt.bits == 8:
        codes = round_(steps, fmt.rounding, noise)
    else:
        # The nearest half-integer is `floor(x) + 1/2`, so the code is the floor. Between half-integers stochastic
        # rounding and dither are both `floor(x + u)`; dither takes the noise off again on decoding.
        codes = (steps if noise is None else steps.add_(noise)).floor_()
    return codes.clamp_(*code_range(fmt.bits)).to(torch.int8).reshape(rows, -1)[:, :in_features], scale


def concatenate_rows(parts: Sequence[EncodedResidual]) -> EncodedResidual:
    """Residuals of consecutive rows, each encoded on its own, as one; for formats whose rows are independent."""
    return EncodedResidual(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))


def decode(encoded: EncodedResidual, fmt: ResidualFormat, *, in_features: int, key: str = "") -> Tensor:
    """The residual that `encode` stored: float32 `[out, in]`, on the codes' device.

    Args:
        encoded: codes, scales and mask.
        fmt: the settings it was encoded with.
        in_features: columns of the weight; packed codes do not know it.
        key: the module's name, for `dithered` codes.
    """
    zeros = torch.zeros(encoded.scale.shape[0], in_features, device=encoded.codes.device)
    return add_decoded_(zeros, encoded, fmt, key=key)


def add_decoded_(
    weight: Tensor, encoded: EncodedResidual, fmt: ResidualFormat, *, key: str = "", alpha: float = 1.0
) -> Tensor:
    """Add `alpha` times the decoded residual to `weight`, float32 `[out, in]`, in place."""
    if alpha == 0.0:
        return weight  # adding zero would turn -0.0 into 0.0
    out_features, in_features = weight.shape
    noise = None
    if fmt.rounding == "dithered":
        noise = uniform_noise((out_features, in_features), fmt.seed, key, weight.device)
    columns = fmt.columns_per_group(in_features)
    keep = None if encoded.mask is None else unpack(encoded.mask, 1, in_features).bool()
    codes = _load(encoded.codes, fmt, out_features, in_features, keep)
    offset = level_offset(fmt.bits)
    for rows in row_blocks(out_features, in_features):
        steps = codes[rows].to(torch.float32)
        if offset:
            steps += offset
        if noise is not None:
            steps -= noise[rows]
        if keep is not None and (offset or noise is not None):
            steps *= keep[rows]
        scale = encoded.scale[rows].float()
        if in_features % columns == 0:
            shape = (len(steps), -1, columns)
            weight[rows].view(shape).addcmul_(steps.view(shape), scale.unsqueeze(-1), value=alpha)
        else:
            weight[rows].addcmul_(steps, scale.repeat_interleave(columns, dim=1)[:, :in_features], value=alpha)
    return weight


def row_blocks(out_features: int, in_features: int, *, entries: int = _BLOCK_ENTRIES) -> Iterator[slice]:
    """Slices of rows of so many entries; of a million the temporaries of a large weight stay in the cache."""
    rows = max(1, entries // in_features)
    return (slice(start, start + rows) for start in range(0, out_features, rows))


def _grouped(matrix: Tensor, fmt: ResidualFormat) -> Tensor:
    """`[rows, in]` as `[rows, groups, columns]`, the last group padded with zeros."""
    columns = fmt.columns_per_group(matrix.shape[1])
    missing = -matrix.shape[1] % columns
    return (pad(matrix, (0, missing)) if missing else matrix).reshape(len(matrix), -1, columns)


def _store(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 `[rows, n]` as stored: int8, or two's complement of `bits` bits packed into bytes."""
    if bits == 8:
        return codes.contiguous()
    return pack((codes & (2**bits - 1)).view(torch.uint8), bits)


def _load(stored: Tensor, fmt: ResidualFormat, out_features: int, in_features: int, keep: Tensor | None) -> Tensor:
    """Codes int8 `[out, in]` from the stored ones; 0 where `keep`, bool `[out, in]`, is False."""
    rows, columns = (out_features, in_features) if keep is None else (1, int(keep.sum()))
    if fmt.bits == 8:
        codes = stored
    else:
        sign = 2 ** (fmt.bits - 1)
        codes = (unpack(stored, fmt.bits, columns) ^ sign).view(torch.int8) - sign
    if keep is None:
        return codes.view(rows, columns)
    dense = torch.zeros(out_features, in_features, dtype=torch.int8, device=codes.device)
    return dense.masked_scatter_(keep, codes.reshape(-1))


def _divide(grouped: Tensor, scale: Tensor) -> Tensor:
    """`grouped` in steps of its scale; a group whose scale is 0 becomes 0."""
    return grouped / as_divisor(scale.float()).unsqueeze(-1)


def _covering_scale(absmax: Tensor, fmt: ResidualFormat) -> Tensor:
    """The least representable scale with which nothing is clipped; that keeps the noisy roundings unbiased."""
    _, high = level_range(fmt.bits)
    if fmt.bits == 8 and fmt.rounding == "dithered":
        # Dither moves a value by up to half a step before it is rounded. The half-integers have the room for it: what
        # lies half a step beyond the highest level still floors to its code.
        high -= 0.5
    return _round_away(absmax / high, fmt.torch_scale_dtype)


def _error_weight(
    residual: Tensor, fmt: ResidualFormat, importance: Tensor | None, keep: Tensor | None
) -> Tensor | None:
    """What an entry's squared error counts in the search, `[rows or 1, groups, columns]`; None when all are alike.

    No level is 0, so what is not stored has to be left out: dropped entries, and the padding of the last group.
    """
    stored = None
    if keep is not None:
        stored = _grouped(keep.float(), fmt)
    elif residual.shape[1] % fmt.columns_per_group(residual.shape[1]):
        stored = _grouped(torch.ones_like(residual[:1]), fmt)
    if importance is None:
        return stored
    weight = _grouped(importance.unsqueeze(0), fmt)
    if stored is not None:
        weight = weight * stored
    # where no column of a group saw an input, none is known to matter more
    return torch.where(weight.sum(-1, keepdim=True) == 0, 1.0 if stored is None else stored, weight)


def _searched_scale(grouped: Tensor, absmax: Tensor, fmt: ResidualFormat, weight: Tensor | None) -> Tensor:
    """Per group, the scale with the least squared error, weighted by `_error_weight`.

    Candidates first; then, for the levels that the best of them gives, the scale of least squares. At 1 bit that
    is the optimum, twice the mean size of the entries: the levels are their signs, whatever the scale.

    6-bit codes have their best scale within a few hundredths of the covering one and an error that changes with
    every hundredth; 2-bit codes have it anywhere. So candidates are dense at the top and wide apart below.
    """
    # relative to the group's extreme, so that squares neither overflow nor vanish
    unit = _divide(grouped, absmax)
    size = torch.where(absmax == 0, 1.0, absmax)
    best_error = torch.full_like(absmax, torch.inf)
    best_scale = torch.zeros_like(absmax, dtype=fmt.torch_scale_dtype)

    def levels_of(relative: Tensor) -> Tensor:
        return nearest_levels(_divide(unit, relative), fmt.bits)

    def weighted_sum(squares: Tensor) -> Tensor:
        return (squares if weight is None else squares.mul_(weight)).sum(-1)

    def try_scale(scale: Tensor) -> None:
        nonlocal best_error, best_scale
        relative = scale.float() / size
        error = weighted_sum(levels_of(relative).mul_(relative.unsqueeze(-1)).sub_(unit).square_())
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)

    _, high = level_range(fmt.bits)
    fractions = [1.0]
    if fmt.bits > 1:
        # beyond the covering scale too, until the extreme is as far from the next level as from the highest
        most = high / (high - 0.5)
        fractions += (most - (most - _SEARCH_LEAST) * torch.linspace(0, 1, _SEARCH_CANDIDATES).square()).tolist()
    for fraction in fractions:
        try_scale((absmax * (fraction / high)).to(fmt.torch_scale_dtype))
    levels = levels_of(best_scale.float() / size)
    # NaN for a group of which nothing is kept, and never the better one; no other divisor is 0, since no level is
    optimum = weighted_sum(levels * unit) / weighted_sum(levels.square_())
    try_scale((optimum * absmax).to(fmt.torch_scale_dtype))
    return best_scale


def _round_away(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` (float32, not negative) in `dtype`, rounded up."""
    rounded = scale.to(dtype)
    if dtype == torch.float32:
        return rounded
    # the next bfloat16 away from zero is the next integer of the same bits
    return (rounded.view(torch.int16) + (rounded.float() < scale).to(torch.int16)).view(dtype)


def _checked_importance(importance: Tensor, in_features: int) -> Tensor:
    if importance.shape != (in_features,):
        raise ValueError(f"expected an importance [{in_features}], got shape {tuple(importance.shape)}")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("the importance has negative, NaN or infinite entries")
    return importance


def _most_important(residual: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """Bool mask of the `count` entries whose loss would cost most: `R^2`, times the input's mean square if known.

    Equal scores are kept in row-major order, so the choice is the same every time.
    """
    score = residual.abs()  # ordered like its square, which would overflow
    if importance is not None:
        score *= importance.to(score).sqrt()
    flat = score.flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view_as(residual)
