import pytest
import torch
from torch import Tensor

from srd_modifier.residual.hessian import DAMPING, SHRINKAGE, Hessian


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(columns: int, rho: float = 0.9) -> Tensor:
    position = torch.arange(columns)
    return rho ** (position[:, None] - position).abs().double()


def low_rank(columns: int) -> Tensor:
    mixing = gaussian(columns, 4)
    return mixing @ mixing.T + 0.01 * torch.eye(columns, dtype=torch.float64)


def few_tokens(columns: int) -> Tensor:
    inputs = gaussian(columns // 3 + 1, columns) + 1
    return inputs.T @ inputs / len(inputs)


def spread(columns: int) -> Tensor:
    """Columns whose mean squares lie between 1/1000 and 1000."""
    size = (gaussian(columns, seed=1) * 1.5).exp()
    return autoregressive(columns) * size * size[:, None]


MOMENTS = {"autoregressive": autoregressive, "low rank": low_rank, "few tokens": few_tokens, "spread": spread}
each_moment = pytest.mark.parametrize("kind", MOMENTS)


def regularized(moment: Tensor, shrinkage: float = SHRINKAGE, damping: float = DAMPING) -> Tensor:
    """`moment` in float64 with its own diagonal and the mean of it added to the diagonal."""
    moment = moment.double()
    diagonal = torch.diag(moment)
    return moment + torch.diag(shrinkage * diagonal + damping * diagonal.mean())


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


# --- what is factored ----------------------------------------------------------------------------------------------


@each_moment
@pytest.mark.parametrize("columns", [1, 7, 64, 150])
def test_the_factor_is_that_of_the_inverse_in_the_given_order(columns: int, kind: str) -> None:
    moment = MOMENTS[kind](columns)
    hessian = Hessian.prepare(moment)
    inverse = regularized(moment)[hessian.order][:, hessian.order].inverse()
    factor = hessian.factor
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    assert relative(factor.double().T @ factor.double(), inverse) < 1e-4
    # entry by entry too, in units of the row and column it stands in
    unit = inverse.diagonal().sqrt()
    assert ((factor.double().T @ factor.double() - inverse) / unit / unit[:, None]).abs().max() < 1e-3


@each_moment
@pytest.mark.parametrize(("shrinkage", "damping"), [(SHRINKAGE, DAMPING), (0.0, 0.05), (0.3, 0.001)])
def test_what_is_added_to_the_diagonal(shrinkage: float, damping: float, kind: str) -> None:
    moment = MOMENTS[kind](40)
    hessian = Hessian.prepare(moment, shrinkage=shrinkage, damping=damping)
    expected = regularized(moment, shrinkage, damping)
    assert relative(hessian.regularized, expected) < 1e-6
    assert relative(hessian.added, (expected - moment).diagonal()) < 1e-6
    assert hessian.ridge == pytest.approx(damping * float(moment.diagonal().mean()), rel=1e-6)
    assert hessian.in_features == 40


def test_shrinkage_and_damping_have_their_documented_defaults() -> None:
    assert (SHRINKAGE, DAMPING) == (0.1, 0.01)
    hessian = Hessian.prepare(torch.diag(torch.tensor([1.0, 3.0])))
    assert torch.allclose(hessian.regularized, torch.diag(torch.tensor([1.12, 3.32])))


@each_moment
def test_columns_come_by_falling_mean_square(kind: str) -> None:
    moment = MOMENTS[kind](80)
    order = Hessian.prepare(moment).order
    assert sorted(order.tolist()) == list(range(80))
    ordered = moment.float().diagonal()[order]
    assert bool((ordered[:-1] >= ordered[1:]).all())


def test_equal_columns_keep_their_order() -> None:
    assert Hessian.prepare(autoregressive(50)).order.tolist() == list(range(50))
    assert Hessian.prepare(torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0]))).order.tolist() == [1, 3, 0, 2]


