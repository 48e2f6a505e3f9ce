import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.spending import choose_within, residual_bytes
from srd_modifier.errors import ConfigError
from srd_modifier.modifier.allocation import allocate
from srd_modifier.modifier.candidates import DEFAULT_CANDIDATES, CandidateStore, StoredCandidate
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.budget import Budget, Candidate
from srd_modifier.selection.fusion import fused_groups

# what a residual of so many bits leaves of the damage, about
LEFT = {fmt: 0.25**fmt.bits if fmt.density == 1 else 0.8 for fmt in DEFAULT_CANDIDATES}


@pytest.fixture(scope="module")
def base(finished_checkpoint: Path) -> BaseCheckpoint:
    return BaseCheckpoint(finished_checkpoint)


@pytest.fixture
def make_store(base, tmp_path) -> Callable[..., tuple[CandidateStore, dict[str, ModuleSensitivity]]]:
    """Candidates of the finished checkpoint's modules, whose damage is invented; `plain` ones have no candidates."""

    def make(
        formats: tuple[ResidualFormat, ...] = DEFAULT_CANDIDATES, plain: tuple[str, ...] = (), scale: float = 1e-4
    ) -> tuple[CandidateStore, dict[str, ModuleSensitivity]]:
        store, damages = CandidateStore(tmp_path), {}
        for i, name in enumerate(base.quantized_modules):
            w4 = scale * (1 + i * 7 % 13)
            damages[name] = ModuleSensitivity(w4=w4)
            if name not in plain:
                left = [ModuleSensitivity(w4=w4, corrected=w4 * LEFT.get(fmt, 0.5), mixed=0.0) for fmt in formats]
                candidates = [StoredCandidate(*pair) for pair in zip(formats, left, strict=True)]
                store.write(name, base.weight_shape(name), candidates, [])
        return store, damages

    return make


def spent(store: CandidateStore, chosen: dict[str, int], *, in_file: bool) -> int:
    return sum(residual_bytes(name, store.entry(name, number), in_file=in_file) for name, number in chosen.items())


def left(store: CandidateStore, damages: dict[str, ModuleSensitivity], chosen: dict[str, int]) -> float:
    return math.fsum(
        store.candidates[name][chosen[name]].sensitivity.damage(1.0) if name in chosen else damage.w4
        for name, damage in damages.items()
    )


@pytest.mark.parametrize("bits", [4.6, 5.0, 5.5, 6.5, 8.0, 11.0])
def test_bits_per_weight_are_never_exceeded_and_nearly_used_up(bits, make_store, finished_checkpoint):
    store, damages = make_store()
    chosen = allocate(Budget(bits_per_weight=bits), store, damages, finished_checkpoint)
    size = measure(finished_checkpoint, corrected=())
    used = size.bits_per_weight + 8 * spent(store, chosen, in_file=False) / size.quantized_weights
    assert 0.995 * bits <= used <= bits


@pytest.mark.parametrize("extra", [30_000, 60_000, 120_000, 180_000])
def test_bytes_are_never_exceeded_and_nearly_used_up(extra, make_store, finished_checkpoint):
    store, damages = make_store()
    plain = measure(finished_checkpoint, corrected=()).bytes_on_disk
    chosen = allocate(Budget(bytes=plain + extra), store, damages, finished_checkpoint)
    assert 0.98 * extra <= spent(store, chosen, in_file=True) <= extra


@pytest.mark.parametrize(
    "budget", [Budget(bits_per_weight=4.8), Budget(bits_per_weight=7), Budget(max_divergence=1e-3)]
)
def test_modules_that_are_fused_get_one_candidate(budget, make_store, finished_checkpoint):
    store, damages = make_store()
    chosen = allocate(budget, store, damages, finished_checkpoint)
    assert chosen
    for group in fused_groups(list(store.candidates)):
        assert len({chosen.get(name) for name in group}) == 1, group
    assert len({chosen.get(group[0]) for group in fused_groups(list(store.candidates))}) > 1


def test_more_bytes_leave_less(make_store, finished_checkpoint):
    store, damages = make_store()
    lefts = [
        left(store, damages, allocate(Budget(bits_per_weight=bits), store, damages, finished_checkpoint))
        for bits in (4.6, 5, 6, 7, 9, 12)
    ]
    assert lefts == sorted(lefts, reverse=True)
    assert len(set(lefts)) == len(lefts)


def test_a_budget_for_everything_takes_the_best_of_everything(make_store, finished_checkpoint):
    store, damages = make_store()
    chosen = allocate(Budget(bytes=10**9), store, damages, finished_checkpoint)
    best = next(i for i, fmt in enumerate(DEFAULT_CANDIDATES) if fmt.bits == 8)
    assert chosen == dict.fromkeys(store.candidates, best)


def test_room_for_nothing_leaves_w4(make_store, finished_checkpoint):
    store, damages = make_store()
    plain = measure(finished_checkpoint, corrected=())
    assert allocate(Budget(bytes=plain.bytes_on_disk), store, damages, finished_checkpoint) == {}
    # rounded down to a byte, the bits of the W4 model itself are one byte short
    bits = math.nextafter(plain.bits_per_weight, math.inf)
    assert allocate(Budget(bits_per_weight=bits), store, damages, finished_checkpoint) == {}


