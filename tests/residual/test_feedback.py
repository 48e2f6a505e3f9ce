import pytest
import torch
from torch import Tensor

from srd_modifier.residual.feedback import Grid, ScaleFit, descend, round_with_feedback
from srd_modifier.residual.hessian import Hessian

# columns and columns per group: the blocks of the implementation are 64 columns
SHAPES = [(1, 8), (37, 8), (64, 64), (130, 50), (200, 128)]
each_shape = pytest.mark.parametrize(("columns", "per_group"), SHAPES)
# lowest and highest level
WIDTHS = {"1 bit": (-0.5, 0.5), "2 bits": (-1.5, 1.5), "4 bits": (-7.5, 7.5), "8 bits": (-127, 127), "W4": (-8, 7)}
each_width = pytest.mark.parametrize("width", WIDTHS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int = 0) -> Tensor:
    """Second moment of inputs that a few directions make up, with some noise and columns of unequal size."""
    mixing = gaussian(columns, max(1, columns // 8), seed=seed) * gaussian(columns, 1, seed=seed + 1).exp()
    return mixing @ mixing.T + 0.1 * torch.eye(columns)


def grid_of(width: str, rows: int) -> Grid:
    low, high = WIDTHS[width]
    offset = torch.full((1, rows), low % 1)
    return Grid(offset, torch.full((1, rows), float(low)), torch.full((1, rows), float(high)))


def some_scales(target: Tensor, groups: Tensor, width: str) -> Tensor:
    """Per group and row a scale that clips some entries, of either sign."""
    extreme = torch.stack([target[groups == group].abs().amax(dim=0) for group in range(int(groups[-1]) + 1)])
    sign = gaussian(*extreme.shape, seed=9).sign()
    return sign * extreme / max(WIDTHS[width][1], 1.0) * 0.8


def problem(columns: int, per_group: int, width: str, rows: int = 12) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """A target `[in, rows]`, its scales and groups, and the levels."""
    target = gaussian(columns, rows, seed=columns)
    groups = torch.arange(columns) // per_group
    return target, some_scales(target, groups, width), groups, grid_of(width, rows)


def to_level(steps: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest level, found by comparing with every one between -130 and 130; all of one shape, or broadcast."""
    all_levels = torch.arange(-130.0, 131.0, dtype=torch.float64) + offset.double().unsqueeze(-1)
    inside = (all_levels >= low.unsqueeze(-1)) & (all_levels <= high.unsqueeze(-1))
    distance = torch.where(inside, (steps.double().unsqueeze(-1) - all_levels).abs(), torch.inf)
    return all_levels.expand_as(distance).gather(-1, distance.argmin(-1, keepdim=True)).squeeze(-1)


def nearest(target: Tensor, scale: Tensor, groups: Tensor, grid: Grid) -> Tensor:
    """Each entry's nearest level, on its own."""
    return to_level(target / scale[groups], grid.offset, grid.low, grid.high)


def obs(
    target: Tensor, scale: Tensor, groups: Tensor, grid: Grid, hessian: Hessian, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper has it: round a column, spread its error by the inverse Hessian, and eliminate the column.

    Everything in float64, no blocks and no factor. Of a sparse target, each 64 columns keep as many entries as `keep`
    plans, those of the largest `w^2 / inverse_jj` at the block's start, with the inverse at column j's own turn.
    """
    matrix = hessian.regularized.double()
    work, order = target.double().clone(), hessian.order.tolist()
    columns, rows = work.shape
    own_turn = torch.empty(columns, dtype=torch.float64)
    for i, column in enumerate(order if keep is not None else []):
        own_turn[column] = matrix[order[i:]][:, order[i:]].inverse()[0, 0]
    kept = torch.ones(columns, rows, dtype=torch.bool)
    levels = torch.zeros(columns, rows, dtype=torch.float64)
    inverse = matrix.inverse()
    for i, column in enumerate(order):
        if keep is not None and i % 64 == 0:
            block = order[i : i + 64]
            cost = (work[block].square() / own_turn[block, None]).flatten()
            chosen = torch.zeros(len(cost), dtype=torch.bool)
            chosen[cost.argsort(descending=True)[: int(keep[block].sum())]] = True
            kept[block] = chosen.view(len(block), rows)
        row = column if len(grid.low) > 1 else 0
        own = scale[groups[column]].double()
        steps = torch.where(own == 0, 0.0, work[column] / own)
        level = to_level(steps, grid.offset[0], grid.low[row], grid.high[row])
        levels[column] = level * kept[column]
        error = (work[column] - levels[column] * own) / inverse[column, column]
        work -= inverse[:, column, None] * error
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0
    return levels, kept


def loss_of(target: Tensor, levels: Tensor, scale: Tensor, groups: Tensor, hessian: Hessian) -> Tensor:
    """What feedback lowers, per row, in float64."""
    error = target.double() - levels.double() * scale.double()[groups]
    return (error * (hessian.regularized.double() @ error)).sum(dim=0)


def assert_almost_all_equal(levels: Tensor, expected: Tensor) -> None:
    """Alike but for a row that a tie, or a rounding error as good as one, sent another way."""
    different = levels.double() != expected.double()
    assert different.any(dim=0).sum() <= 1
    assert different.double().mean() <= 0.01 or different.shape[0] * different.shape[1] < 100


# --- feedback ------------------------------------------------------------------------------------------------------


@each_width
@each_shape
def test_feedback_is_gptq(columns: int, per_group: int, width: str) -> None:
    target, scale, groups, grid = problem(columns, per_group, width)
    hessian = Hessian.prepare(correlated(columns))
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian)
    assert kept is None
    assert_almost_all_equal(levels, obs(target, scale, groups, grid, hessian)[0])


@each_width
def test_feedback_loses_less_than_nearest(width: str) -> None:
    target, scale, groups, grid = problem(130, 50, width)
    hessian = Hessian.prepare(correlated(130))
    plain = nearest(target, scale, groups, grid)
    levels, _ = round_with_feedback(target, scale, groups, grid, hessian)
    lost, lost_by_plain = (loss_of(target, some, scale, groups, hessian).sum() for some in (levels, plain))
    assert 2 * lost < lost_by_plain


@each_width
@each_shape
def test_without_correlations_feedback_is_nearest(columns: int, per_group: int, width: str) -> None:
    target, scale, groups, grid = problem(columns, per_group, width)
    plain = nearest(target, scale, groups, grid)
    for moment in (torch.zeros(columns, columns), torch.diag(gaussian(columns).square())):
        hessian = Hessian.prepare(moment)
        levels, _ = round_with_feedback(target, scale, groups, grid, hessian)
        assert torch.equal(levels.double(), plain)
        assert torch.equal(descend(target, levels, scale, groups, grid, hessian), levels)


@pytest.mark.parametrize(
    ("step", "offset", "expected"),
    [(0.49, 0.0, 0.0), (0.51, 0.0, 1.0), (-7.2, 0.0, -7.0), (-9.0, 0.0, -8.0), (0.01, 0.5, 0.5), (-0.01, 0.5, -0.5),
     (6.9, 0.5, 6.5), (7.1, 0.5, 7.5), (99.0, 0.5, 7.5), (-99.0, 0.5, -7.5)],
)  # fmt: skip
def test_the_nearest_level(step: float, offset: float, expected: float) -> None:
    low, high = (-7.5, 7.5) if offset else (-8.0, 7.0)
    grid = Grid(torch.tensor([[offset]]), torch.tensor([[low]]), torch.tensor([[high]]))
    assert grid.nearest(torch.tensor([step]), 5).tolist() == [expected]


def test_rows_may_have_their_own_levels() -> None:
    target = gaussian(70, 8)
    groups = torch.arange(70) // 32
    low, high = torch.tensor([[-0.5, -1.5, -8, -127] * 2]), torch.tensor([[0.5, 1.5, 7, 127] * 2])
    grid = Grid(torch.tensor([[0.5, 0.5, 0, 0] * 2]), low, high)
    scale = (gaussian(3, 8, seed=1).abs() + 1) / high
    hessian = Hessian.prepare(correlated(70))
    levels, _ = round_with_feedback(target, scale, groups, grid, hessian)
    assert_almost_all_equal(levels, obs(target, scale, groups, grid, hessian)[0])
    improved = descend(target, levels, scale, groups, grid, hessian)
    for found in (levels, improved):
        assert torch.equal(found - grid.offset, (found - grid.offset).round())
        assert bool(((found >= low) & (found <= high)).all())
    for row in range(8):
        one = slice(row, row + 1)
        alone = Grid(grid.offset[:, one], low[:, one], high[:, one])
        own, _ = round_with_feedback(target[:, one], scale[:, one], groups, alone, hessian)
        assert (own != levels[:, one]).sum() <= 1


@each_shape
def test_entries_may_have_their_own_bounds(columns: int, per_group: int) -> None:
    target, scale, groups, _ = problem(columns, per_group, "W4")
    steps = target / scale[groups]
    low = (steps - 0.7).ceil().clamp(-8, 7)
    high = torch.maximum(low, (steps + 0.7).floor().clamp(-8, 7))
    grid = Grid(torch.zeros(1, 12), low, high)
    hessian = Hessian.prepare(correlated(columns))
    levels, _ = round_with_feedback(target, scale, groups, grid, hessian)
    assert_almost_all_equal(levels, obs(target, scale, groups, grid, hessian)[0])
    improved = descend(target, levels, scale, groups, grid, hessian)
    for found in (levels, improved):
        assert torch.equal(found, found.round())
        assert bool(((found >= low) & (found <= high)).all())
    # and a start that lies beyond them is brought back
    far = descend(target, levels + 20, scale, groups, grid, hessian, sweeps=1)
    assert bool(((far >= low) & (far <= high)).all())


@each_width
def test_a_group_of_scale_0_passes_everything_on(width: str) -> None:
    target, scale, groups, grid = problem(130, 50, width)
    scale[1, :6], scale[:, 7] = 0, 0
    hessian = Hessian.prepare(correlated(130))
    levels, _ = round_with_feedback(target, scale, groups, grid, hessian)
    improved = descend(target, levels, scale, groups, grid, hessian)
    assert bool(torch.isfinite(levels).all() & torch.isfinite(improved).all())
    other = scale[groups] != 0
    expected, _ = obs(target, scale, groups, grid, hessian)
    assert_almost_all_equal(levels * other, expected * other)
    before, after = (loss_of(target, some, scale, groups, hessian) for some in (levels, improved))
    assert bool((after <= before * (1 + 1e-5)).all())


def test_inputs_are_left_alone() -> None:
    target, scale, groups, grid = problem(130, 50, "2 bits")
    hessian = Hessian.prepare(correlated(130))
    keep = gaussian(130, 12, seed=3) > 0.5
    inputs = [target, scale, groups, grid.low, grid.high, grid.offset, hessian.regularized, hessian.factor, keep]
    copies = [tensor.clone() for tensor in inputs]
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=keep)
    start = levels.clone()
    descend(target, levels, scale, groups, grid, hessian, keep=kept)
    fit = ScaleFit.of(target, hessian.regularized @ target, levels, groups, hessian)
    fit.loss(fit.solve(scale))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    assert torch.equal(levels, start)


# --- sparse --------------------------------------------------------------------------------------------------------


def planned(columns: int, rows: int, density: float, seed: int = 5) -> Tensor:
    keep = torch.zeros(columns * rows, dtype=torch.bool)
    chosen = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
    keep[chosen[: max(1, round(density * len(keep)))]] = True
    return keep.view(columns, rows)


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("width", ["1 bit", "8 bits"])
@each_shape
def test_a_block_keeps_as_many_as_planned_and_those_that_cost_most(
    columns: int, per_group: int, width: str, density: float
) -> None:
    target, scale, groups, grid = problem(columns, per_group, width)
    hessian = Hessian.prepare(correlated(columns))
    keep = planned(columns, 12, density)
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=keep)
    assert kept is not None
    assert kept.dtype == torch.bool
    for block in hessian.order.split(64):
        assert kept[block].sum() == keep[block].sum()
    assert not levels[~kept].any()
    if WIDTHS[width][0] % 1:
        assert bool((levels[kept] != 0).all())
    expected, expected_kept = obs(target, scale, groups, grid, hessian, keep)
    # one choice that goes the other way changes an entry here and another there
    assert (kept != expected_kept).double().mean() <= 0.005
    assert (levels.double() != expected).double().mean() <= 0.01


def test_a_block_of_which_nothing_is_planned() -> None:
    target, scale, groups, grid = problem(200, 128, "4 bits")
    hessian = Hessian.prepare(correlated(200))
    keep = planned(200, 12, 0.3)
    keep[hessian.order[64:128]] = False
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=keep)
    assert kept is not None
    assert not kept[hessian.order[64:128]].any()
    assert kept.sum() == keep.sum()
    assert not levels[~kept].any()


def test_a_plan_that_keeps_all_is_dense() -> None:
    target, scale, groups, grid = problem(130, 50, "4 bits")
    hessian = Hessian.prepare(correlated(130))
    everything = torch.ones(130, 12, dtype=torch.bool)
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=everything)
    assert kept is not None
    assert kept.all()
    assert torch.equal(levels, round_with_feedback(target, scale, groups, grid, hessian)[0])
    improved = descend(target, levels, scale, groups, grid, hessian, keep=everything)
    assert torch.equal(improved, descend(target, levels, scale, groups, grid, hessian))


def test_feedback_makes_good_for_dropped_entries() -> None:
    target, scale, groups, grid = problem(130, 50, "4 bits")
    hessian = Hessian.prepare(correlated(130))
    levels, kept = round_with_feedback(target, scale, groups, grid, hessian, keep=planned(130, 12, 0.5))
    assert kept is not None
    plain = nearest(target, scale, groups, grid) * kept
    lost, lost_by_plain = (loss_of(target, some, scale, groups, hessian).sum() for some in (levels, plain))
    assert 2 * lost < lost_by_plain


# --- descent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("start", ["feedback", "nearest", "random"])
@pytest.mark.parametrize("width", ["1 bit", "4 bits", "W4"])
@each_shape
def test_descent_never_loses_more(columns: int, per_group: int, width: str, start: str, sparse: bool) -> None:
    target, scale, groups, grid = problem(columns, per_group, width)
    hessian = Hessian.prepare(correlated(columns))
    keep = planned(columns, 12, 0.4) if sparse else None
    if start == "feedback":
        levels, keep = round_with_feedback(target, scale, groups, grid, hessian, keep=keep)
    else:
        somewhere = target if start == "nearest" else gaussian(columns, 12, seed=8) * 5
        levels = nearest(somewhere, scale, groups, grid).float()
        levels = levels if keep is None else levels * keep
    before = loss_of(target, levels, scale, groups, hessian)
    for _ in range(3):
        levels = descend(target, levels, scale, groups, grid, hessian, sweeps=1, keep=keep)
        after = loss_of(target, levels, scale, groups, hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
        inside = (levels >= grid.low) & (levels <= grid.high)
        assert bool(inside.all())
        if keep is not None:
            assert not levels[~keep].any()


@pytest.mark.parametrize("start", ["nearest", "random"])
@each_width
def test_descent_gains(width: str, start: str) -> None:
    target, scale, groups, grid = problem(130, 50, width)
    hessian = Hessian.prepare(correlated(130))
    somewhere = target if start == "nearest" else gaussian(130, 12, seed=8)
    levels = nearest(somewhere, scale, groups, grid).float()
    improved = descend(target, levels, scale, groups, grid, hessian)
    before, after = (loss_of(target, some, scale, groups, hessian) for some in (levels, improved))
    assert bool((after < 0.9 * before).all())


def test_two_sweeps_are_one_after_the_other() -> None:
    target, scale, groups, grid = problem(130, 50, "4 bits")
    hessian = Hessian.prepare(correlated(130))
    levels = torch.full_like(target, 0.5)
    once = descend(target, levels, scale, groups, grid, hessian, sweeps=1)
    twice = descend(target, once, scale, groups, grid, hessian, sweeps=1)
    assert not torch.equal(once, twice)
    assert_almost_all_equal(descend(target, levels, scale, groups, grid, hessian, sweeps=2), twice)
    assert torch.equal(descend(target, levels, scale, groups, grid, hessian, sweeps=0), levels)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("columns", [12, 70])
@each_width
def test_where_descent_ends_no_single_entry_can_be_bettered(columns: int, width: str, sparse: bool) -> None:
    rows = 5
    target, scale, groups, grid = problem(columns, 7, width, rows)
    hessian = Hessian.prepare(correlated(columns))
    keep = planned(columns, rows, 0.5) if sparse else None
    levels = grid.low.expand(columns, rows) if keep is None else grid.low * keep
    levels = descend(target, levels, scale, groups, grid, hessian, sweeps=120, keep=keep)
    assert torch.equal(descend(target, levels, scale, groups, grid, hessian, sweeps=1, keep=keep), levels)
    matrix = hessian.regularized.double()
    error = levels.double() * scale.double()[groups] - target.double()
    # every entry's every level at once: the loss changes by 2 d (H e)_i + d^2 H_ii
    low, high = WIDTHS[width]
    others = torch.arange(low, high + 1, dtype=torch.float64).view(-1, 1, 1)
    moves = (others - levels) * scale.double()[groups]
    change = 2 * moves * (matrix @ error) + moves.square() * matrix.diagonal().view(1, -1, 1)
    if keep is not None:
        change = change[:, keep]
    assert change.min() >= -1e-5 * float((error * (matrix @ error)).sum(dim=0).mean())


def test_one_move_written_by_hand() -> None:
    # inputs that always agree: the two errors add up, and the second column can undo the first one's
    hessian = Hessian.prepare(torch.ones(2, 2), shrinkage=0.0, damping=1e-3)
    target, scale, groups = torch.tensor([[0.4], [0.4]]), torch.ones(1, 1), torch.zeros(2, dtype=torch.int64)
    grid = Grid(torch.zeros(1, 1), torch.tensor([[-8.0]]), torch.tensor([[7.0]]))
    assert round_with_feedback(target, scale, groups, grid, hessian)[0].tolist() == [[0], [1]]
    assert descend(target, torch.zeros(2, 1), scale, groups, grid, hessian).tolist() == [[1], [0]]


# --- scales --------------------------------------------------------------------------------------------------------


def fitted(
    columns: int, per_group: int, width: str, noise: float = 0.1
) -> tuple[ScaleFit, Tensor, Tensor, Tensor, Tensor, Hessian]:
    """Levels, and a target that is near them in scales somewhat off the given ones."""
    target, scale, groups, grid = problem(columns, per_group, width)
    hessian = Hessian.prepare(correlated(columns))
    levels = nearest(target, scale, groups, grid).float()
    truth = scale * (1 + 0.1 * gaussian(*scale.shape, seed=6).clamp(-2, 2))
    target = levels * truth[groups] + noise * gaussian(columns, 12, seed=7) * scale[groups]
    fit = ScaleFit.of(target, hessian.regularized @ target, levels, groups, hessian)
    return fit, target, levels, scale, groups, hessian


@each_width
@each_shape
def test_the_parabola_is_the_loss(columns: int, per_group: int, width: str) -> None:
    fit, target, levels, scale, groups, hessian = fitted(columns, per_group, width)
    for some in (scale, 0.5 * scale, -scale, gaussian(*scale.shape), torch.zeros_like(scale)):
        direct = loss_of(target, levels, some, groups, hessian)
        assert torch.allclose(fit.loss(some).double(), direct, rtol=1e-4, atol=2e-6 * float(fit.constant.max()))


@each_width
@each_shape
def test_the_scales_are_those_of_least_squares(columns: int, per_group: int, width: str) -> None:
    fit, target, levels, scale, groups, hessian = fitted(columns, per_group, width, noise=0.02)
    solved = fit.solve(scale)
    root = torch.linalg.cholesky(hessian.regularized.double(), upper=True)
    for row in range(target.shape[1]):
        # one column of the design per group: its levels, zeros elsewhere
        design = torch.zeros(columns, len(scale), dtype=torch.float64)
        design[torch.arange(columns), groups] = levels[:, row].double()
        exact = torch.linalg.lstsq(root @ design, root @ target[:, row].double()).solution
        used = design.any(dim=0)
        assert torch.allclose(solved[used, row].double(), exact[used], rtol=2e-3)
        assert torch.equal(solved[~used, row], scale[~used, row])


@each_width
@each_shape
def test_the_fitted_scales_never_lose_more(columns: int, per_group: int, width: str) -> None:
    _, target, levels, scale, groups, hessian = fitted(columns, per_group, width)
    fit = ScaleFit.of(target, hessian.regularized @ target, levels, groups, hessian)
    solved = fit.solve(scale)
    assert bool((solved.sign() == scale.sign()).all())
    before, after = (loss_of(target, levels, some, groups, hessian) for some in (scale, solved))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.9 * before.sum()


def test_a_group_without_levels_keeps_its_scale() -> None:
    _, target, levels, scale, groups, hessian = fitted(130, 50, "W4")
    levels[50:100, :4] = 0
    levels[:, 5] = 0
    fit = ScaleFit.of(target, hessian.regularized @ target, levels, groups, hessian)
    solved = fit.solve(scale)
    assert torch.equal(solved[1, :4], scale[1, :4])
    assert torch.equal(solved[:, 5], scale[:, 5])
    assert bool((solved[[0, 2], :4] != scale[[0, 2], :4]).all())
    assert bool(torch.isfinite(solved).all())


def test_a_group_of_scale_0_stays_at_0() -> None:
    fit, _, _, scale, _, _ = fitted(130, 50, "W4")
    scale[1] = 0
    solved = fit.solve(scale)
    assert not solved[1].any()
    assert bool((solved[[0, 2]] != 0).all())


def test_a_scale_that_runs_off_stays_as_it_was() -> None:
    fit, _, _, scale, _, _ = fitted(130, 50, "W4")
    exact = fit.solve(scale)
    start = torch.stack([exact[0] / 10, exact[1], -exact[2]])
    solved = fit.solve(start)
    assert torch.equal(solved[[0, 2]], start[[0, 2]])
    assert torch.allclose(solved[1], exact[1])
    # up to a third and the triple it is taken
    for factor in (0.35, 2.9):
        assert torch.allclose(fit.solve(exact * factor), exact)


def test_levels_of_two_groups_that_the_inputs_cannot_tell_apart() -> None:
    # two columns of inputs that are all alike, one per group: only the sum of their scales is known
    hessian = Hessian.prepare(torch.ones(2, 2), shrinkage=0.0, damping=1e-6)
    groups, levels = torch.arange(2), torch.ones(2, 3)
    target = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    fit = ScaleFit.of(target, hessian.regularized @ target, levels, groups, hessian)
    solved = fit.solve(torch.ones(2, 3))
    assert bool(torch.isfinite(solved).all())
    assert torch.allclose(solved.sum(dim=0), torch.tensor(3.0), rtol=0.02)
