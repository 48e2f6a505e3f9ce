"""GGUF blocks whose codes, scales and mins are chosen by what they do to the layer's output.

ggml's own search weighs each weight's error by the mean square of its input. Here the whole second moment of the inputs
counts: a column's error is made good by the columns after it (GPTQ, Frantar et al. 2022), on the grid that ggml's
search gives to begin with; then all scales and mins of a row are refitted jointly and rounded to what blocks can hold,
and codes are chosen anew, in turn. Type, layout and size stay the same, so that llama.cpp reads the result as it reads
its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srd_modifier.gguf import ggml
from srd_modifier.gguf.blocks import LAYOUTS, BlockLayout, Blocks, unpack
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.residual.codec import row_blocks
from srd_modifier.residual.feedback import Grid, descend, round_with_feedback
from srd_modifier.residual.hessian import Hessian


class Turn(NamedTuple):
    """One choice of codes, before the scales are refitted: by feedback or not, then so many sweeps of descent."""

    feedback: bool
    sweeps: int


THOROUGH = (Turn(True, 0), Turn(True, 0), Turn(True, 2), Turn(False, 2), Turn(False, 2))
QUICK = (Turn(True, 0),)
"""About 8 % more loss than `THOROUGH` in a fifth of the time: enough to compare types."""

# entries of a weight that are worked on at once: the loops over its columns take as long for one row as for many
_BLOCK_ENTRIES = 2**23
_SYSTEM_ENTRIES = 2**23  # the same of its rows' parabolas, which outgrow the weight where rows are long

_SCALE_SWEEPS = 3

# a refitted scale that is further from the old one than this is the least squares running off
_LEAST_RATIO, _MOST_RATIO = 0.3, 3.0

_TINY = torch.finfo(torch.float32).tiny


def quantize_calibrated(
    weight: Tensor, ggml_type: GGMLType, hessian: Hessian, schedule: Sequence[Turn] = THOROUGH
) -> Blocks:
    """Quantize a weight to blocks of least error at the layer's output.

    Args:
        weight: floating point `[out, in]`, on the Hessian's device; `in` is a multiple of the type's block.
        ggml_type: one of `LAYOUTS`.
        hessian: of the layer's inputs.
        schedule: how long to search.

    Raises:
        ValueError: the weight does not fit Hessian or blocks, is not finite, or is too large for the type.
        SRDError, MissingExtraError: see `ggml.quantize`, which gives the grid to begin with.
    """
    weight = weight.float()
    if weight.dim() != 2 or weight.shape[1] != hessian.in_features:
        raise ValueError(f"expected a weight [out, {hessian.in_features}], got shape {tuple(weight.shape)}")
    layout = LAYOUTS[ggml_type]
    importance = hessian.column_cost()
    importance = importance / importance.mean()  # ggml's sums are made for values around 1
    start = unpack(torch.from_numpy(ggml.quantize(weight, ggml_type, importance)), ggml_type)
    start = start.to(weight.device)
    found = [
        _search(weight[rows], start.rows(rows), layout, hessian, schedule)
        for rows in row_blocks(*weight.shape, entries=_BLOCK_ENTRIES)
    ]
    return Blocks.stack(found)


@dataclass(frozen=True)
class _Steps:
    """Scales and mins as blocks hold them, all float32 `[groups, rows]`."""

    block_scale: Tensor
    scale_code: Tensor
    block_min: Tensor
    min_code: Tensor

    @property
    def scale(self) -> Tensor:
        return self.block_scale * self.scale_code

    @property
    def min(self) -> Tensor:
        return self.block_min * self.min_code

    def rows(self, rows: slice) -> "_Steps":
        """Those of some rows."""
        return _Steps(**{name: values[:, rows] for name, values in vars(self).items()})

    @classmethod
    def join(cls, parts: Sequence["_Steps"]) -> "_Steps":
        """Those of all parts' rows."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in vars(parts[0])})

    def parameters(self, layout: BlockLayout) -> Tensor:
        """All scales, then all mins where the type has some: `[rows, parameters]`."""
        return torch.cat([self.scale, self.min]).T if layout.has_min else self.scale.T

    @classmethod
    def of(cls, blocks: Blocks, layout: BlockLayout) -> "_Steps":
        def spread(values: Tensor | None) -> Tensor:
            if values is None:
                return torch.zeros_like(block_scale)
            return values.float().T.repeat_interleave(layout.groups_per_block, dim=0)

        def codes(values: Tensor | None) -> Tensor:
            return torch.ones_like(block_scale) if values is None else values.float().T

        block_scale = blocks.scale.float().T.repeat_interleave(layout.groups_per_block, dim=0)
        return cls(block_scale, codes(blocks.scale_codes), spread(blocks.min), codes(blocks.min_codes))

    def blocks(self, levels: Tensor, layout: BlockLayout) -> Blocks:
        """Together with levels `[in, rows]`."""

        def per_block(values: Tensor) -> Tensor:
            return values[:: layout.groups_per_block].T.half().contiguous()

        def codes(values: Tensor) -> Tensor | None:
            return values.T.to(torch.int16).contiguous() if layout.scale_codes is not None else None

        return Blocks(
            levels.T.to(torch.int8).contiguous(),
            per_block(self.block_scale),
            codes(self.scale_code),
            per_block(self.block_min) if layout.has_min else None,
            codes(self.min_code) if layout.has_min else None,
        )