def test_modules_without_candidates_stay_as_they_are_and_count(make_store, base, finished_checkpoint):
    plain = tuple(name for name in base.quantized_modules if ".mlp." in name)
    store, damages = make_store(plain=plain)
    chosen = allocate(Budget(max_divergence=0.02), store, damages, finished_checkpoint)
    assert chosen
    assert not set(chosen) & set(plain)
    rest = math.fsum(damages[name].w4 for name in plain)
    with pytest.raises(ConfigError, match="out of reach"):
        allocate(Budget(max_divergence=rest), store, damages, finished_checkpoint)


@pytest.mark.parametrize("unit", ["bytes", "bits"])
def test_a_budget_below_w4_names_the_smallest_and_the_largest(unit, make_store, finished_checkpoint):
    store, damages = make_store()
    plain = measure(finished_checkpoint, corrected=())
    in_bytes = unit == "bytes"
    budget = Budget(bytes=plain.bytes_on_disk - 1) if in_bytes else Budget(bits_per_weight=plain.bits_per_weight - 0.01)
    with pytest.raises(
        ConfigError, match=rf"^a budget of {re.escape(str(budget))} is too small: the W4 model"
    ) as caught:
        allocate(budget, store, damages, finished_checkpoint)
    smallest, largest = re.search(
        r"takes (\S+)(?: bytes)? without residuals, and up to (\S+)(?: bytes)? help$", str(caught.value)
    ).groups()  # type: ignore[union-attr]
    best = dict.fromkeys(store.candidates, next(i for i, fmt in enumerate(DEFAULT_CANDIDATES) if fmt.bits == 8))
    if in_bytes:
        assert smallest == f"{plain.bytes_on_disk:,}"
        assert largest == f"{plain.bytes_on_disk + spent(store, best, in_file=True):,}"
        enough = Budget(bytes=int(largest.replace(",", "")))
    else:
        assert float(smallest.removesuffix("bpw")) == pytest.approx(plain.bits_per_weight, rel=1e-3)
        enough = Budget(bits_per_weight=float(largest.removesuffix("bpw")) * 1.001)
    assert allocate(enough, store, damages, finished_checkpoint) == best


def test_a_divergence_is_reached_with_the_fewest_bytes(make_store, finished_checkpoint):
    formats = DEFAULT_CANDIDATES[1:4:2]  # of 2 and of 4 bits
    store, damages = make_store(formats)
    # few enough choices to try them all: the rest of the groups has no candidates
    for name in list(store.candidates)[7:]:
        del store.candidates[name], store.shapes[name]
    groups = fused_groups(list(store.candidates))
    worst = left(store, damages, {})
    best = left(store, damages, dict.fromkeys(store.candidates, 1))
    for share in (0.05, 0.3, 0.5, 0.8, 0.95):
        limit = best + share * (worst - best)
        chosen = allocate(Budget(max_divergence=limit), store, damages, finished_checkpoint)
        assert left(store, damages, chosen) <= limit
        tried = []
        for numbers in product((None, 0, 1), repeat=len(groups)):
            other = {name: n for group, n in zip(groups, numbers, strict=True) if n is not None for name in group}
            if left(store, damages, other) <= limit:
                tried.append(spent(store, other, in_file=True))
        assert spent(store, chosen, in_file=True) == min(tried)


def test_a_divergence_that_w4_has_already_takes_nothing(make_store, finished_checkpoint):
    store, damages = make_store()
    limit = left(store, damages, {}) * (1 + 1e-9)
    assert allocate(Budget(max_divergence=limit), store, damages, finished_checkpoint) == {}


def test_a_divergence_out_of_reach_names_what_is_possible(make_store, finished_checkpoint):
    store, damages = make_store()
    everything = dict.fromkeys(store.candidates, next(i for i, f in enumerate(DEFAULT_CANDIDATES) if f.bits == 8))
    reachable = left(store, damages, everything)
    message = (
        f"max_divergence {Budget(max_divergence=reachable / 2)} is out of reach: the W4 model has a predicted "
        f"{left(store, damages, {}):.3g} without residuals and {reachable:.3g} with all that help"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        allocate(Budget(max_divergence=reachable / 2), store, damages, finished_checkpoint)


def test_modules_without_damage_get_nothing(make_store, finished_checkpoint):
    # as the experts that no token reached
    store, damages = make_store(scale=0.0)
    assert allocate(Budget(bits_per_weight=8), store, damages, finished_checkpoint) == {}


def test_groups_of_no_candidates_but_w4(finished_checkpoint):
    plain = measure(finished_checkpoint, corrected=())
    spending = choose_within(Budget(bits_per_weight=9), [[Candidate(0, 0.5)]], plain, "the model")
    assert (spending.choices, spending.bytes, spending.damage) == ([0], 0, 0.5)


def test_bytes_in_a_file_are_a_few_more_than_those_of_the_tensors(make_store):
    store, _ = make_store()
    for name in store.candidates:
        for number in range(len(DEFAULT_CANDIDATES)):
            entry = store.entry(name, number)
            tensors = residual_bytes(name, entry, in_file=False)
            assert tensors == entry.format.bytes(entry.out_features, entry.in_features)
            assert tensors < residual_bytes(name, entry, in_file=True) < tensors + 1500


def test_the_log_says_what_was_spent(make_store, finished_checkpoint, log):
    store, damages = make_store()
    chosen = allocate(Budget(bits_per_weight=5.5), store, damages, finished_checkpoint)
    (message,) = log
    assert message.startswith(f"SRD corrects {len(chosen)} of 42 modules within 5.5 bpw: ")
    assert f"{spent(store, chosen, in_file=False):,} bytes of residual" in message
    assert f"predicted divergence {left(store, damages, chosen):.3g}" in message
