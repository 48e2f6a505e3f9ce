"""A budget spent on a model: which of its candidates each module gets."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from loguru import logger

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.spending import choose_within, residual_bytes
from srd_modifier.modifier.candidates import CandidateStore
from srd_modifier.selection.budget import Budget, Candidate
from srd_modifier.selection.fusion import fused_groups


def allocate(
    budget: Budget, store: CandidateStore, damages: Mapping[str, ModuleSensitivity], directory: Path
) -> dict[str, int]:
    """The number of the candidate of each module that gets a residual; the others stay W4.

    Args:
        budget: bytes on disk, bits per weight, or the divergence that may be left.
        store: the candidates, at least one module's.
        damages: of every quantized module at W4.
        directory: the saved W4 model, whose bytes count.

    Raises:
        ConfigError: the budget is too small for the W4 model, or the divergence is out of reach.
    """
    names = fused_groups(list(store.candidates))
    groups = [_options(group, store, in_files=budget.bits_per_weight is None) for group in names]
    rest = math.fsum(damage.w4 for name, damage in damages.items() if name not in store.candidates)
    spending = choose_within(budget, [*groups, [Candidate(0, rest)]], measure(directory, corrected=()), "the W4 model")
    chosen = {
        name: choice - 1 for group, choice in zip(names, spending.choices, strict=False) for name in group if choice > 0
    }
    logger.info(
        f"SRD corrects {len(chosen)} of {len(store.candidates)} modules within {budget}: {spending.bytes:,} bytes of "
        f"residual, predicted divergence {spending.damage:.3g}, at most {spending.gap:.2g} from the best choice"
    )
    return chosen


def _options(group: Sequence[str], store: CandidateStore, *, in_files: bool) -> list[Candidate]:
    """No residual at all, then each candidate for the whole group."""
    options = [Candidate(0, math.fsum(store.candidates[name][0].sensitivity.w4 for name in group))]
    for number in range(len(store.candidates[group[0]])):
        sizes = [residual_bytes(name, store.entry(name, number), in_file=in_files) for name in group]
        damages = [store.candidates[name][number].sensitivity.damage(1.0) for name in group]
        options.append(Candidate(sum(sizes), math.fsum(damages)))
    return options