class _Found(NamedTuple):
    """The best so far: levels `[in, rows]`, steps, and the loss `[rows]`."""

    levels: Tensor
    steps: _Steps
    loss: Tensor

    def better(self, other: "_Found") -> "_Found":
        """Row by row the one with the least loss."""
        wins = self.loss < other.loss
        mine, theirs = vars(self.steps), vars(other.steps)
        return _Found(
            torch.where(wins, self.levels, other.levels),
            _Steps(**{name: torch.where(wins, mine[name], theirs[name]) for name in mine}),
            torch.where(wins, self.loss, other.loss),
        )


def _search(weight: Tensor, start: Blocks, layout: BlockLayout, hessian: Hessian, schedule: Sequence[Turn]) -> Blocks:
    """Codes and steps in turn, for some rows."""
    target = weight.T.contiguous()
    groups = torch.arange(len(target), device=target.device) // layout.group
    bounds = torch.tensor([0.0, layout.low, layout.high], device=target.device).view(3, 1, 1)
    grid = Grid(bounds[0], bounds[1], bounds[2])
    steps = _Steps.of(start, layout)
    levels = start.levels.T.float().contiguous()
    error = _error(target, levels, steps, groups)
    best = _Found(levels, steps, (error * (hessian.regularized @ error)).sum(dim=0))
    for feedback, sweeps in schedule:
        shifted = target + steps.min[groups]
        if feedback:
            levels, _ = round_with_feedback(shifted, steps.scale, groups, grid, hessian)
        if sweeps:
            levels = descend(shifted, levels, steps.scale, groups, grid, hessian, sweeps=sweeps)
        found, fitted = _refitted(target, levels, steps, groups, layout, hessian)
        best = fitted.better(found.better(best))
        steps = fitted.steps
    return best.steps.blocks(best.levels, layout)


def _refitted(
    target: Tensor, levels: Tensor, steps: _Steps, groups: Tensor, layout: BlockLayout, hessian: Hessian
) -> tuple[_Found, _Found]:
    """Levels with the steps that they have, and with those of least loss; some rows after the other."""
    parameters = steps.parameters(layout).shape[1]
    before, after, parts = [], [], []
    for rows in row_blocks(target.shape[1], parameters**2, entries=_SYSTEM_ENTRIES):
        own = steps.rows(rows)
        fit = _Fit.of(target[:, rows], levels[:, rows], own, groups, layout, hessian)
        parts.append(fit.solve(own))
        before.append(fit.constant)
        after.append(fit.loss(parts[-1]))
    return _Found(levels, steps, torch.cat(before)), _Found(levels, _Steps.join(parts), torch.cat(after))


