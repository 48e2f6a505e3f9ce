"""Rounding in the forward pass: values, widths between two grids, and gradients against finite differences."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_modifier.errors import ConfigError
from srd_modifier.qat.fake_quantizer import FakeQuantizer
from srd_modifier.qat.grid import Grid, search_grid

ROWS, COLUMNS, GROUP = 6, 64, 16


def weight_of(seed: int = 0, spread: float = 0.05) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * spread


def symmetric(weight: torch.Tensor) -> Grid:
    return search_grid(weight, group_size=GROUP)


def with_minimum(seed: int = 1) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(ROWS, COLUMNS // GROUP, generator=generator) * 0.01 + 0.01
    return Grid(scale, 0, 15, minimum=scale * 7.3)


def by_hand(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Entry by entry, in Python's own numbers."""
    result = torch.empty_like(weight)
    columns = weight.shape[1] // grid.scale.shape[1]
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scale = grid.scale[row, column // columns].item()
            minimum = 0.0 if grid.minimum is None else grid.minimum[row, column // columns].item()
            level = min(max(round((weight[row, column].item() + minimum) / scale), grid.low), grid.high)
            result[row, column] = scale * level - minimum
    return result


@pytest.mark.parametrize("grid", [symmetric(weight_of()), with_minimum()], ids=["symmetric", "minimum"])
def test_at_its_own_width_the_weight_is_on_the_grid(grid):
    weight = weight_of()
    quantizer = FakeQuantizer(grid)
    torch.testing.assert_close(quantizer(weight), by_hand(weight, grid), rtol=0, atol=1e-7)
    quantizer.width = 2.0  # a tensor with more bits than the schedule's last width stays at its own
    assert torch.equal(quantizer(weight), grid.nearest(weight))


def test_at_full_precision_the_weight_is_the_weight():
    weight = weight_of().requires_grad_()
    quantizer = FakeQuantizer(symmetric(weight))
    for width in (16.0, 32.0):
        quantizer.width = width
        assert quantizer(weight) is weight


@given(lower=st.integers(4, 15), share=st.floats(0.01, 0.99))
def test_a_width_between_two_is_the_mean_of_their_grids(lower, share):
    weight = weight_of()
    quantizer = FakeQuantizer(symmetric(weight))

    def at(width: float) -> torch.Tensor:
        quantizer.width = width
        return quantizer(weight)

    expected = at(lower) * (1 - share) + at(lower + 1) * share
    torch.testing.assert_close(at(lower + share), expected, rtol=0, atol=1e-6)


def test_each_bit_about_halves_the_error():
    weight = weight_of()
    quantizer = FakeQuantizer(symmetric(weight))
    errors = []
    for width in range(4, 16):
        quantizer.width = width
        errors.append((quantizer(weight) - weight).square().mean().sqrt().item())
    assert all(0.35 < after / before < 0.65 for before, after in pairwise(errors))


@pytest.mark.parametrize("width", [4.0, 4.3, 7.0, 15.5])
@pytest.mark.parametrize("grid", [symmetric(weight_of(spread=0.02)), with_minimum()], ids=["symmetric", "minimum"])
def test_the_gradient_is_that_of_a_straight_line_inside_the_range(grid, width):
    """Against differences of the line that the estimator takes for rounding: clipped, but not rounded."""
    weight = weight_of(spread=0.06).double()
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    quantizer = FakeQuantizer(grid)
    quantizer.width = width
    leaf = weight.float().requires_grad_()
    quantizer(leaf).mul(direction.float()).sum().backward()

    scale = grid.scale.double().repeat_interleave(GROUP, dim=1)
    minimum = 0.0 if grid.minimum is None else grid.minimum.double().repeat_interleave(GROUP, dim=1)
    clipped_share = max(0.0, 1 - (width - 4))

    def line(value: torch.Tensor) -> torch.Tensor:
        inside = ((value + minimum) / scale).clamp(grid.low - 0.5, grid.high + 0.5) * scale - minimum
        return (clipped_share * inside + (1 - clipped_share) * value).mul(direction)

    step = 1e-6
    differences = (line(weight + step) - line(weight - step)) / (2 * step)
    assert leaf.grad is not None
    near_the_edge = (line(weight + step) - 2 * line(weight) + line(weight - step)).abs() > 1e-9
    torch.testing.assert_close(leaf.grad.double()[~near_the_edge], differences[~near_the_edge], rtol=1e-5, atol=1e-6)
    assert bool((differences == 0).any()) == (width == 4.0), "some entries should be clipped"


def test_learned_scales_have_the_derivative_of_lsq():
    weight = weight_of(spread=0.06)
    grid = Grid(symmetric(weight).scale.abs() * 0.8, -8, 7)  # so that some entries are clipped
    quantizer = FakeQuantizer(grid, learned_scale=True)
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    quantizer(weight).mul(direction).sum().backward()
    assert quantizer.log_factor is not None
    assert quantizer.log_factor.grad is not None
    # grid.scale may not be a bfloat16 number, and the quantizer's is
    scale = quantizer.grid.scale
    expected = torch.zeros_like(scale)
    for row in range(ROWS):
        for column in range(COLUMNS):
            steps = (weight[row, column] / scale[row, column // GROUP]).item()
            level = min(max(round(steps), -8), 7)
            slope = level - steps if -8.5 <= steps <= 7.5 else level
            expected[row, column // GROUP] += direction[row, column] * slope * grid.scale[row, column // GROUP] * 10
    torch.testing.assert_close(quantizer.log_factor.grad, expected, rtol=1e-3, atol=1e-4)


def test_learned_scales_have_a_gradient_at_full_precision_too():
    """DDP waits for one from every parameter."""
    weight = weight_of().requires_grad_()
    quantizer = FakeQuantizer(symmetric(weight), learned_scale=True)
    quantizer.width = 16.0
    assert torch.equal(quantizer(weight), weight)
    quantizer(weight).sum().backward()
    assert quantizer.log_factor is not None
    assert torch.equal(quantizer.log_factor.grad, torch.zeros_like(quantizer.log_factor))
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_learned_scales_are_bfloat16_numbers():
    quantizer = FakeQuantizer(symmetric(weight_of()), learned_scale=True)
    assert quantizer.log_factor is not None
    torch.nn.init.uniform_(quantizer.log_factor, -0.01, 0.01)
    scale = quantizer.grid.scale
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(quantizer(weight_of()), quantizer.grid.nearest(weight_of()))


def test_learned_scales_of_coded_scales_are_refused():
    with pytest.raises(ConfigError, match="w4a16 grid only"):
        FakeQuantizer(with_minimum(), learned_scale=True)


def test_the_weight_keeps_its_dtype_and_rounding_is_done_in_float32():
    weight = weight_of().bfloat16()
    grid = symmetric(weight)
    assert torch.equal(FakeQuantizer(grid)(weight), grid.nearest(weight.float()).bfloat16())


def test_nothing_but_the_arguments_is_kept_for_the_backward_pass():
    weight = weight_of().requires_grad_()
    quantizer = FakeQuantizer(symmetric(weight))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantizer(weight)
    assert {tensor.data_ptr() for tensor in kept} == {weight.data_ptr(), quantizer.scale.data_ptr()}
