"""Budgets as recipes write them, and spending them, against every choice there is for small problems."""

import itertools
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_modifier import _extras
from srd_modifier.errors import ConfigError, MissingExtraError
from srd_modifier.selection import budget as budget_module
from srd_modifier.selection.budget import Budget, Candidate, Spending, limits, parse_budget, spend

Groups = list[list[Candidate]]

SIZES: list[tuple[Any, int, str]] = [
    (13_000_000, 13_000_000, "13 MB"),
    ("13MB", 13_000_000, "13 MB"),
    ("13 MB", 13_000_000, "13 MB"),
    (" 13  mb ", 13_000_000, "13 MB"),
    ("13.2MiB", 13_841_203, "13.2 MiB"),
    ("1MiB", 2**20, "1 MiB"),
    ("900kB", 900_000, "900 kB"),
    ("0.9MB", 900_000, "900 kB"),
    (".5KB", 500, "500 bytes"),
    ("1.5GB", 1_500_000_000, "1.5 GB"),
    ("80 GiB", 80 * 2**30, "80 GiB"),
    ("2TB", 2 * 10**12, "2 TB"),
    ("1TiB", 2**40, "1 TiB"),
    ("16KiB", 16384, "16 KiB"),
    ("4096", 4096, "4 KiB"),
    ("4097 bytes", 4097, "4.097 kB"),
    ("999B", 999, "999 bytes"),
    (4_123_456, 4_123_456, "4.123456 MB"),
    (123_456_789_123, 123_456_789_123, "123456.789123 MB"),
    # exact, where floating point is not: 0.1 * 3 MB is 300000.00000000006
    ("0.3MB", 300_000, "300 kB"),
]


@pytest.mark.parametrize(("value", "size", "text"), SIZES, ids=str)
def test_sizes(value: Any, size: int, text: str) -> None:
    budget = parse_budget("budget", value)
    assert budget == Budget(bytes=size)
    assert str(budget) == text


@pytest.mark.parametrize(("value", "bits", "text"), [("5.5bpw", 5.5, "5.5 bpw"), ("6 BPW", 6.0, "6 bpw")])
def test_bits_per_weight(value: str, bits: float, text: str) -> None:
    budget = parse_budget("budget", value)
    assert budget == Budget(bits_per_weight=bits)
    assert str(budget) == text


@pytest.mark.parametrize(
    ("value", "number", "text"),
    [
        (1e-3, 1e-3, "0.001"),
        ("1e-3", 1e-3, "0.001"),
        ("2.5E-5", 2.5e-5, "2.5e-5"),
        (1, 1.0, "1"),
        (" 0.02 ", 0.02, "0.02"),
    ],
)
def test_divergences(value: Any, number: float, text: str) -> None:
    budget = parse_budget("max_divergence", value)
    assert budget == Budget(max_divergence=number)
    assert str(budget) == text


@given(
    st.one_of(
        st.builds(Budget, bytes=st.integers(1, 10**15)),
        st.builds(Budget, bits_per_weight=st.integers(1, 10**6).map(lambda thousandths: thousandths / 1000)),
        st.builds(Budget, max_divergence=st.floats(1e-300, 1e300)),
    )
)
def test_a_budget_is_read_back_from_its_text(budget: Budget) -> None:
    kind = "budget" if budget.max_divergence is None else "max_divergence"
    assert parse_budget(kind, str(budget)) == budget


BAD_SIZES: list[Any] = [
    *("", "MB", "13 apples", "13Mb/s", "-13MB", "+13MB", "1e7", "13,5MB", "13.MB.", "5.5", "5.5 bytes", "4_000", "bpw"),
    *("0", "0MB", "0.0bpw", "0.0001kB", "nan", "inf", "٣MB", "1" * 400 + "bpw"),
    *(0, -1, 5.5, 13e6, math.nan, True, None, [13], {"bytes": 13}),
]


