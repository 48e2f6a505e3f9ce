"""What a code stands for, in units of its group's scale.

8-bit codes are the whole numbers from -127 to 127. A narrower code `c` of `bits` bits in two's complement stands
for `c + 1/2`. Whole numbers would be `-2^(bits - 1)` to `2^(bits - 1) - 1`, lopsided, so that a symmetric residual
has little use for the lowest one: of the four of 2 bits three are left. The half-integers are all used.
"""

import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code."""
    # symmetric at 8 bits, where one code in 256 buys nothing and symmetric int8 is what kernels expect
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def level_offset(bits: int) -> float:
    """What a code's level is above the code itself: 0 at 8 bits, 1/2 below."""
    return 0.0 if bits == 8 else 0.5


def level_range(bits: int) -> tuple[float, float]:
    """The lowest and the highest level: -127 and 127 at 8 bits, -1.5 and 1.5 at 2 bits, -0.5 and 0.5 at 1 bit."""
    low, high = code_range(bits)
    return low + level_offset(bits), high + level_offset(bits)


def nearest_levels(steps: Tensor, bits: int) -> Tensor:
    """The level nearest to each entry of `steps`, values in units of their scale; of any shape, `steps` is kept."""
    if bits == 8:
        return steps.round().clamp_(*code_range(bits))
    # floor before the half is added: the sign of a value too small for `x - 1/2` is kept
    return steps.floor().clamp_(*code_range(bits)).add_(level_offset(bits))


def as_divisor(scale: Tensor) -> Tensor:
    """The scale to divide values by; infinity in the place of 0, so that entries of such a group become 0."""
    return torch.where(scale == 0, torch.inf, scale)
