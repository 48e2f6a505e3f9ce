"""The values that a weight may take in the format it is exported to, and their search.

A grid is the same for int4 in groups (W4A16) and for ggml's blocks: `scale * level - minimum` with whole levels, one
scale and, for some of ggml's types, one minimum per group of columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srd_modifier.residual.levels import as_divisor

# how far inside its cell, as a share of half a step, a weight is kept that is pulled to a level
_INSIDE = 0.98

# a group's scale is searched between these shares of the one that covers its extremes
_LEAST_SCALE, _SCALE_CANDIDATES = 0.7, 31


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a weight `[out, in]` and what they stand for: `scale * level - minimum`.

    Attributes:
        scale: float32 `[out, groups]`, which divide the columns evenly; may be negative. A group of scale 0 is 0.
        low: least level.
        high: greatest level.
        minimum: float32 `[out, groups]`, subtracted; None for none.
    """

    scale: Tensor
    low: int
    high: int
    minimum: Tensor | None = None

    @property
    def bits(self) -> int:
        """The width of a level: 4 for 16 levels."""
        return (self.high - self.low).bit_length()

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest level of every entry, in float32 and `weight`'s shape `[out, in]`."""
        return self.steps(weight).round_().clamp_(self.low, self.high).flatten(1)

    def steps(self, weight: Tensor) -> Tensor:
        """Where every entry lies, in levels that need not be whole: float32 `[out, groups, columns]`, a new tensor."""
        grouped = weight.unflatten(1, (self.scale.shape[1], -1))
        if self.minimum is not None:
            grouped = grouped + self.minimum.unsqueeze(-1)
        return grouped / as_divisor(self.scale).unsqueeze(-1)

    def values(self, levels: Tensor) -> Tensor:
        """What levels `[out, in]` stand for, float32, by ggml's order of operations."""
        grouped = levels.unflatten(1, (self.scale.shape[1], -1)) * self.scale.unsqueeze(-1)
        if self.minimum is not None:
            grouped = grouped - self.minimum.unsqueeze(-1)
        return grouped.flatten(1)

    def nearest(self, weight: Tensor) -> Tensor:
        """`weight` on the grid, float32."""
        return self.values(self.levels(weight))

    def pull(self, weight: Tensor, levels: Tensor) -> Tensor:
        """The values nearest to `weight` that round to `levels`: its own where it does already.

        A quantizer that compensates errors often chooses another level than the nearest. Training that begins here
        begins with its levels and, at full precision, as near to the original as these allow.
        """
        half = (self.scale.abs() / 2 * _INSIDE).repeat_interleave(weight.shape[1] // self.scale.shape[1], dim=1)
        middle = self.values(levels)
        return torch.minimum(torch.maximum(weight, middle - half), middle + half)

    def to(self, device: torch.device | str) -> "Grid":
        """The same grid on a device."""
        minimum = None if self.minimum is None else self.minimum.to(device)
        return replace(self, scale=self.scale.to(device), minimum=minimum)


def search_grid(weight: Tensor, *, group_size: int, bits: int = 4, scale_dtype: torch.dtype = torch.bfloat16) -> Grid:
    """The symmetric grid of a weight whose scales lose least in rounding it to nearest (mean squared error).

    Both signs of a scale are tried: of the 16 levels the one that stands alone, -8, is of use on one side only.

    Args:
        weight: float `[out, in]`.
        group_size: columns per scale, a divisor of `in`.
        bits: of a level.
        scale_dtype: in which the scales will be stored; the grid has the rounded ones, as float32.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.detach().float().unflatten(1, (-1, group_size))
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    covering = (extreme / low, extreme.abs() / (high + 0.5))
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for share in torch.linspace(_LEAST_SCALE, 1.0, _SCALE_CANDIDATES).tolist():
        for widest in covering:
            scale = (widest * share).to(scale_dtype).float()
            levels = (grouped / as_divisor(scale)).round_().clamp_(low, high)
            loss = levels.mul_(scale).sub_(grouped).square_().sum(-1, keepdim=True)
            better = loss < least
            best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return Grid(best.squeeze(-1), low, high)
