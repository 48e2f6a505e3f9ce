"""A budget of a recipe, and how it is spent: one candidate for each group of modules.

Spending is a multiple-choice knapsack: every group takes exactly one of its candidates, and the bytes (or the
damage) of all groups together stay within a limit while the other of the two is as small as possible. The
Lagrangian relaxation gives a bound and rules out most candidates; HiGHS decides among those that are left.
On one core, 128 groups take under a second to a gap of 1e-6, as do 12,000 to 1e-4. HiGHS by itself leaves a gap
of 2e-5 for 3,000 groups after two minutes, and at times a solution that is a hair above the limit.
"""

import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srd_modifier._extras import require
from srd_modifier.errors import ConfigError

_UNITS = {
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "TiB": 2**40,
    "GiB": 2**30,
    "MiB": 2**20,
    "KiB": 2**10,
}
_BYTES_OF = {unit.lower(): size for unit, size in _UNITS.items()} | {"": 1, "b": 1, "byte": 1, "bytes": 1}
_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.IGNORECASE | re.ASCII)

_ACCEPTED = {
    "budget": "a size such as 13MB or 12.5MiB, a whole number of bytes, or bits per weight such as 5.5bpw",
    "max_divergence": "a number above 0 such as 1e-3",
}

_GAP = 1e-6
"""The relative gap at which the search stops: far below what a prediction of damage is worth."""

_MANY = 500
_GAP_OF_MANY = 1e-4
"""The same for more groups than that, where HiGHS would take minutes for the rest."""

_TRADES = 500
"""The most changes of a choice that are tried one after another."""

_SCALE = 1e3
"""What HiGHS sees the best known cost, and the room left under the limit, as; its tolerances are absolute, 1e-6."""


@dataclass(frozen=True)
class Budget:
    """What a recipe allows to be spent, or to be lost; exactly one of the fields is set.

    Attributes:
        bytes: bytes on disk.
        bits_per_weight: bits on disk for each quantized weight, base and residual together.
        max_divergence: mean KL divergence from the unquantized model.
    """

    bytes: int | None = None
    bits_per_weight: float | None = None
    max_divergence: float | None = None

    def __post_init__(self) -> None:
        values = [value for field in fields(self) if (value := getattr(self, field.name)) is not None]
        if len(values) != 1:
            raise ValueError(f"a budget is one of bytes, bits_per_weight and max_divergence, got {len(values)} of them")
        if not 0 < values[0] < math.inf:
            raise ValueError(f"a budget is a number above 0, got {values[0]!r}")

    def __str__(self) -> str:
        """The budget as a recipe would have it; `parse_budget` gives the same budget back."""
        if self.bytes is not None:
            return _size_text(self.bytes)
        if self.bits_per_weight is not None:
            return f"{_number_text(self.bits_per_weight)} bpw"
        assert self.max_divergence is not None
        return _number_text(self.max_divergence)


def parse_budget(kind: str, value: Any, *, field: str | None = None) -> Budget:
    """The budget that a recipe's value stands for.

    Args:
        kind: `budget` or `max_divergence`.
        value: as YAML hands it over; YAML reads 1e-3, which lacks a dot, as text.
        field: what errors call the value, by default `kind`.

    Raises:
        ConfigError: naming the field, the value and what is accepted.

    >>> parse_budget("budget", "13.2MiB"), str(parse_budget("budget", 13_000_000))
    (Budget(bytes=13841203, bits_per_weight=None, max_divergence=None), '13 MB')
    """
    if kind == "budget":
        parsed = _parse_size(value)
    elif kind == "max_divergence":
        parsed = _parse_divergence(value)
    else:
        raise ValueError(f"a budget is 'budget' or 'max_divergence', got {kind!r}")
    if parsed is None:
        raise ConfigError(f"{field or kind} is {value!r}, expected {_ACCEPTED[kind]}")
    return parsed


def parse_bytes(value: Any, *, field: str) -> int:
    """The bytes that a size stands for: `8GB`, `512MiB`, a number of bytes.

    Raises:
        ConfigError: naming the field, the value and what is accepted.
    """
    parsed = _parse_size(value)
    if parsed is None or parsed.bytes is None:
        raise ConfigError(f"{field} is {value!r}, expected a size such as 8GB, 512MiB or a number of bytes")
    return parsed.bytes