def test_the_moment_is_left_alone_and_its_dtype_only_matters_by_its_values() -> None:
    moment = spread(30).bfloat16()
    copy = moment.clone()
    first = Hessian.prepare(moment)
    assert torch.equal(moment, copy)
    for dtype in (torch.float32, torch.float64):
        again = Hessian.prepare(moment.to(dtype))
        assert torch.equal(first.factor, again.factor)
        assert torch.equal(first.regularized, again.regularized)
    single = moment.float()
    Hessian.prepare(single)
    assert torch.equal(single, copy.float())


# --- what follows from it ------------------------------------------------------------------------------------------


@each_moment
def test_column_cost_is_what_is_left_once_the_later_columns_made_good(kind: str) -> None:
    columns = 60
    moment = MOMENTS[kind](columns)
    hessian = Hessian.prepare(moment)
    matrix = regularized(moment)
    expected = torch.empty(columns, dtype=torch.float64)
    order = hessian.order.tolist()
    for i, column in enumerate(order):
        later = order[i + 1 :]
        # least loss of an error of 1 in this column, over all errors of the later ones
        coupling = matrix[later, column]
        made_good = coupling @ torch.linalg.solve(matrix[later][:, later], coupling) if later else 0.0
        expected[column] = matrix[column, column] - made_good
    assert torch.allclose(hessian.column_cost().double(), expected, rtol=1e-3)


@each_moment
@pytest.mark.parametrize("damping", [DAMPING, 0.3])
def test_shrinking_takes_away_what_the_ridge_outweighs(damping: float, kind: str) -> None:
    moment = MOMENTS[kind](50)
    hessian = Hessian.prepare(moment, damping=damping)
    weight = gaussian(9, 50, seed=2)
    shrunk = regularized(moment, damping=0.0)
    ridge = damping * float(moment.diagonal().mean())
    expected = weight @ shrunk @ (shrunk + ridge * torch.eye(50, dtype=torch.float64)).inverse()
    result = hessian.shrink(weight.float())
    assert relative(result, expected) < 1e-4
    assert result.norm() < weight.norm()


@each_moment
def test_quadratic_is_the_loss_under_the_moment_as_measured(kind: str) -> None:
    moment = MOMENTS[kind](50)
    hessian = Hessian.prepare(moment)
    first, second = gaussian(9, 50, seed=3).float(), gaussian(9, 50, seed=4).float()
    copies = first.clone(), second.clone()
    same = torch.einsum("ri,ij,rj->r", first.double(), moment, first.double())
    assert torch.allclose(hessian.quadratic(first).double(), same, rtol=1e-4, atol=1e-5 * float(same.mean()))
    cross = torch.einsum("ri,ij,rj->r", first.double(), moment, second.double())
    tolerance = 1e-5 * float(same.mean())
    assert torch.allclose(hessian.quadratic(first, second).double(), cross, rtol=1e-4, atol=tolerance)
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])


def test_the_loss_is_that_of_the_layers_outputs() -> None:
    inputs = gaussian(300, 40) @ gaussian(40, 40, seed=1)
    error = gaussian(6, 40, seed=2)
    loss = Hessian.prepare(inputs.T @ inputs / 300).quadratic(error.float())
    assert relative(loss, (inputs @ error.T).square().mean(dim=0)) < 1e-4


# --- moments that are awkward --------------------------------------------------------------------------------------


def test_dead_columns_are_last_and_pass_nothing_on() -> None:
    moment = autoregressive(20)
    dead = [3, 4, 17]
    moment[dead] = 0
    moment[:, dead] = 0
    hessian = Hessian.prepare(moment)
    assert hessian.order[-3:].tolist() == dead
    off_diagonal = hessian.factor[-3:] - torch.diag(hessian.factor.diagonal())[-3:]
    assert not off_diagonal.any()
    assert not hessian.factor[:-3, -3:].any()
    assert torch.allclose(hessian.column_cost()[dead], torch.tensor(0.01 * 17 / 20))
    weight = gaussian(5, 20).float()
    # nothing of a column that the layer never sees has to be represented
    assert hessian.shrink(weight)[:, dead].abs().max() < 1e-6
    weight[:, [column for column in range(20) if column not in dead]] = 0
    assert hessian.quadratic(weight).abs().max() < 1e-6


