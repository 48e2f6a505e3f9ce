"""The values a weight may take: against plain arithmetic and compressed-tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_modifier.qat.grid import Grid, search_grid


def weight_of(seed: int, rows: int = 5, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


@given(seed=st.integers(0, 10_000), group_size=st.sampled_from([16, 32, 64, 128]))
def test_levels_and_values_are_each_others_inverse(seed, group_size):
    grid = search_grid(weight_of(seed), group_size=group_size)
    levels = torch.randint(-8, 8, (5, 128), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(grid.levels(grid.values(levels)), levels)


@given(seed=st.integers(0, 10_000))
def test_a_searched_grid_loses_no_more_than_the_extremes_own(seed):
    weight = weight_of(seed)
    grid = search_grid(weight, group_size=64)
    plain = Grid((weight.view(5, 2, 64).abs().amax(-1) / 7.5).bfloat16().float(), -8, 7)

    def loss(own: Grid) -> float:
        return (own.nearest(weight) - weight).square().sum().item()

    assert loss(grid) <= loss(plain) * (1 + 1e-6)


def test_scales_are_stored_numbers():
    scale = search_grid(weight_of(0), group_size=64).scale
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.bfloat16().float())


def test_a_group_of_zeros_stays_zero():
    weight = weight_of(0)
    weight[1, 64:] = 0
    grid = search_grid(weight, group_size=64)
    assert grid.scale[1, 1] == 0
    assert torch.equal(grid.nearest(weight)[1, 64:], torch.zeros(64))


@given(seed=st.integers(0, 10_000), minimum=st.booleans())
def test_a_pulled_weight_rounds_to_its_level_and_stays_near(seed, minimum):
    weight = weight_of(seed)
    grid = search_grid(weight, group_size=64)
    if minimum:
        grid = Grid(grid.scale.abs(), 0, 15, minimum=grid.scale.abs() * 7.7)
    levels = torch.randint(grid.low, grid.high + 1, (5, 128), generator=torch.Generator().manual_seed(seed)).float()
    pulled = grid.pull(weight, levels)
    assert torch.equal(grid.levels(pulled), levels)
    inside = (grid.steps(weight).flatten(1) - levels).abs() < 0.48
    assert torch.equal(pulled[inside], weight[inside])


@pytest.mark.parametrize(("low", "high", "bits"), [(-8, 7, 4), (0, 15, 4), (-32, 31, 6), (-16, 15, 5), (-127, 127, 8)])
def test_bits(low, high, bits):
    assert Grid(torch.ones(1, 1), low, high).bits == bits