@dataclass(frozen=True)
class Candidate:
    """One way to treat a group of modules.

    Attributes:
        bytes: what it takes on disk.
        damage: the mean KL divergence that it is predicted to leave.
    """

    bytes: int
    damage: float


@dataclass(frozen=True)
class Spending:
    """What was chosen for each group.

    Attributes:
        choices: the index of each group's candidate.
        bytes: of all groups.
        damage: of all groups.
        gap: how far, relative to the minimized total, the result may be from the best one; 0 when it is the best.
    """

    choices: list[int]
    bytes: int
    damage: float
    gap: float


def limits(groups: Sequence[Sequence[Candidate]]) -> tuple[Candidate, Candidate]:
    """The totals with the fewest bytes, and those with the least damage, which more bytes would not lower.

    Raises:
        ValueError: a group has no candidates, or one with impossible numbers.
    """
    useful = [_useful(group) for group in groups]
    first, last = ([group[kept[end]] for group, kept in zip(groups, useful, strict=True)] for end in (0, -1))
    return _sum(first), _sum(last)


def spend(
    groups: Sequence[Sequence[Candidate]],
    *,
    max_bytes: int | None = None,
    max_damage: float | None = None,
    time_limit: float = 60.0,
) -> Spending:
    """One candidate for each group: the least damage within `max_bytes`, or the fewest bytes within `max_damage`.

    The limit is never exceeded, and what is left of `max_bytes` is spent wherever that still helps. The same input
    gives the same result, unless the time limit ends the search.

    Args:
        groups: the candidates of each group.
        max_bytes: the most bytes of all groups together. Exactly one of the two limits is given.
        max_damage: the most damage of all groups together.
        time_limit: seconds after which the search stops, and the gap that is left is reported.

    Raises:
        ConfigError: no candidates are small enough, or good enough.
        MissingExtraError: scipy is not installed.
        ValueError: a group has no candidates, or a number is impossible.
    """
    if (max_bytes is None) == (max_damage is None):
        raise ValueError("spend takes either max_bytes or max_damage")
    limit = max_bytes if max_bytes is not None else max_damage
    assert limit is not None
    if not math.isfinite(limit):
        raise ValueError(f"a limit is a finite number, got {limit}")
    require("scipy", extra="quantize")
    smallest, largest = limits(groups)
    if max_bytes is not None and max_bytes < smallest.bytes:
        raise ConfigError(
            f"max_bytes {max_bytes} is below the smallest possible {smallest.bytes} bytes, with damage "
            f"{smallest.damage:.4g}; up to {largest.bytes} bytes help, with damage {largest.damage:.4g}"
        )
    if max_damage is not None and max_damage < largest.damage:
        raise ConfigError(
            f"max_damage {max_damage:.4g} is below the smallest possible {largest.damage:.4g}, with "
            f"{largest.bytes} bytes; the largest is {smallest.damage:.4g}, with {smallest.bytes} bytes"
        )

    deadline = time.monotonic() + time_limit
    target = _GAP if len(groups) <= _MANY else _GAP_OF_MANY
    useful = [_useful(group) for group in groups]
    if max_bytes is not None:
        knapsack = _knapsack(groups, useful, "bytes", max_bytes)
        chosen, bound = _solve(knapsack, target, deadline)
        spent = _spending(groups, useful, chosen)
        return replace(spent, gap=_gap(spent.damage, bound))
    # candidates in ascending order of damage are in descending order of bytes
    backwards = [row[::-1] for row in useful]
    chosen, bound = _solve(_knapsack(groups, backwards, "damage", limit), target, deadline)
    spent = _spending(groups, backwards, chosen)
    # many choices take the same bytes where layers are alike, so that trades may leave less damage for them
    forwards = np.array([len(row) - 1 for row in useful], dtype=np.intp) - chosen
    chosen = _improve(_knapsack(groups, useful, "bytes", spent.bytes), forwards)
    spent = _spending(groups, useful, chosen)
    return replace(spent, gap=_gap(spent.bytes, bound))


