import hashlib

import pytest
import torch

from srd_modifier.residual.rounding import round_, uniform_noise


def reference_noise(count: int, seed: int, key: str) -> list[float]:
    """Philox 4x64-10 (Salmon et al. 2011) with Python's integers; the counter starts at 1, as in NumPy."""
    whole = 2**64 - 1
    words: list[int] = []
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    for counter in range(1, count // 8 + 2):
        a, b, c, d = counter, 0, 0, 0
        k0, k1 = seed, first
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (right >> 64) ^ b ^ k0, right & whole, (left >> 64) ^ d ^ k1, left & whole
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & whole, (k1 + 0xBB67AE8584CAA73B) & whole
        words += [half for word in (a, b, c, d) for half in (word & 0xFFFFFFFF, word >> 32)]
    return [(word >> 8) / 2**24 - 0.5 for word in words[:count]]


def test_golden_noise() -> None:
    # a change of these makes every stored dithered residual decode to something else
    golden = [-5949825, 1984615, -5246067, -8090261, 2771277, 969638, -2058108, 4086425]
    assert (uniform_noise((2, 4), 0, "a") * 2**24).flatten().tolist() == golden


@pytest.mark.parametrize(("seed", "key"), [(0, ""), (7, "model.layers.0.mlp.up_proj"), (2**63 - 1, "é")])
def test_noise_equals_the_reference_generator(seed: int, key: str) -> None:
    assert uniform_noise((5, 7), seed, key).flatten().tolist() == reference_noise(35, seed, key)


def test_noise_is_float32_on_the_half_open_interval() -> None:
    noise = uniform_noise((1000, 1001), 3, "k")
    assert noise.dtype == torch.float32
    assert noise.shape == (1000, 1001)
    assert -0.5 <= noise.min() < -0.49999
    assert 0.49999 < noise.max() < 0.5
    assert torch.equal((noise * 2**24).round(), noise * 2**24)


def test_noise_has_the_moments_of_the_uniform() -> None:
    noise = uniform_noise((1000, 1000), 0, "k").double()
    # four standard errors: sd of u is 12**-0.5, of u**2 is 180**-0.5
    assert noise.mean().abs() < 4 * 12**-0.5 / 1000
    assert (noise.square().mean() - 1 / 12).abs() < 4 * 180**-0.5 / 1000
    flat = noise.flatten()
    assert (flat[1:] * flat[:-1]).mean().abs() < 4 / 12 / 1000


@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (3, 8), (8, 3)])
def test_noise_follows_the_flat_order_whatever_the_shape(shape: tuple[int, int]) -> None:
    assert torch.equal(uniform_noise(shape, 1, "k").flatten(), uniform_noise((4, 6), 1, "k").flatten())


def test_noise_of_fewer_entries_is_a_prefix() -> None:
    long = uniform_noise((1, 100), 1, "k").flatten()
    for count in (1, 2, 7, 99):
        assert torch.equal(uniform_noise((1, count), 1, "k").flatten(), long[:count])


def test_seed_and_key_select_the_noise() -> None:
    one = uniform_noise((8, 8), 0, "a")
    assert torch.equal(one, uniform_noise((8, 8), 0, "a"))
    assert not torch.equal(one, uniform_noise((8, 8), 1, "a"))
    assert not torch.equal(one, uniform_noise((8, 8), 0, "b"))


def test_noise_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniform_noise((8, 8), 0, "a")
    assert torch.equal(torch.get_rng_state(), before)


STEPS = torch.tensor([-1.5, -0.6, -0.5, 0.0, 0.25, 0.5, 1.5, 2.75])


def test_nearest_needs_no_noise_and_rounds_ties_to_even() -> None:
    assert round_(STEPS.clone(), "nearest", None).tolist() == [-2, -1, 0, 0, 0, 0, 2, 3]


@pytest.mark.parametrize("u", [-0.5, -0.25, 0.0, 0.4375])
def test_stochastic_is_the_floor_of_x_plus_u_plus_a_half(u: float) -> None:
    rounded = round_(STEPS.clone(), "stochastic", torch.full_like(STEPS, u))
    assert rounded.tolist() == [(x + u + 0.5) // 1 for x in STEPS.tolist()]


def test_stochastic_takes_one_of_the_two_neighbours_and_keeps_whole_numbers() -> None:
    x = torch.linspace(-8, 8, 1025)  # steps of 1/64
    noise = uniform_noise((1, 1025), 0, "k").flatten()
    rounded = round_(x.clone(), "stochastic", noise)
    assert bool(((rounded == x.floor()) | (rounded == x.ceil())).all())


@pytest.mark.parametrize("u", [-0.5, -0.25, 0.0, 0.4375])
def test_dithered_rounds_x_plus_u_to_nearest(u: float) -> None:
    rounded = round_(STEPS.clone(), "dithered", torch.full_like(STEPS, u))
    assert rounded.tolist() == [round(x + u) for x in STEPS.tolist()]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "dithered"])
def test_rounding_is_in_place(rounding: str) -> None:
    scaled = STEPS.clone()
    assert round_(scaled, rounding, torch.zeros_like(STEPS)) is scaled
