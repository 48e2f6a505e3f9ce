"""Rounding with error feedback, for a weight's W4 codes and for its residual alike.

Three steps on levels and scales that are given, all under one `Hessian`, each row of the weight on its own:

    round_with_feedback   column after column; each passes its error on to the columns that are still open
    descend               then each column once more, with all others as they are by now
    ScaleFit              all group scales of a row jointly, by least squares

Everything here is laid out `[in, rows]`: a column of the weight is then one piece of memory, which the loops over the
columns read and write at several times the speed of a strided one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.residual.hessian import Hessian
from srd_modifier.residual.levels import as_divisor

_BLOCK_COLUMNS = 64

# a refitted scale that is further from the old one than this is the least squares running off
_LEAST_RATIO, _MOST_RATIO = 0.3, 3.0


@dataclass(frozen=True)
class Grid:
    """The levels that each entry may take, in units of its group's scale.

    Attributes:
        offset: float32 `[1, rows]`, 0 for whole numbers and 1/2 for half-integers.
        low: least level, `[1, rows]` or `[in, rows]`.
        high: greatest level, of `low`'s shape.
    """

    offset: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, steps: Tensor, column: int) -> Tensor:
        """The level nearest to each of `steps [rows]`, an entry of one column."""
        row = column if len(self.low) > 1 else 0
        levels = (steps + 0.5 - self.offset[0]).floor_().add_(self.offset[0])
        return torch.minimum(torch.maximum(levels, self.low[row]), self.high[row])


def round_with_feedback(
    target: Tensor, scale: Tensor, groups: Tensor, grid: Grid, hessian: Hessian, *, keep: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Levels for a target, each column's error spread over the columns after it.

    Args:
        target: float32 `[in, rows]`.
        scale: float32 `[groups, rows]`; may be negative; a group of scale 0 stays 0.
        groups: int64 `[in]`, the group of each column.
        grid: the levels.
        hessian: of the layer.
        keep: bool `[in, rows]`, a plan of the entries to keep; the others become 0 and pass all that they were on.
            A block of columns keeps as many as planned, see `_keep_most_salient`; None keeps all.

    Returns:
        Levels float32 `[in, rows]`, 0 where an entry is not kept, and the entries that are kept.
    """
    order, factor = hessian.order, hessian.factor
    work = target[order]
    levels = torch.empty_like(target)
    kept = None if keep is None else torch.empty_like(keep)
    divisors = as_divisor(scale)
    columns, group_of = order.tolist(), groups[order].tolist()
    for start in range(0, len(columns), _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, len(columns))
        block = work[start:end]
        errors = torch.empty_like(block)
        diagonal = factor.diagonal()[start:end].tolist()
        if keep is not None and kept is not None:
            members = order[start:end]
            usable = scale[groups[members]] != 0
            kept[members] = _keep_most_salient(block, keep[members], factor.diagonal()[start:end], usable)
        for i in range(end - start):
            column, group = columns[start + i], group_of[start + i]
            level = grid.nearest(block[i] / divisors[group], column)
            if kept is not None:
                level = torch.where(kept[column], level, 0.0)
            levels[column] = level
            error = torch.addcmul(block[i], level, scale[group], value=-1).div_(diagonal[i])
            errors[i] = error
            block[i:].addr_(factor[start + i, start + i : end], error, alpha=-1)
        if end < len(columns):
            work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return levels, kept


