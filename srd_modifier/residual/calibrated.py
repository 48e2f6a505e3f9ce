"""Residuals and W4 codes that are chosen by what they do to the layer's output, not to the weight.

`encode_calibrated` is `codec.encode` with a `Hessian`: the residual of a quantizer that compensated its errors (GPTQ)
is a web of compensations too, and rounding it on its own tears that web. `quantize_base` is a W4 quantizer with the
same means, which knows that a residual will follow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError
from srd_modifier.residual.codec import EncodedResidual, encode, from_levels, row_blocks
from srd_modifier.residual.feedback import Grid, ScaleFit, descend, group_sums, round_with_feedback
from srd_modifier.residual.format import WHOLE_ROW, ResidualFormat
from srd_modifier.residual.hessian import Hessian
from srd_modifier.residual.levels import as_divisor, level_offset, level_range
from srd_modifier.residual.packing import unpack

DEFAULT_BALANCE = 0.6

# entries that are worked on at once; rows do not depend on one another
_BLOCK_ENTRIES = 2**23

# up to this width a residual is shrunk first where the layer's inputs hardly see it
_SHRUNK_BITS = 3

_LEAST_CODE, _MOST_CODE = -8, 7

# scales that are tried, and the least of them at balance 0 as a share of the covering one
_SCALE_CANDIDATES = 24
_LEAST_SCALE = 0.9


class QuantizedBase(NamedTuple):
    """W4 codes and scales: `weight ~ (codes - zero_point) * scale`.

    Attributes:
        codes: int8 `[out, in]`, -8 to 7.
        scale: `[out, groups]`, in the dtype that was asked for. Negative in a symmetric group whose extreme is
            positive: of the sixteen codes the one that stands alone, -8, is then on the extreme's side.
        zero_point: int8 `[out, groups]`, or None if symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self, group_size: int) -> Tensor:
        """Float32 `[out, in]`."""
        columns = self.codes.shape[1] if group_size == WHOLE_ROW else group_size
        levels = self.codes.float()
        if self.zero_point is not None:
            levels -= self.zero_point.float().repeat_interleave(columns, dim=1)
        return levels * self.scale.float().repeat_interleave(columns, dim=1)


def encode_calibrated(residual: Tensor, formats: Sequence[ResidualFormat], hessian: Hessian) -> list[EncodedResidual]:
    """Encode a residual in each of several formats, with error feedback under the layer's Hessian.

    The scales are searched per group for the least error, weighted by what a column's error costs once the columns
    after it made good for it; then codes by feedback and all scales of a row refitted jointly, in turn. Residuals of
    3 bits and fewer are first shrunk where the layer's inputs hardly see them. A sparse residual keeps the entries
    whose loss would cost most after compensation (OBS), chosen anew as the feedback goes on, and improves them by
    descent.

    Formats with the same groups are worked on together: the loop over the columns is the same for all.

    Args:
        residual: float `[out, in]`, against the dequantized W4.
        formats: rounding `feedback`.
        hessian: of the layer's inputs, on the residual's device.

    Raises:
        ValueError: the residual is not finite or does not fit the Hessian, or a format's rounding is another.
    """
    if any(fmt.rounding != "feedback" for fmt in formats):
        raise ValueError("encode_calibrated() is for formats of rounding 'feedback'; encode() does the others")
    residual = residual.float()
    if residual.dim() != 2 or residual.shape[1] != hessian.in_features:
        raise ValueError(f"expected a residual [out, {hessian.in_features}], got shape {tuple(residual.shape)}")
    shrunk = hessian.shrink(residual) if any(fmt.bits <= _SHRUNK_BITS for fmt in formats) else residual
    encoded: dict[int, EncodedResidual] = {}
    for members in _together(formats, residual.shape[1]):
        results = _encode_batch(residual, shrunk, [formats[i] for i in members], hessian)
        encoded |= zip(members, results, strict=True)
    return [encoded[i] for i in range(len(formats))]


