"""What a budget leaves for the residual of a W4 model, and what a residual takes of it."""

import math
from collections.abc import Sequence

from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.checkpoint.writer import ResidualEntry, header_bytes
from srd_modifier.errors import ConfigError
from srd_modifier.selection.budget import Budget, Candidate, Spending, limits, spend

# digits of an offset in the header of a file of the greatest size
_OFFSET_DIGITS = 10


def residual_bytes(module: str, entry: ResidualEntry, *, in_file: bool) -> int:
    """The bytes of one module's residual tensors, or the most that they add to a file, header included."""
    if not in_file:
        return entry.bytes()
    # the header of a file for one module has all that the module adds to a common one, whose offsets have more digits
    return entry.bytes() + header_bytes({module: entry}) + 2 * _OFFSET_DIGITS * len(entry.layout())


def choose_within(budget: Budget, groups: Sequence[Sequence[Candidate]], plain: CheckpointSize, model: str) -> Spending:
    """The best choice within a budget for the whole model.

    Args:
        budget: bytes on disk and bits per weight are the model's, as `sizes.measure` counts them.
        groups: candidates of each group of modules, their bytes by `residual_bytes`: in files, unless the budget is in
            bits per weight.
        plain: the size of the W4 model without a residual.
        model: what errors call it.

    Raises:
        ConfigError: the budget does not cover the W4 model, or the divergence is out of reach; the message gives the
            smallest and the largest that are possible.
    """
    least, most = limits(groups)
    if budget.max_divergence is not None:
        if most.damage > budget.max_divergence:
            raise ConfigError(
                f"max_divergence {budget} is out of reach: {model} has a predicted {least.damage:.3g} without "
                f"residuals and {most.damage:.3g} with all that help"
            )
        return spend(groups, max_damage=budget.max_divergence)
    if budget.bytes is not None:
        room = budget.bytes - plain.bytes_on_disk
        smallest = f"{plain.bytes_on_disk + least.bytes:,} bytes"
        largest = f"{plain.bytes_on_disk + most.bytes:,} bytes"
    else:
        assert budget.bits_per_weight is not None
        weights = plain.quantized_weights
        w4_bytes = round(plain.bits_per_weight * weights / 8)
        room = math.floor(budget.bits_per_weight * weights / 8) - w4_bytes
        smallest = f"{8 * (w4_bytes + least.bytes) / weights:.4g}bpw"
        largest = f"{8 * (w4_bytes + most.bytes) / weights:.4g}bpw"
    if room < least.bytes:
        raise ConfigError(
            f"a budget of {budget} is too small: {model} takes {smallest} without residuals, and up to {largest} help"
        )
    return spend(groups, max_bytes=room)