@dataclass(frozen=True)
class _Fit:
    """The loss of every row as a parabola in what is added to its scales s and mins m.

    For additions d to the parameters, all scales and then all mins where the type has some, the loss is
    `constant + 2 slope . d + d^T system d`. A parabola in the parameters themselves would be the same, but with terms
    up to a million times the loss (for Q8_0), of which float32 leaves no more than noise. For levels c, an error e and
    groups j and k, `system_jk` is `c_j^T H_jk c_k` between scales, `-c_j^T H_jk 1` between a scale and a min, and
    `1^T H_jk 1` between mins; `slope` is `c_j^T (H e)_j` and `-1^T (H e)_j`.

    Attributes:
        system: float32 `[rows, parameters, parameters]`.
        slope: float32 `[rows, parameters]`.
        constant: float32 `[rows]`, the loss as it is.
        old: float32 `[rows, parameters]`, what is added to.
        layout: of the blocks.
    """

    system: Tensor
    slope: Tensor
    constant: Tensor
    old: Tensor
    layout: BlockLayout

    @classmethod
    def of(
        cls, target: Tensor, levels: Tensor, steps: _Steps, groups: Tensor, layout: BlockLayout, hessian: Hessian
    ) -> "_Fit":
        """The parabola for levels `[in, rows]` and the error that they leave of a target with these steps."""
        moment = hessian.regularized
        count, rows = len(target) // layout.group, target.shape[1]
        parameters = count * (2 if layout.has_min else 1)
        system = torch.empty(rows, parameters, parameters, device=target.device)
        for group in range(count):
            members = slice(group * layout.group, (group + 1) * layout.group)
            spread = (moment[:, members] @ levels[members]).mul_(levels)
            system[:, group, :count] = _group_sums(spread, count)
        error = _error(target, levels, steps, groups)
        pull = moment @ error
        slope = _group_sums(pull * levels, count)
        if layout.has_min:
            sums = _group_sums(moment, count)  # of the moment's rows over the columns of each group
            for group in range(count):
                system[:, count + group, :count] = -_group_sums(levels * sums[:, group, None], count)
            system[:, :count, count:] = system[:, count:, :count].transpose(1, 2)
            system[:, count:, count:] = _group_sums(sums, count)
            slope = torch.cat([slope, -_group_sums(pull, count)], dim=1)
        return cls(system, slope, (pull * error).sum(dim=0), steps.parameters(layout), layout)

    def loss(self, steps: _Steps) -> Tensor:
        """Float32 `[rows]`."""
        added = steps.parameters(self.layout) - self.old
        curved = torch.bmm(self.system, added.unsqueeze(2)).squeeze(2)
        return self.constant + (2 * self.slope + curved).mul_(added).sum(dim=1)

    def solve(self, steps: _Steps) -> _Steps:
        """The scales and mins of least loss, jointly, of those that blocks can hold."""
        diagonal = self.system.diagonal(dim1=1, dim2=2)
        # a group whose levels are all 0 has no equation; the ridge gives it one, and its scale stays as it was
        ridge = 1e-5 * diagonal + _TINY
        added, failed = torch.linalg.solve_ex(self.system + torch.diag_embed(ridge), -self.slope)
        sound = (failed == 0) & torch.isfinite(added).all(dim=1)
        fitted = torch.where(sound[:, None], self.old + added, self.old).T
        count = len(steps.scale)
        ratio = fitted[:count] / torch.where(steps.scale == 0, torch.inf, steps.scale)
        runs_off = (ratio < _LEAST_RATIO) | (ratio > _MOST_RATIO)
        fitted = torch.cat([torch.where(runs_off, steps.scale, fitted[:count]), fitted[count:]])
        units = torch.cat([self._unit(fitted[:count]), self._unit(fitted[count:])])
        codes = self._codes(fitted, units)
        if not self.layout.has_min:
            return _Steps(units, codes, torch.zeros_like(units), torch.ones_like(units))
        return _Steps(units[:count], codes[:count], units[count:], codes[count:])

    def _unit(self, values: Tensor) -> Tensor:
        """What a code of 1 stands for, as float16 holds it: `[groups, rows]` for values of the same shape."""
        if self.layout.scale_codes is None:
            return values.half().float()
        least, most = self.layout.scale_codes
        reach = values.abs() if least < 0 else values.clamp(min=0)
        largest = reach.unflatten(0, (-1, self.layout.groups_per_block)).amax(dim=1) / most
        return largest.half().float().repeat_interleave(self.layout.groups_per_block, dim=0)

    def _codes(self, wanted: Tensor, units: Tensor) -> Tensor:
        """Codes `[parameters, rows]`: the nearest ones, then each the best one while all others stay."""
        if self.layout.scale_codes is None:
            return torch.ones_like(units)
        least, most = self.layout.scale_codes
        divisors = torch.where(units == 0, torch.inf, units)
        codes = (wanted / divisors).round_().clamp_(least, most)
        values = (codes * units).T.contiguous()
        slope = torch.bmm(self.system, (values - self.old).unsqueeze(2)).squeeze(2) + self.slope
        diagonal = self.system.diagonal(dim1=1, dim2=2).clamp(min=_TINY)
        for _ in range(_SCALE_SWEEPS):
            for j in range(len(codes)):
                best = values[:, j] - slope[:, j] / diagonal[:, j]
                codes[j] = (best / divisors[j]).round_().clamp_(least, most)
                change = codes[j] * units[j] - values[:, j]
                slope.addcmul_(self.system[:, j], change.unsqueeze(1))
                values[:, j] += change
        return codes


def _error(target: Tensor, levels: Tensor, steps: _Steps, groups: Tensor) -> Tensor:
    return torch.addcmul(-target, levels, steps.scale[groups]).sub_(steps.min[groups])


def _group_sums(values: Tensor, count: int) -> Tensor:
    """`[rows, count]`, the sums of `values [in, rows]` over each of so many groups of columns."""
    return values.unflatten(0, (count, -1)).sum(dim=1).T