@pytest.mark.parametrize("value", BAD_SIZES, ids=lambda value: repr(value)[:20])
def test_a_bad_size_says_what_is_accepted(value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_budget("budget", value)
    assert str(raised.value) == (
        f"budget is {value!r}, expected a size such as 13MB or 12.5MiB, a whole number of bytes, "
        "or bits per weight such as 5.5bpw"
    )


@pytest.mark.parametrize(
    "value", ["", "13MB", "-1", 0, "0", "1e-999", "nan", "inf", math.inf, math.nan, True, None, [1]]
)
def test_a_bad_divergence_says_what_is_accepted(value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_budget("max_divergence", value, field="--max-divergence")
    assert str(raised.value) == f"--max-divergence is {value!r}, expected a number above 0 such as 1e-3"


def test_a_kind_that_is_none() -> None:
    with pytest.raises(ValueError, match="a budget is 'budget' or 'max_divergence', got 'bytes'"):
        parse_budget("bytes", 13)


@pytest.mark.parametrize(
    "fields", [{}, {"bytes": 1, "max_divergence": 0.1}, {"bytes": 0}, {"max_divergence": math.nan}]
)
def test_a_budget_is_one_number(fields: Any) -> None:
    with pytest.raises(ValueError, match="a budget is"):
        Budget(**fields)


def totals(groups: Groups, choices: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [group[choice] for group, choice in zip(groups, choices, strict=True)]
    return sum(candidate.bytes for candidate in taken), math.fsum(candidate.damage for candidate in taken)


def all_totals(groups: Groups) -> list[tuple[int, float]]:
    return [totals(groups, choices) for choices in itertools.product(*(range(len(group)) for group in groups))]


def small_problem(seed: int) -> Groups:
    """A few groups; coarse or fine sizes and damages, with ties, dominated candidates and single ones."""
    rng = random.Random(seed)
    unit = rng.choice([1, 64, 999_983, 10**9])
    coarse = rng.random() < 0.5
    scale = rng.choice([1e-9, 1e-4, 1.0])

    def candidate() -> Candidate:
        size = rng.randrange(8) * unit if coarse else rng.randrange(8 * unit)
        return Candidate(size, scale * (rng.randrange(6) / 4 if coarse else 10 ** rng.uniform(-5, 0)))

    return [[candidate() for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 6))]


def model_problem(groups: int, candidates: int, seed: int, *, layers_alike: bool = False) -> Groups:
    """What a model gives: some sizes of modules, more bits for less damage, damages over five orders of magnitude."""
    rng = random.Random(seed)
    made: Groups = []
    for group in range(groups):
        weights = [1_500_000, 4_000_000, 8_000_000, 16_000_000][group % 4 if layers_alike else rng.randrange(4)]
        damage = 10 ** rng.uniform(-7, -2)
        bits = [6 * index / (candidates - 1) for index in range(candidates)]
        made.append([Candidate(int(weights * bit / 8), damage * 4**-bit * math.exp(rng.gauss(0, 0.2))) for bit in bits])
    return made


def check(groups: Groups, spending: Spending) -> None:
    assert (spending.bytes, spending.damage) == totals(groups, spending.choices)
    assert spending.gap >= 0


@pytest.mark.parametrize("seed", range(250))
def test_the_least_damage_of_all_choices(seed: int) -> None:
    groups = small_problem(seed)
    every = all_totals(groups)
    rng = random.Random(seed)
    # limits that a choice meets exactly, and some in between
    for limit in (*(rng.choice(every)[0] for _ in range(2)), rng.randint(min(every)[0], max(every)[0])):
        spending = spend(groups, max_bytes=limit)
        check(groups, spending)
        assert spending.bytes <= limit
        best = min(damage for size, damage in every if size <= limit)
        assert best <= spending.damage <= best * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(250))
def test_the_fewest_bytes_of_all_choices(seed: int) -> None:
    groups = small_problem(seed)
    every = all_totals(groups)
    rng = random.Random(seed)
    least, most = min(damage for _, damage in every), max(damage for _, damage in every)
    for limit in (*(rng.choice(every)[1] for _ in range(2)), rng.uniform(least, most)):
        spending = spend(groups, max_damage=limit)
        check(groups, spending)
        assert spending.damage <= limit
        best = min(size for size, damage in every if damage <= limit)
        assert best <= spending.bytes <= best * (1 + 1e-6)


@settings(max_examples=150)
@given(
    st.lists(
        st.lists(
            st.builds(
                Candidate,
                st.one_of(st.integers(0, 20), st.integers(0, 10**12)),
                st.one_of(st.just(0.0), st.floats(1e-9, 1.0), st.sampled_from([1e-9, 1e-3, 0.5, 1.0])),
            ),
            min_size=1,
            max_size=4,
        ),
        max_size=5,
    ),
    st.integers(0, 10**6),
)
def test_numbers_of_any_size(groups: Groups, pick: int) -> None:
    every = all_totals(groups)
    limit_bytes, limit_damage = every[pick % len(every)]
    for_bytes = spend(groups, max_bytes=limit_bytes)
    check(groups, for_bytes)
    assert for_bytes.bytes <= limit_bytes
    best = min(damage for size, damage in every if size <= limit_bytes)
    assert for_bytes.damage <= best * (1 + 1e-6)
    for_damage = spend(groups, max_damage=limit_damage)
    check(groups, for_damage)
    assert for_damage.damage <= limit_damage
    assert for_damage.bytes <= min(size for size, damage in every if damage <= limit_damage) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_128_groups(seed: int) -> None:
    groups = model_problem(128, 12, seed, layers_alike=seed == 2)
    smallest, largest = limits(groups)
    damages = []
    for percent in (1, 5, 10, 20, 40, 60, 80, 95, 100):
        limit = smallest.bytes + (largest.bytes - smallest.bytes) * percent // 100
        spending = spend(groups, max_bytes=limit)
        check(groups, spending)
        assert 0.995 * limit <= spending.bytes <= limit
        assert spending.gap <= 1.1e-6
        damages.append(spending.damage)
        # and back: that little damage takes no more bytes
        back = spend(groups, max_damage=spending.damage)
        check(groups, back)
        assert back.damage <= spending.damage
        assert back.bytes <= spending.bytes * (1 + 2e-6)
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == largest.damage


def test_more_bytes_never_do_more_damage() -> None:
    groups = model_problem(12, 6, 3)
    smallest, largest = limits(groups)
    steps = [smallest.bytes + (largest.bytes - smallest.bytes) * step // 60 for step in range(61)]
    spendings = [spend(groups, max_bytes=step) for step in steps]
    for less, more in itertools.pairwise(spendings):
        assert more.damage <= less.damage * (1 + 1e-6)
    assert totals(groups, spendings[0].choices) == (smallest.bytes, smallest.damage)
    assert totals(groups, spendings[-1].choices) == (largest.bytes, largest.damage)


def test_no_single_change_that_fits_would_help() -> None:
    groups = model_problem(60, 8, 4)
    smallest, largest = limits(groups)
    limit = (smallest.bytes + largest.bytes) // 2
    spending = spend(groups, max_bytes=limit)
    for row, group in enumerate(groups):
        for column in range(len(group)):
            size, damage = totals(groups, [*spending.choices[:row], column, *spending.choices[row + 1 :]])
            assert size > limit or damage >= spending.damage


def test_of_choices_with_as_many_bytes_the_better_is_taken() -> None:
    # two layers alike: either of them may have the bytes, and only the first makes much of them
    groups = [[Candidate(0, 0.5), Candidate(100, 0.1)], [Candidate(0, 0.5), Candidate(100, 0.4)]]
    assert spend(groups, max_damage=0.95) == Spending([1, 0], 100, 0.6, 0.0)


def test_a_dominated_candidate_is_not_taken() -> None:
    groups = [
        [Candidate(10, 0.5), Candidate(10, 0.5), Candidate(20, 0.5), Candidate(10, 0.6), Candidate(30, 0.1)],
        [Candidate(5, 0.0), Candidate(4, 0.0), Candidate(3, 1.0)],
    ]
    assert limits(groups) == (Candidate(13, 1.5), Candidate(34, 0.1))
    assert spend(groups, max_bytes=33).choices == [0, 1]
    assert spend(groups, max_bytes=1000) == Spending([4, 1], 34, 0.1, 0.0)
    assert spend(groups, max_damage=1000) == Spending([0, 2], 13, 1.5, 0.0)


def test_the_same_input_gives_the_same_output() -> None:
    groups = model_problem(200, 8, 5, layers_alike=True)
    limit = sum(limits(groups)[index].bytes for index in (0, 1)) // 2
    first = spend(groups, max_bytes=limit)
    assert spend(groups, max_bytes=limit) == first
    assert spend(groups, max_damage=first.damage) == spend(groups, max_damage=first.damage)


def test_without_time_the_gap_is_reported() -> None:
    groups = model_problem(128, 12, 0)
    smallest, largest = limits(groups)
    limit = smallest.bytes + (largest.bytes - smallest.bytes) // 20
    quick = spend(groups, max_bytes=limit, time_limit=0.0)
    best = spend(groups, max_bytes=limit)
    check(groups, quick)
    assert quick.bytes <= limit
    assert 0 < quick.gap < 0.01
    assert best.damage * (1 - 1e-6) <= quick.damage
    # the bound is one of the best choice
    assert quick.damage * (1 - quick.gap) <= best.damage * (1 + 1e-9)


def test_nothing_to_choose() -> None:
    assert spend([], max_bytes=0) == Spending([], 0, 0.0, 0.0)
    assert spend([], max_damage=0.0) == Spending([], 0, 0.0, 0.0)
    assert limits([]) == (Candidate(0, 0.0), Candidate(0, 0.0))
    only = [[Candidate(7, 0.25)], [Candidate(0, 0.0)]]
    assert spend(only, max_bytes=7) == spend(only, max_damage=0.25) == Spending([0, 0], 7, 0.25, 0.0)


GROUPS = [[Candidate(1000, 0.25), Candidate(5000, 0.125)], [Candidate(0, 0.5), Candidate(2000, 0.125)]]


def test_too_few_bytes() -> None:
    message = (
        "max_bytes 999 is below the smallest possible 1000 bytes, with damage 0.75; "
        "up to 7000 bytes help, with damage 0.25"
    )
    with pytest.raises(ConfigError) as raised:
        spend(GROUPS, max_bytes=999)
    assert str(raised.value) == message
    with pytest.raises(ConfigError, match="max_bytes -5 is below"):
        spend(GROUPS, max_bytes=-5)
    assert spend(GROUPS, max_bytes=1000) == Spending([0, 0], 1000, 0.75, 0.0)


def test_too_little_damage() -> None:
    message = (
        "max_damage 0.2 is below the smallest possible 0.25, with 7000 bytes; the largest is 0.75, with 1000 bytes"
    )
    with pytest.raises(ConfigError) as raised:
        spend(GROUPS, max_damage=0.2)
    assert str(raised.value) == message
    assert spend(GROUPS, max_damage=0.25) == Spending([1, 1], 7000, 0.25, 0.0)


@pytest.mark.parametrize(
    "candidate",
    [Candidate(-1, 0.0), Candidate(0, -1e-9), Candidate(0, math.nan), Candidate(0, math.inf)]
    + [Candidate(size, 0.0) for size in (math.nan, math.inf)],  # type: ignore[arg-type]
)
def test_impossible_numbers(candidate: Candidate) -> None:
    with pytest.raises(ValueError, match=r"a candidate takes .* bytes and does .* damage"):
        spend([[Candidate(1, 0.5), candidate]], max_bytes=10)
    with pytest.raises(ValueError, match="a candidate takes"):
        limits([[candidate]])


def test_impossible_limits() -> None:
    for numbers in ({}, {"max_bytes": 1, "max_damage": 1.0}):
        with pytest.raises(ValueError, match="spend takes either max_bytes or max_damage"):
            spend(GROUPS, **numbers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a limit is a finite number, got nan"):
        spend(GROUPS, max_damage=math.nan)
    with pytest.raises(ValueError, match="a group has no candidates"):
        spend([*GROUPS, []], max_bytes=10_000)


def test_a_solution_that_exceeds_the_limit_by_a_hair_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    margins = []
    solve = scipy.optimize.milp

    def sloppy(*args: Any, constraints: Any, **kwargs: Any) -> Any:
        # a solver with a far larger tolerance: it takes the limit as met until that is lowered by as much
        each, limit = constraints
        margins.append(1 - float(limit.ub[0]) / budget_module._SCALE)
        limit.ub = limit.ub * 1.1
        return solve(*args, constraints=[each, limit], **kwargs)

    groups = model_problem(40, 8, 1)
    smallest, largest = limits(groups)
    limit = smallest.bytes + (largest.bytes - smallest.bytes) // 10
    right = spend(groups, max_bytes=limit)
    monkeypatch.setattr(scipy.optimize, "milp", sloppy)
    spending = spend(groups, max_bytes=limit)
    check(groups, spending)
    assert len(margins) > 1
    assert margins == sorted(margins)
    assert spending.bytes <= limit
    assert right.damage * (1 - 1e-6) <= spending.damage <= right.damage * 1.05
    # proven with the limit as it was, and so an honest one
    assert spending.damage * (1 - spending.gap) <= right.damage * (1 + 1e-9)


def test_what_the_solver_prints_is_not_in_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    # unlike sys.stdout, the descriptor is what C writes to
    for seed in range(4):
        groups = model_problem(128, 12, seed)
        spend(groups, max_bytes=limits(groups)[1].bytes * 2 // 5)
    print("still there")
    assert capfd.readouterr().out == "still there\n"


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"scipy is not installed.*srd-modifier\[quantize\]"):
        spend(GROUPS, max_bytes=5000)


def test_scipy_is_only_imported_to_spend() -> None:
    code = (
        "import sys, srd_modifier, srd_modifier.selection.choice, srd_modifier.selection.budget; "
        "print([name for name in sys.modules if name.partition('.')[0] == 'scipy'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("count", [3_000, 12_000])
def test_a_large_mixture_of_experts(count: int) -> None:
    groups = model_problem(count, 8, 7)
    smallest, largest = limits(groups)
    for percent in (5, 40, 90):
        limit = smallest.bytes + (largest.bytes - smallest.bytes) * percent // 100
        spending = spend(groups, max_bytes=limit)
        check(groups, spending)
        assert 0.995 * limit <= spending.bytes <= limit
        assert spending.gap <= 1.001e-4
        back = spend(groups, max_damage=spending.damage)
        check(groups, back)
        assert back.damage <= spending.damage
        assert back.gap <= 1.001e-4
