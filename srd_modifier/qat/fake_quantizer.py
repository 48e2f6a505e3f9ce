"""A weight as the forward pass sees it: on its grid, with gradients that pass straight through.

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) takes the derivative of rounding for 1 where an
entry is within the grid's range, and for 0 beyond it. Scales that are learned have the derivative of LSQ (Esser et al.
2020, arXiv:1902.08153).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from srd_modifier.errors import ConfigError
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.schedule import FULL_PRECISION
from srd_modifier.residual.levels import as_divisor

# An optimizer step moves the logarithm of a scale by so many learning rates: what is right for weights of a few
# hundredths is too little for it.
_SCALE_RATE = 10.0


class FakeQuantizer(nn.Module):
    """Rounds a weight `[out, in]` to a width that can be changed between steps.

    At `grid.bits` the weight is on its grid, the one it will be stored in. Wider grids have as many bits as their width
    says, symmetric around 0, with a scale per group that follows the group's extremes. A width between two whole
    numbers is the mean of both grids' values, weighted by how near they are; from 16 on the weight itself is returned.

    Attributes:
        width: in bits; below `grid.bits` it counts as that.
        scale, minimum: of the grid, buffers, so that they are saved with the model and divided or copied among
            processes as its parameters are.
        log_factor: a tenth of the logarithm of what scales are multiplied with, a parameter; None if they are not
            learned.
    """

    scale: Tensor
    minimum: Tensor | None

    def __init__(self, grid: Grid, *, learned_scale: bool = False) -> None:
        """Begin at the grid's own width.

        Args:
            grid: with its tensors on the weight's device.
            learned_scale: train the scales, which are then bfloat16 numbers at every step.

        Raises:
            ConfigError: the scales of this grid cannot be learned, because they are coded themselves.
        """
        super().__init__()
        if learned_scale and grid.minimum is not None:
            raise ConfigError(
                "scales can be learned on the w4a16 grid only: those of a GGUF block are codes themselves"
            )
        self.low, self.high, self.bits = grid.low, grid.high, grid.bits
        self.width: float = grid.bits
        self.register_buffer("scale", grid.scale)
        self.register_buffer("minimum", grid.minimum)
        self.log_factor = nn.Parameter(torch.zeros_like(grid.scale)) if learned_scale else None

    @property
    def grid(self) -> Grid:
        """The grid as it is now."""
        return Grid(self._scale().detach(), self.low, self.high, self.minimum)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight at the present width, in its own dtype."""
        width = max(self.width, self.bits)
        if width >= FULL_PRECISION:
            # DDP waits for a gradient of every parameter
            return weight if self.log_factor is None else weight + 0 * self.log_factor.sum()
        return _StraightThrough.apply(weight, self._scale(), self.minimum, self.low, self.high, width - self.bits)

    def _scale(self) -> Tensor:
        if self.log_factor is None:
            return self.scale
        scale = self.scale * torch.exp(_SCALE_RATE * self.log_factor)
        return scale + (scale.bfloat16().float() - scale).detach()

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"bits={self.bits}, width={self.width:g}, groups={self.scale.shape[1]}"


class _StraightThrough(torch.autograd.Function):
    """Keeps nothing for the backward pass but its arguments, which are there anyway."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int, above: float
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, minimum)
        ctx.low, ctx.high, ctx.above = low, high, above
        grid = Grid(scale, low, high, minimum)
        values = weight.float()
        fewer, share = math.floor(above), above - math.floor(above)
        quantized = grid.nearest(values) if fewer == 0 else _wide(values, scale, grid.bits + fewer)
        if share:
            more = grid.bits + fewer + 1
            quantized.lerp_(values if more >= FULL_PRECISION else _wide(values, scale, more), share)
        return quantized.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, above = gradients[0], ctx.above
        if above >= 1:  # no grid with a range of its own takes part
            return gradient, None, None, None, None, None
        weight, scale, minimum = ctx.saved_tensors
        grid = Grid(scale, ctx.low, ctx.high, minimum)
        steps = grid.steps(weight.float())
        outside = (steps < ctx.low - 0.5) | (steps > ctx.high + 0.5)
        grouped = gradient.unflatten(1, (scale.shape[1], -1))
        to_weight = torch.where(outside, grouped * above, grouped).flatten(1)
        if not ctx.needs_input_grad[1]:
            return to_weight, None, None, None, None, None
        levels = steps.round().clamp_(ctx.low, ctx.high)
        slope = torch.where(outside, levels, levels - steps)
        to_scale = (grouped.float() * slope).sum(-1).mul_(1 - above)
        return to_weight, to_scale, None, None, None, None


def _wide(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Float32 values on a symmetric grid of `bits` bits whose scales cover each group."""
    high = 2 ** (bits - 1) - 1
    grouped = values.unflatten(1, (scale.shape[1], -1))
    step = grouped.abs().amax(-1, keepdim=True) / high
    return (grouped / as_divisor(step)).round_().mul_(step).flatten(1)