def descend(
    target: Tensor,
    levels: Tensor,
    scale: Tensor,
    groups: Tensor,
    grid: Grid,
    hessian: Hessian,
    *,
    sweeps: int = 2,
    keep: Tensor | None = None,
) -> Tensor:
    """Levels that lose less: column by column the best one while all others stay, `sweeps` times over.

    Feedback cannot change a column once it is passed; this can. Arguments as in `round_with_feedback`; entries that
    are not in `keep` stay 0.
    """
    moment = hessian.regularized
    diagonal = moment.diagonal().tolist()
    levels = levels.clone()
    divisors = as_divisor(scale)
    error = torch.addcmul(-target, levels, scale[groups])
    slope = moment @ error
    group_of = groups.tolist()
    for _ in range(sweeps):
        for start in range(0, len(group_of), _BLOCK_COLUMNS):
            end = min(start + _BLOCK_COLUMNS, len(group_of))
            changes = torch.zeros_like(target[start:end])
            near = slope[start:end]
            for column in range(start, end):
                i, group = column - start, group_of[column]
                # the value at which the loss, a parabola in this entry, is least
                best = torch.add(levels[column] * scale[group], near[i], alpha=-1 / diagonal[column])
                level = grid.nearest(best / divisors[group], column)
                if keep is not None:
                    level = torch.where(keep[column], level, 0.0)
                changes[i] = (level - levels[column]) * scale[group]
                levels[column] = level
                near.addr_(moment[start:end, column], changes[i])
            slope[:start].addmm_(moment[:start, start:end], changes)
            slope[end:].addmm_(moment[end:, start:end], changes)
    return levels


@dataclass(frozen=True)
class ScaleFit:
    """The loss of every row as a parabola in its group scales: `constant - 2 seen . s + s^T system s`.

    For levels c and a target t, `system_jk = c_j^T H_jk c_k` and `seen_j = c_j^T (H t)_j` for groups j and k.

    Attributes:
        system: float32 `[rows, groups, groups]`.
        seen: float32 `[rows, groups]`.
        constant: float32 `[rows]`, `t^T H t`.
    """

    system: Tensor
    seen: Tensor
    constant: Tensor

    @classmethod
    def of(cls, target: Tensor, product: Tensor, levels: Tensor, groups: Tensor, hessian: Hessian) -> "ScaleFit":
        """The parabola for some levels; `product` is `H t`, all `[in, rows]`."""
        count, rows = int(groups[-1]) + 1, target.shape[1]
        system = torch.empty(rows, count, count, device=target.device)
        for group in range(count):
            members = slice(
                *torch.searchsorted(groups, torch.tensor([group, group + 1], device=groups.device)).tolist()
            )
            spread = (hessian.regularized[:, members] @ levels[members]).mul_(levels)
            system[:, group] = group_sums(spread, groups, count)
        return cls(system, group_sums(product * levels, groups, count), (product * target).sum(dim=0))

    def solve(self, scale: Tensor) -> Tensor:
        """The scales `[groups, rows]` of least loss, jointly; one that runs off from `scale` stays as it was."""
        diagonal = self.system.diagonal(dim1=1, dim2=2)
        # a group whose levels are all 0 has no equation; the tiny ridge gives it one, and its scale stays as it was
        ridge = 1e-6 * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
        fitted, failed = torch.linalg.solve_ex(self.system + torch.diag_embed(ridge.expand_as(diagonal)), self.seen)
        ratio = fitted.T / as_divisor(scale)
        sound = (ratio > _LEAST_RATIO) & (ratio < _MOST_RATIO) & (failed == 0)
        return torch.where(sound, fitted.T, scale)

    def loss(self, scale: Tensor) -> Tensor:
        """Float32 `[rows]`: the loss with these scales `[groups, rows]`."""
        curved = torch.einsum("jr,rjk,kr->r", scale, self.system, scale)
        return self.constant - 2 * torch.einsum("jr,rj->r", scale, self.seen) + curved


def group_sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """`[rows, groups]`, the sums of `values [in, rows]` over the columns of each group."""
    return torch.zeros(count, values.shape[1], device=values.device).index_add_(0, groups, values).T


def _keep_most_salient(block: Tensor, planned: Tensor, diagonal: Tensor, usable: Tensor) -> Tensor:
    """Which entries of a block `[columns, rows]` to keep: as many as planned, chosen by what they are by now.

    The columns before have passed their errors on, so the largest of the plan need not be the largest any more.
    Dropping an entry w costs `w^2 / U_jj^2` after the columns behind it made good for it. Only `usable` ones are worth
    keeping: where nothing of a group was planned its scale is 0.
    """
    count = int(planned.sum())
    if count == 0:
        return planned
    cost = (block / diagonal.unsqueeze(1)).square_().mul_(usable).flatten()
    keep = torch.zeros_like(cost, dtype=torch.bool)
    keep[torch.topk(cost, count).indices] = True
    return keep.view_as(planned)
