import gc
import weakref

import pytest
import torch
from torch import Tensor

from srd_modifier.errors import RecipeError
from srd_modifier.modifier.inputs import CalibrationInputs

CPU = torch.device("cpu")


def batches(sizes: tuple[tuple[int, ...], ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).add_(0.3).to(dtype) for size in sizes]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every second moment that is summed, each time a batch is added to it."""
    seen: list[tuple[int, ...]] = []
    addmm_ = Tensor.addmm_

    def record(self: Tensor, first: Tensor, second: Tensor) -> Tensor:
        seen.append(tuple(self.shape))
        return addmm_(self, first, second)

    monkeypatch.setattr(Tensor, "addmm_", record)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_second_moment_is_the_mean_over_all_tokens_of_all_batches(dtype):
    inputs = CalibrationInputs(second_moments=True)
    taken = batches(((2, 7, 24), (1, 64, 24), (5, 24)), dtype=dtype)  # the last as an expert sees it, without rows
    for batch in taken:
        inputs.add("a", batch)
    rows = torch.cat([batch.double().reshape(-1, 24) for batch in taken])
    expected = rows.T @ rows / len(rows)
    hessian = inputs.hessian("a", CPU)
    assert hessian is not None
    found = hessian.regularized.double() - torch.diag(hessian.added.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    square = inputs.mean_square("a")
    assert square is not None
    torch.testing.assert_close(square.double(), expected.diagonal(), rtol=1e-5, atol=0)


def test_mean_squares_alone_are_the_diagonal_of_the_second_moment():
    alone, whole = CalibrationInputs(), CalibrationInputs(second_moments=True)
    for batch in batches(((2, 7, 24), (1, 64, 24))):
        alone.add("a", batch)
        whole.add("a", batch)
    torch.testing.assert_close(alone.mean_squares(), whole.mean_squares(), rtol=1e-6, atol=0)
    assert alone.hessian("a", CPU) is None  # a matrix was never summed


def test_modules_that_read_the_same_tensor_share_a_second_moment(products):
    inputs = CalibrationInputs(second_moments=True)
    for hidden, middle in zip(
        batches(((1, 8, 24), (1, 9, 24))), batches(((1, 8, 40), (1, 9, 40)), seed=1), strict=True
    ):
        for name in ("q_proj", "k_proj", "v_proj"):
            inputs.add(name, hidden)
        later = hidden + 1
        for name in ("gate_proj", "up_proj"):
            inputs.add(name, later)
        inputs.add("down_proj", middle)
    assert products == [(24, 24), (24, 24), (40, 40)] * 2
    hessians = {name: inputs.hessian(name, CPU) for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    assert hessians["q_proj"] is hessians["k_proj"] is hessians["v_proj"]
    assert hessians["gate_proj"] is hessians["up_proj"]
    assert hessians["gate_proj"] is not hessians["q_proj"]
    assert torch.equal(inputs.mean_squares()["v_proj"], inputs.mean_squares()["q_proj"])


def test_a_tensor_that_was_changed_in_between_is_another_input():
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    inputs.add("first", hidden)
    hidden.mul_(2)
    inputs.add("second", hidden)
    first, second = (inputs.mean_square(name) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second, 4 * first)


def test_an_equal_tensor_is_another_input_all_the_same(products):
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    inputs.add("first", hidden)
    inputs.add("second", hidden.clone())
    assert len(products) == 2
    assert inputs.hessian("first", CPU) is not inputs.hessian("second", CPU)


def test_a_view_of_the_same_memory_is_another_input():
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    inputs.add("first", hidden)
    inputs.add("second", hidden[:, 4:])
    rows = hidden[0, 4:].double()
    square = inputs.mean_square("second")
    assert square is not None
    torch.testing.assert_close(square.double(), rows.square().mean(0), rtol=1e-6, atol=0)


def test_a_new_tensor_at_the_place_of_an_old_one_is_another_input(products):
    # the address of a tensor, and its id, come back once it is released
    inputs = CalibrationInputs(second_moments=True)
    for i in range(20):
        inputs.add(str(i), torch.full((4, 24), float(i + 1)))
    assert len(products) == 20
    for i in range(20):
        square = inputs.mean_square(str(i))
        assert square is not None
        assert float(square[0]) == (i + 1) ** 2


def test_the_same_module_may_read_a_tensor_twice():
    # as a module that is called twice in one forward does: both calls count
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    inputs.add("a", hidden)
    before = inputs.mean_square("a")
    inputs.add("a", hidden)
    after = inputs.mean_square("a")
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("shared_first", [True, False], ids=["shared-first", "shared-later"])
def test_modules_that_share_their_input_in_some_batches_only_are_refused(shared_first):
    inputs = CalibrationInputs(second_moments=True)
    for shared in (shared_first, not shared_first):
        (hidden,) = batches(((1, 8, 24),))
        inputs.add("layers.0.gate_proj", hidden)
        other = hidden if shared else hidden.clone()
        if shared is shared_first:
            inputs.add("layers.0.up_proj", other)
        else:
            with pytest.raises(RecipeError, match=r"^layers\.0\.up_proj reads the input of .* choose rounding: neare"):
                inputs.add("layers.0.up_proj", other)


def test_an_expert_that_a_batch_does_not_reach_goes_on_sharing():
    inputs = CalibrationInputs(second_moments=True)
    for reached in ((0, 1), (1,), (0, 1)):
        for expert in reached:
            (rows,) = batches(((3, 24),), seed=expert)
            inputs.add(f"experts.{expert}.gate_proj", rows)
            inputs.add(f"experts.{expert}.up_proj", rows)
    for expert in (0, 1):
        gate = inputs.hessian(f"experts.{expert}.gate_proj", CPU)
        assert gate is not None
        assert inputs.hessian(f"experts.{expert}.up_proj", CPU) is gate


@pytest.mark.parametrize("second_moments", [True, False])
def test_a_module_without_inputs_has_nothing_to_say(second_moments):
    inputs = CalibrationInputs(second_moments=second_moments)
    assert inputs.mean_square("a") is None
    assert inputs.hessian("a", CPU) is None
    inputs.release("a")
    assert inputs.mean_squares() == {}


def test_an_expert_that_is_called_with_no_tokens_at_all():
    inputs = CalibrationInputs(second_moments=True)
    inputs.add("expert", torch.empty(0, 24))
    assert inputs.mean_square("expert") is None
    hessian = inputs.hessian("expert", CPU)
    assert hessian is not None
    # every column counts the same, and there is nothing to pass on
    found = hessian.regularized - torch.diag(hessian.added)
    assert torch.equal(found, torch.eye(24))
    inputs.release("expert")
    assert inputs.mean_squares() == {}


def test_release_keeps_the_mean_squares_and_nothing_else():
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    for name in ("q_proj", "k_proj"):
        inputs.add(name, hidden)
    hessian = inputs.hessian("q_proj", CPU)
    expected = inputs.mean_squares()
    moment, matrix = weakref.ref(inputs._moments["k_proj"]), weakref.ref(hessian.factor)  # type: ignore[union-attr]
    inputs.release("q_proj")
    assert inputs.hessian("k_proj", CPU) is hessian  # the other one still needs it
    inputs.release("k_proj")
    del hessian
    gc.collect()
    assert (moment(), matrix()) == (None, None)
    assert inputs.hessian("q_proj", CPU) is None
    found = inputs.mean_squares()
    assert list(found) == ["q_proj", "k_proj"]
    for name, square in found.items():
        assert torch.equal(square, expected[name])
        assert square.untyped_storage().nbytes() == 24 * 4, "a view would keep the matrix"


def test_the_inputs_themselves_are_not_kept():
    inputs = CalibrationInputs(second_moments=True)
    (hidden,) = batches(((1, 8, 24),))
    inputs.add("a", hidden)
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None


def test_inputs_that_are_not_finite_are_an_error_of_the_second_moment():
    inputs = CalibrationInputs(second_moments=True)
    inputs.add("a", torch.full((4, 24), float("nan")))
    with pytest.raises(ValueError, match="the calibration inputs have NaN or infinite entries"):
        inputs.hessian("a", CPU)