@pytest.mark.parametrize("columns", [1, 30])
def test_a_moment_of_zero_becomes_the_identity(columns: int) -> None:
    zero, identity = Hessian.prepare(torch.zeros(columns, columns)), Hessian.prepare(torch.eye(columns))
    for name in ("regularized", "added", "order", "factor"):
        assert torch.equal(getattr(zero, name), getattr(identity, name))
    assert torch.allclose(zero.factor, torch.eye(columns) * 1.11**-0.5)
    assert torch.allclose(zero.column_cost(), torch.tensor(1.11))


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    inputs = gaussian(tokens, 90).float()
    moment = inputs.T @ inputs / tokens
    hessian = Hessian.prepare(moment)
    assert hessian.ridge == pytest.approx(DAMPING * float(moment.diagonal().mean()))
    inverse = regularized(moment)[hessian.order][:, hessian.order].inverse()
    assert relative(hessian.factor.double().T @ hessian.factor.double(), inverse) < 1e-4
    # an error that no input sees costs nothing
    seen = torch.linalg.qr(inputs.T.double()).Q
    error = gaussian(4, 90, seed=1)
    unseen = (error - error @ seen @ seen.T).float()
    assert hessian.quadratic(unseen).abs().max() < 1e-5 * hessian.quadratic(error.float()).mean()


def test_a_column_that_outweighs_all_others() -> None:
    moment = autoregressive(60)
    moment[7] *= 1000
    moment[:, 7] *= 1000
    hessian = Hessian.prepare(moment)
    assert int(hessian.order[0]) == 7
    inverse = regularized(moment)[hessian.order][:, hessian.order].inverse()
    unit = inverse.diagonal().sqrt()
    assert ((hessian.factor.double().T @ hessian.factor.double() - inverse) / unit / unit[:, None]).abs().max() < 1e-3


@pytest.mark.parametrize("exponent", [-40, -20, 20, 40])
def test_a_power_of_two_only_moves_the_units(exponent: int) -> None:
    plain, moved = Hessian.prepare(spread(40)), Hessian.prepare(spread(40) * 2.0**exponent)
    assert torch.equal(moved.order, plain.order)
    assert torch.allclose(moved.factor * 2.0 ** (exponent // 2), plain.factor, rtol=1e-5, atol=0)
    weight = gaussian(3, 40).float()
    assert torch.allclose(moved.shrink(weight), plain.shrink(weight), atol=1e-5)


@pytest.mark.parametrize(("least", "used"), [(0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
def test_damping_is_raised_until_the_moment_can_be_factored(least: float, used: float) -> None:
    # eigenvalues 2 + least and -least, and a mean diagonal of 1
    moment = torch.tensor([[1.0, 1.0 + least], [1.0 + least, 1.0]])
    hessian = Hessian.prepare(moment, shrinkage=0.0)
    assert hessian.ridge == pytest.approx(used)
    assert torch.allclose(hessian.regularized, moment + used * torch.eye(2))
    assert torch.allclose(hessian.factor.T @ hessian.factor, hessian.regularized.inverse(), rtol=1e-4)


def test_a_moment_that_no_damping_helps() -> None:
    with pytest.raises(ValueError, match="cannot be factored"):
        Hessian.prepare(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
    with pytest.raises(ValueError, match="cannot be factored"):
        Hessian.prepare(-torch.eye(4))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 4, 4), ()])
def test_not_a_square_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a second moment \[in, in\], got shape \("):
        Hessian.prepare(torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(2, 2), (0, 3)])
def test_not_finite(place: tuple[int, int], value: float) -> None:
    moment = torch.eye(4)
    moment[place] = value
    with pytest.raises(ValueError, match="the calibration inputs have NaN or infinite entries"):
        Hessian.prepare(moment)


def test_a_float64_moment_beyond_float32_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Hessian.prepare(torch.eye(4, dtype=torch.float64) * 1e200)