def quantize_base(
    weight: Tensor,
    hessian: Hessian,
    *,
    group_size: int,
    balance: float = DEFAULT_BALANCE,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedBase:
    """Quantize a weight to W4 with error feedback, scales refitted jointly and codes improved by descent.

    Compensation moves codes away from the weight they stand for: W4 alone gets better by it, and the residual that it
    leaves gets larger. `balance` says how far they may go: `0.5 / balance` steps, and how far a group's scale
    may fall below the one that covers its extremes. At 0 the codes are the best for W4 alone; at 1 every code is the
    nearest one, and the residual as small as it can be.

    Args:
        weight: float `[out, in]`.
        hessian: of the layer's inputs, on the weight's device.
        group_size: columns per scale, a divisor of `in`, or `WHOLE_ROW`.
        balance: 0 to 1.
        symmetric: without zero points.
        scale_dtype: of the stored scales; the codes are chosen for the rounded ones.

    Raises:
        ConfigError: balance is not a number from 0 to 1.
        ValueError: the weight is not finite, or does not fit Hessian or groups.
    """
    check_balance(balance)
    weight = weight.float()
    columns = hessian.in_features if group_size == WHOLE_ROW else group_size
    fits = weight.dim() == 2 and weight.shape[1] == hessian.in_features
    if not fits or columns < 1 or weight.shape[1] % columns:
        raise ValueError(
            f"expected a weight [out, {hessian.in_features}] whose columns groups of {group_size} divide, got shape "
            f"{tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has NaN or infinite entries")
    blocks = [
        _quantize_rows(weight[rows], hessian, columns, balance, symmetric, scale_dtype)
        for rows in row_blocks(*weight.shape, entries=_BLOCK_ENTRIES)
    ]
    zero_point = (
        None if symmetric else torch.cat([block.zero_point for block in blocks if block.zero_point is not None])
    )
    return QuantizedBase(
        torch.cat([block.codes for block in blocks]), torch.cat([block.scale for block in blocks]), zero_point
    )


def check_balance(balance: float) -> None:
    """Raise ConfigError unless it is a number from 0 to 1."""
    if isinstance(balance, bool) or not isinstance(balance, int | float) or not 0.0 <= balance <= 1.0:
        raise ConfigError(f"balance is {balance!r}, expected a number from 0 (best W4) to 1 (best with the residual)")


class _Round(NamedTuple):
    """One turn of choosing codes before the scales are refitted."""

    feedback: bool
    sweeps: int


_BASE_ROUNDS = (_Round(True, 0), _Round(True, 0), _Round(True, 2), _Round(False, 2), _Round(False, 2))
_RESIDUAL_ROUNDS = (_Round(True, 0), _Round(True, 0))
# Feedback counts on the columns behind to make good for an error, and most of a sparse residual's are dropped: on a
# base that compensated it can lose more than no residual. Descent knows which entries are there.
_SPARSE_ROUNDS = (_Round(True, 0), _Round(True, 2), _Round(False, 2), _Round(False, 2))


class _Found(NamedTuple):
    """The best codes and scales so far; all `[in, rows]` or `[groups, rows]`, the loss `[rows]`."""

    levels: Tensor
    scale: Tensor
    keep: Tensor | None
    loss: Tensor

    def better(self, other: "_Found") -> "_Found":
        """Row by row the one with the least loss; `other` where they are alike."""
        wins = self.loss < other.loss
        if self.keep is not None and other.keep is not None:
            # the entries that are kept are counted over all rows, which therefore cannot be mixed
            wins = (self.loss.sum() < other.loss.sum()).expand_as(wins)
            keep = torch.where(wins, self.keep, other.keep)
        else:
            keep = None
        return _Found(
            torch.where(wins, self.levels, other.levels),
            torch.where(wins, self.scale, other.scale),
            keep,
            torch.where(wins, self.loss, other.loss),
        )


def _search(
    target: Tensor,
    scale: Tensor,
    groups: Tensor,
    grid_of: Callable[[Tensor], Grid],
    hessian: Hessian,
    schedule: Sequence[_Round],
    *,
    scale_dtype: torch.dtype,
    least_scale: Tensor | None = None,
    keep: Tensor | None = None,
) -> _Found:
    """Codes and scales in turn, from scales that are a good start.

    Args:
        target: float32 `[in, rows]`.
        scale: float32 `[groups, rows]`, representable in `scale_dtype`.
        groups: int64 `[in]`.
        grid_of: the levels that may be taken with some scales.
        hessian: of the layer.
        schedule: the rounds.
        scale_dtype: of the stored scales.
        least_scale: `[groups, rows]`, a refitted scale that is smaller in size is not taken.
        keep: plan of a sparse residual, bool `[in, rows]`.
    """
    product = hessian.regularized @ target
    best: _Found | None = None
    levels, kept = torch.zeros_like(target), keep
    grid = grid_of(scale)
    for feedback, sweeps in schedule:
        if feedback:
            levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=keep)
        if sweeps:
            levels = descend(target, levels, scale, groups, grid, hessian, sweeps=sweeps, keep=kept)
        fit = ScaleFit.of(target, product, levels, groups, hessian)
        found = _Found(levels, scale, kept, fit.loss(scale))
        best = found if best is None else found.better(best)
        fitted = fit.solve(scale).to(scale_dtype).float()
        if least_scale is not None:
            fitted = torch.where(fitted.abs() < least_scale, scale, fitted)
        grid = grid_of(fitted)
        admissible = torch.where(_within(levels, grid, groups, len(scale)), fitted, scale)
        best = _Found(levels, admissible, kept, fit.loss(admissible)).better(best)
        scale = fitted
    assert best is not None
    return best


