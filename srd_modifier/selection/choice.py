"""The `correct:` setting of a recipe: which modules get a residual.

correct: all                              every quantized module (the default)
correct: {depth: [0.40, 0.77]}            decoder layers by depth
correct: {chunks: [early, reasoning]}     named ranges of depth
correct: {targets: ['re:.*down_proj']}    module names and patterns
correct: {budget: 13MB}                   what lowers the damage most within a size (12.5MiB, 5.5bpw, bytes)
correct: {max_divergence: 1e-3}           the fewest bytes within a mean KL divergence

The last two take all modules: which of them get what is decided once the damage of each is known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from srd_modifier.errors import ConfigError
from srd_modifier.selection.budget import Budget, parse_budget
from srd_modifier.selection.depth import CHUNKS, check_chunks, count_layers, in_range
from srd_modifier.selection.patterns import matches, matches_any

Choice = str | Mapping[str, Any]

ALL = "all"
_LISTS = ("depth", "chunks", "targets")
_BUDGETS = ("budget", "max_divergence")
_KINDS = (*_LISTS, *_BUDGETS)


def check_choice(choice: Choice) -> Choice:
    """The choice itself, once its form is known to be right.

    Raises:
        ConfigError: naming what is wrong and what is accepted.
    """
    if choice == ALL:
        return choice
    if not isinstance(choice, Mapping) or len(choice) != 1 or next(iter(choice)) not in _KINDS:
        raise ConfigError(
            f"correct is {choice!r}, expected 'all' or one of {', '.join(f'{{{kind}: ...}}' for kind in _KINDS)}"
        )
    ((kind, value),) = choice.items()
    if kind in _BUDGETS:
        budget_of(choice)
        return choice
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"correct.{kind} is {value!r}, expected a list")
    if kind == "depth":
        _check_range(value)
    elif kind == "chunks":
        check_chunks(value)
    elif not all(isinstance(target, str) for target in value):
        raise ConfigError(f"correct.targets is {value!r}, expected module names and 're:' patterns")
    return choice


def budget_of(choice: Choice) -> Budget | None:
    """The budget that the choice gives, or None if it names modules.

    Raises:
        ConfigError: the value is not a budget.
    """
    if not isinstance(choice, Mapping) or (kind := next(iter(choice))) not in _BUDGETS:
        return None
    return parse_budget(kind, choice[kind], field=f"correct.{kind}")


def choose(names: Sequence[str], choice: Choice, *, model_names: Sequence[str]) -> list[str]:
    """The names that the choice takes, in their own order; a budget takes all.

    Args:
        names: modules that may be corrected.
        choice: a checked `correct:` setting.
        model_names: all module names of the model, to count its decoder layers.

    Raises:
        ConfigError: the choice takes nothing, or a target matches none of the names.
    """
    if choice == ALL or budget_of(choice) is not None:
        return list(names)
    assert isinstance(choice, Mapping)
    ((kind, value),) = choice.items()
    if kind == "targets":
        for target in value:
            if not any(matches(name, target) for name in names):
                raise ConfigError(f"correct.targets: {target!r} matches no quantized module")
        return [name for name in names if matches_any(name, value)]
    ranges = [tuple(value)] if kind == "depth" else [CHUNKS[chunk] for chunk in check_chunks(value)]
    layers = count_layers(model_names)
    chosen = [name for name in names if any(in_range(name, layers, start, end) for start, end in ranges)]
    if not chosen:
        raise ConfigError(
            f"correct.{kind} {list(value)!r} takes none of the quantized modules in {layers} decoder layers"
        )
    return chosen


def _check_range(value: Sequence[Any]) -> None:
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in value)
    if len(value) != 2 or not numbers or not 0.0 <= value[0] < value[1] <= 1.0:
        raise ConfigError(f"correct.depth is {list(value)!r}, expected [start, end] with 0 <= start < end <= 1")