@dataclass(frozen=True)
class _Knapsack:
    """The candidates of all groups as matrices, one row per group, in ascending order of what is limited.

    Attributes:
        weight: what is limited, in its own unit; rows are filled up with their last candidate.
        limit: the most that the weights of all rows may add up to.
        cost: what is minimized, above the least of its row; the largest of all rows add up to 1. Candidates that
            cannot be taken cost infinity.
        load: the weight above the least of its row, relative to the room that those leave under the limit.
        floor: the least of all rows together, which `cost` leaves out, in its own unit.
        reach: a cost of 1, in its own unit.
    """

    weight: NDArray[Any]
    limit: float
    cost: NDArray[np.float64]
    load: NDArray[np.float64]
    floor: float
    reach: float

    @property
    def rows(self) -> NDArray[np.intp]:
        return np.arange(len(self.cost))

    def fits(self, chosen: NDArray[np.intp]) -> bool:
        """Whether the choice is within the limit, in exact arithmetic."""
        return _total(self.weight[self.rows, chosen].tolist()) <= self.limit

    def price(self, chosen: NDArray[np.intp]) -> float:
        return math.fsum(self.cost[self.rows, chosen])


def _knapsack(groups: Sequence[Sequence[Candidate]], kept: list[list[int]], limited: str, limit: float) -> _Knapsack:
    """The knapsack of the kept candidates, which are in ascending order of what is limited: bytes or damage."""
    width = max(map(len, kept), default=1)
    padded = [row + row[-1:] * (width - len(row)) for row in kept]
    weight, cost = (
        np.array(
            [[getattr(group[index], name) for index in row] for group, row in zip(groups, padded, strict=True)]
        ).reshape(len(groups), width)
        for name in (("bytes", "damage") if limited == "bytes" else ("damage", "bytes"))
    )
    floor = _total(cost[:, -1].tolist())
    above = (cost - cost[:, -1:]).astype(np.float64)
    reach = math.fsum(above[:, 0]) or 1.0
    room = limit - _total(weight[:, 0].tolist())
    load = weight - weight[:, :1]
    absent = np.arange(width) >= np.array([len(row) for row in kept], dtype=int)[:, None]
    # rounding must not take away what fits exactly; `fits` decides in the end
    absent |= load > room + 1e-14 * limit
    load = load / (room or 1)
    return _Knapsack(weight, limit, np.where(absent, np.inf, above / reach), np.where(absent, 0.0, load), floor, reach)


def _solve(knapsack: _Knapsack, target: float, deadline: float) -> tuple[NDArray[np.intp], float]:
    """The choice with the least cost, and a bound that no choice is below, in the unit of the cost."""
    cheapest = knapsack.cost.argmin(axis=1)
    if knapsack.fits(cheapest):
        return cheapest, knapsack.floor + knapsack.price(cheapest) * knapsack.reach
    chosen, multiplier = _relax(knapsack)
    chosen = _improve(knapsack, chosen)
    reduced = knapsack.cost + multiplier * knapsack.load
    bound = math.fsum(reduced.min(axis=1)) - multiplier
    slack = knapsack.price(chosen) - bound
    if slack > target * (knapsack.floor / knapsack.reach + knapsack.price(chosen)):
        # a candidate whose reduced cost is above its row's least by more than the slack is in no better choice
        worth = reduced - reduced.min(axis=1, keepdims=True) <= slack * (1 + 1e-9)
        worth[knapsack.rows, chosen] = True
        chosen, proven = _search(knapsack, chosen, worth, target, deadline)
        bound = max(bound, proven)
    return chosen, knapsack.floor + bound * knapsack.reach


def _relax(knapsack: _Knapsack) -> tuple[NDArray[np.intp], float]:
    """The choice that fits at the smallest price of load, and that price.

    At a price, each row takes the candidate with the least cost + price * load; the higher the price, the smaller
    the load. Costs of 1 and a load of 1 are the scale, so that a price of 1 fits, but for rounding.
    """

    def choose(price: float) -> NDArray[np.intp]:
        return (knapsack.cost + price * knapsack.load).argmin(axis=1)

    high = 1.0
    while not knapsack.fits(choose(high)):
        high *= 2
    # a price of 0 does not fit, or the caller would not have come here
    while knapsack.fits(choose(high / 2)):
        high /= 2
    low = high / 2
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if knapsack.fits(choose(middle)):
            high = middle
        else:
            low = middle
    return choose(high), high