def _within(levels: Tensor, grid: Grid, groups: Tensor, count: int) -> Tensor:
    """Bool `[groups, rows]`: whether all levels of a group are ones that the grid has."""
    outside = ((levels < grid.low) | (levels > grid.high)).to(levels.dtype)
    return group_sums(outside, groups, count).T == 0


def _together(formats: Sequence[ResidualFormat], in_features: int) -> list[list[int]]:
    """Positions of the formats that can share a loop: same groups and scales, and dense."""
    batches: dict[object, list[int]] = {}
    for i, fmt in enumerate(formats):
        key = i if fmt.sparse else (fmt.columns_per_group(in_features), fmt.scale_dtype)
        batches.setdefault(key, []).append(i)
    return list(batches.values())


def _encode_batch(
    residual: Tensor, shrunk: Tensor, formats: Sequence[ResidualFormat], hessian: Hessian
) -> list[EncodedResidual]:
    """One residual in formats that share their groups, stacked row over row."""
    rows, in_features = residual.shape
    cost = hessian.column_cost()
    targets = [shrunk if fmt.bits <= _SHRUNK_BITS else residual for fmt in formats]
    starts = [
        encode(target, replace(fmt, rounding="nearest"), importance=cost)
        for target, fmt in zip(targets, formats, strict=True)
    ]
    target, scale = torch.cat(targets), torch.cat([start.scale.float() for start in starts])
    mask = starts[0].mask
    plan = None if mask is None else unpack(mask, 1, in_features).bool()

    def per_row(values: list[float]) -> Tensor:
        return torch.tensor(values, device=residual.device).repeat_interleave(rows).unsqueeze(0)

    offset = per_row([level_offset(fmt.bits) for fmt in formats])
    low = per_row([level_range(fmt.bits)[0] for fmt in formats])
    high = per_row([level_range(fmt.bits)[1] for fmt in formats])
    groups = _groups(in_features, formats[0].columns_per_group(in_features), residual.device)

    def search(block: slice) -> _Found:
        grid = Grid(offset[:, block], low[:, block], high[:, block])
        return _search(
            _transposed(target[block]),
            _transposed(scale[block]),
            groups,
            lambda _: grid,
            hessian,
            _RESIDUAL_ROUNDS if plan is None else _SPARSE_ROUNDS,
            scale_dtype=formats[0].torch_scale_dtype,
            keep=None if plan is None else _transposed(plan[block]),
        )

    found = [search(block) for block in row_blocks(*target.shape, entries=_BLOCK_ENTRIES)]
    levels = torch.cat([one.levels for one in found], dim=1).T.split(rows)
    scales = torch.cat([one.scale for one in found], dim=1).T.to(formats[0].torch_scale_dtype).split(rows)
    keep = None if plan is None else torch.cat([one.keep for one in found if one.keep is not None], dim=1).T
    return [
        from_levels(one, own.contiguous(), fmt, keep) for one, own, fmt in zip(levels, scales, formats, strict=True)
    ]


def _quantize_rows(
    weight: Tensor, hessian: Hessian, columns: int, balance: float, symmetric: bool, scale_dtype: torch.dtype
) -> QuantizedBase:
    """Some rows of `quantize_base`; `columns` share a scale."""
    rows, in_features = weight.shape
    groups = _groups(in_features, columns, weight.device)
    grouped = weight.reshape(rows, -1, columns)
    least_fraction = _LEAST_SCALE + (1 - _LEAST_SCALE) * balance
    cover = _symmetric_cover if symmetric else _asymmetric_cover
    full_scale, full_zero = cover(grouped)
    cost = hessian.column_cost().view(1, -1, columns)
    scale, zero_point = _search_base_scale(grouped, full_scale, full_zero, cost, least_fraction, symmetric, scale_dtype)
    shift = torch.zeros(1, rows, device=weight.device) if zero_point is None else _transposed(zero_point)[groups]
    least, most = _LEAST_CODE - shift, _MOST_CODE - shift
    target = _transposed(weight)
    reach = 0.5 / balance if balance > 0 else math.inf

    def grid_of(scale: Tensor) -> Grid:
        if math.isinf(reach):
            return Grid(torch.zeros(1, rows, device=weight.device), least, most)
        steps = target / as_divisor(scale)[groups]
        low = (steps - reach).ceil_().clamp_(least, most)
        high = (steps + reach).floor_().clamp_(least, most)
        return Grid(torch.zeros(1, rows, device=weight.device), low, torch.maximum(low, high))

    found = _search(
        target,
        _transposed(scale),
        groups,
        grid_of,
        hessian,
        _BASE_ROUNDS,
        scale_dtype=scale_dtype,
        least_scale=_transposed(full_scale.abs() * least_fraction),
    )
    return QuantizedBase(
        (found.levels + shift).T.to(torch.int8).contiguous(),
        found.scale.T.to(scale_dtype).contiguous(),
        None if zero_point is None else zero_point.to(torch.int8),
    )


def _symmetric_cover(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The least scale `[rows, groups]` with which every entry is within half a step of a code, and no zero point.

    It is negative where the extreme is positive: there is one code more below zero than above.
    """
    high, low = grouped.amax(dim=-1).clamp(min=0), grouped.amin(dim=-1).clamp(max=0)
    flipped = high > -low
    larger, smaller = torch.where(flipped, high, -low), torch.where(flipped, -low, high)
    scale = torch.maximum(larger / (0.5 - _LEAST_CODE), smaller / (_MOST_CODE + 0.5))
    return torch.where(flipped, -scale, scale), torch.zeros_like(scale)


def _asymmetric_cover(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The scale `[rows, groups]` that reaches from the least to the greatest entry, 0 included, and the least entry."""
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    return (high - low) / (_MOST_CODE - _LEAST_CODE), low


def _search_base_scale(
    grouped: Tensor,
    full_scale: Tensor,
    low: Tensor,
    cost: Tensor,
    least_fraction: float,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Per group the scale, and zero point, with the least error of nearest rounding, weighted by `cost`.

    Args:
        grouped: `[rows, groups, columns]`.
        full_scale: `[rows, groups]`, that covers the group.
        low: least entry of the groups, for the zero point.
        cost: of a squared error, `[1, groups, columns]`.
        least_fraction: of the covering scale.
        symmetric: without zero points.
        dtype: of the stored scale.
    """
    best_error = torch.full_like(full_scale, torch.inf)
    best_scale, best_zero = torch.zeros_like(full_scale), torch.zeros_like(full_scale)
    for fraction in torch.linspace(least_fraction, 1.0, _SCALE_CANDIDATES).tolist():
        scale = (full_scale * fraction).to(dtype).float()
        divisor = as_divisor(scale)
        zero = torch.zeros_like(scale)
        if not symmetric:
            zero = (_LEAST_CODE - low * fraction / divisor).round_().clamp_(_LEAST_CODE, _MOST_CODE)
        codes = (grouped / divisor.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(_LEAST_CODE, _MOST_CODE)
        error = codes.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(grouped).square_().mul_(cost).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, None if symmetric else best_zero


def _groups(in_features: int, columns: int, device: torch.device) -> Tensor:
    """Int64 `[in]`: the group of each column."""
    return torch.arange(in_features, device=device) // columns


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()