def _improve(knapsack: _Knapsack, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """The choice after every change that helps, the most helpful first: of one row, or of two that trade load."""
    chosen, rows, width = chosen.copy(), knapsack.rows, knapsack.cost.shape[1]
    refused: set[int] = set()
    for _ in range(_TRADES):
        room = 1.0 - math.fsum(knapsack.load[rows, chosen])
        cost = (knapsack.cost - knapsack.cost[rows, chosen][:, None]).ravel()
        load = (knapsack.load - knapsack.load[rows, chosen][:, None]).ravel()
        taking = np.flatnonzero((load > 0) & (cost < 0))
        taking = taking[np.argsort(load[taking], kind="stable")]
        if not len(taking):
            break
        # the best of all that take at most so much load
        least = np.minimum.accumulate(cost[taking])
        best = taking[np.maximum.accumulate(np.where(cost[taking] == least, np.arange(len(taking)), 0))]
        giving = np.flatnonzero((load < 0) & np.isfinite(cost))
        # -1 stands for giving nothing: the room that is left may do
        giving = np.append(giving[np.isin(giving, list(refused), invert=True)], [] if -1 in refused else [-1])
        giving = giving.astype(np.intp)
        given, price = (np.where(giving < 0, 0.0, of[giving]) for of in (load, cost))
        # rounding may let a change in that is a hair too large; `fits` decides
        fitting = np.searchsorted(load[taking], room - given + 1e-9, side="right") - 1
        net = np.where((fitting >= 0) & (best[fitting] // width != giving // width), price + least[fitting], 0.0)
        if not len(net) or net.min() >= -1e-15:
            break
        pick = int(net.argmin())
        trial = chosen.copy()
        for change in (int(giving[pick]), int(best[fitting[pick]])):
            if change >= 0:
                trial[change // width] = change % width
        if knapsack.fits(trial):
            chosen = trial
            refused.clear()
        else:
            refused.add(int(giving[pick]))
    return chosen


def _search(
    knapsack: _Knapsack, chosen: NDArray[np.intp], worth: NDArray[np.bool_], target: float, deadline: float
) -> tuple[NDArray[np.intp], float]:
    """The best choice among the candidates worth a look, at least as good as `chosen`, and its proven bound.

    HiGHS takes a row as kept when it is exceeded by up to 1e-6, and leaves coefficients below 1e-9 out. A solution
    that the exact check refuses for this is not used: the search is repeated with the limit lowered by twice the
    excess, which only costs what lies in that hair; the bound of the first search, with the full limit, holds.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = np.where(worth, knapsack.load, np.inf).min(axis=1)
    room = 1.0 - math.fsum(least)
    worth = worth & (knapsack.load - least[:, None] <= room + 1e-12)
    ceiling = knapsack.price(chosen)
    open_rows = np.flatnonzero(worth.sum(axis=1) > 1)
    open_cost = math.fsum(knapsack.cost[open_rows, chosen[open_rows]])
    if open_cost <= 0:
        return chosen, ceiling
    base = worth.argmax(axis=1)
    row, column = np.nonzero(worth[open_rows])
    cost, load = (matrix[open_rows][row, column] for matrix in (knapsack.cost, knapsack.load - least[:, None]))
    each = csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(open_rows), len(row)))
    unit = open_cost / _SCALE
    # the gap that HiGHS is given is one of the cost that is still open
    gap = target * (knapsack.floor / knapsack.reach + ceiling) / open_cost

    proven, margin = -math.inf, 0.0
    for _ in range(10):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        with _quiet():
            result = milp(
                # what costs more than all open rows do now is in no better choice, and no number needs to be larger
                np.minimum(cost / unit, 10 * _SCALE),
                integrality=np.ones(len(row)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(each, 1, 1),
                    LinearConstraint(load[None, :] * (_SCALE / room), -np.inf, _SCALE * (1 - margin)),
                ],
                options={"time_limit": left, "mip_rel_gap": gap},
            )
        if margin == 0.0 and result.mip_dual_bound is not None:
            # nothing that was left out is better than `chosen`
            proven = min(ceiling - open_cost + float(result.mip_dual_bound) * unit, ceiling)
        if result.x is None:
            break
        taken = np.zeros((len(open_rows), worth.shape[1]))
        taken[row, column] = result.x
        found = base.copy()
        found[open_rows] = taken.argmax(axis=1)
        if knapsack.fits(found):
            found = _improve(knapsack, found)
            chosen = found if knapsack.price(found) < ceiling else chosen
            break
        excess = math.fsum(knapsack.load[knapsack.rows, found]) - 1.0
        margin = max(2 * margin, 2 * excess / room, 1e-12)
    return chosen, proven


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's stdout: HiGHS 1.12 has a printf in it that its own settings do not silence.

    It would be in the middle of what a command prints for other programs to read.
    """
    if os.name != "posix":
        yield
        return
    # a stream that Python writes through has its own buffer, and so has C's stdout
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _useful(group: Sequence[Candidate]) -> list[int]:
    """The candidates that no other dominates, by ascending bytes and descending damage; of equals, the first."""
    if not group:
        raise ValueError("a group has no candidates")
    for candidate in group:
        if not (0 <= candidate.bytes < math.inf and 0 <= candidate.damage < math.inf):
            raise ValueError(f"a candidate takes {candidate.bytes} bytes and does {candidate.damage} damage")
    kept: list[int] = []
    for index in sorted(range(len(group)), key=lambda index: (group[index].bytes, group[index].damage)):
        if not kept or group[index].damage < group[kept[-1]].damage:
            kept.append(index)
    return kept


def _spending(groups: Sequence[Sequence[Candidate]], kept: list[list[int]], chosen: NDArray[np.intp]) -> Spending:
    choices = [row[index] for row, index in zip(kept, chosen.tolist(), strict=True)]
    total = _sum([group[choice] for group, choice in zip(groups, choices, strict=True)])
    return Spending(choices, total.bytes, total.damage, gap=0.0)


def _sum(candidates: Sequence[Candidate]) -> Candidate:
    return Candidate(
        _total([candidate.bytes for candidate in candidates]),
        math.fsum(candidate.damage for candidate in candidates),
    )


def _total(values: list[Any]) -> Any:
    """The sum without rounding on the way: whole numbers are exact, others are rounded once."""
    return math.fsum(values) if any(isinstance(value, float) for value in values) else sum(values)


def _gap(reached: float, bound: float) -> float:
    gap = 0.0 if reached <= 0 else max(0.0, (reached - bound) / reached)
    # what rounding leaves of the difference between two equal numbers
    return gap if gap > 1e-12 else 0.0


def _parse_size(value: Any) -> Budget | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return Budget(bytes=value) if value > 0 else None
    found = _VALUE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    number, unit = found[1], found[2].lower()
    if unit == "bpw":
        bits = float(number)
        return Budget(bits_per_weight=bits) if 0 < bits < math.inf else None
    # a fraction of a byte has no unit to belong to: 5.5 is more likely to lack its bpw
    if unit not in _BYTES_OF or (_BYTES_OF[unit] == 1 and not number.isdecimal()):
        return None
    size = math.floor(Fraction(number) * _BYTES_OF[unit])
    return Budget(bytes=size) if size > 0 else None


def _parse_divergence(value: Any) -> Budget | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return Budget(max_divergence=number) if 0 < number < math.inf else None


def _size_text(size: int) -> str:
    """The shortest way to write a number of bytes exactly."""
    texts = []
    for unit, scale in _UNITS.items():
        for digits in range(7) if size >= scale else ():
            text = f"{size / scale:.{digits}f}"
            if math.floor(Fraction(text) * scale) == size:
                texts.append(f"{text} {unit}")
                break
    return min([*texts, f"{size} bytes"], key=len)


def _number_text(number: float) -> str:
    return re.sub(r"e([+-])0*", r"e\1", repr(float(number))).removesuffix(".0").replace("e+", "e")
