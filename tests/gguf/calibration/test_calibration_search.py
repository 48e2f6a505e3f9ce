"""Codes, scales and mins against ggml's own under the loss that they are chosen for, measured in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srd_modifier.gguf import ggml
from srd_modifier.gguf.blocks import LAYOUTS, Blocks, pack, unpack
from srd_modifier.gguf.calibration import search
from srd_modifier.gguf.calibration.search import QUICK, THOROUGH, Turn, quantize_calibrated
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.residual.hessian import Hessian

TYPES = list(LAYOUTS)
WITH_MINS = [ggml_type for ggml_type in TYPES if LAYOUTS[ggml_type].has_min]
each_type = pytest.mark.parametrize("ggml_type", TYPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns: int, *, seed: int = 0, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    """Second moment of inputs that a few directions make up, with columns of unequal size and a common mean."""
    mixing = normal(columns, max(1, columns // 16), seed=seed) * (spread * normal(columns, 1, seed=seed + 1)).exp()
    common = mean * normal(columns, 1, seed=seed + 2).abs()
    return mixing @ mixing.T + common @ common.T + 0.1 * torch.eye(columns)


def loss(weight: Tensor, blocks: Blocks, hessian: Hessian) -> Tensor:
    """Float64 `[rows]`."""
    error = blocks.dequantize().double() - weight.double()
    return ((error @ hessian.regularized.double()) * error).sum(dim=1)


def start(weight: Tensor, ggml_type: GGMLType, hessian: Hessian) -> Blocks:
    """What ggml makes of it, with the importance that the search begins with."""
    importance = hessian.column_cost()
    return unpack(torch.from_numpy(ggml.quantize(weight, ggml_type, importance / importance.mean())), ggml_type)


def assert_valid(blocks: Blocks, ggml_type: GGMLType) -> None:
    data = pack(blocks, ggml_type).numpy()
    assert ggml.validate(data, ggml_type)
    assert torch.equal(ggml.dequantize(data, ggml_type), blocks.dequantize())


# loss


@each_type
@pytest.mark.parametrize("columns", [256, 512])
def test_loses_much_less_than_ggml(ggml_type: GGMLType, columns: int) -> None:
    weight, hessian = normal(16, columns), Hessian.prepare(moment(columns, mean=1.0))
    found = quantize_calibrated(weight, ggml_type, hessian)
    assert_valid(found, ggml_type)
    importance = hessian.regularized.diagonal().contiguous()  # as an imatrix has it
    theirs = unpack(torch.from_numpy(ggml.quantize(weight, ggml_type, importance)), ggml_type)
    assert loss(weight, found, hessian).sum() < 0.5 * loss(weight, theirs, hessian).sum()


@pytest.mark.parametrize("ggml_type", [own for own in TYPES if LAYOUTS[own].block == 32])
@pytest.mark.parametrize("columns", [32, 96])
def test_rows_of_few_blocks(ggml_type: GGMLType, columns: int) -> None:
    weight, hessian = normal(9, columns), Hessian.prepare(moment(columns))
    found = quantize_calibrated(weight, ggml_type, hessian)
    assert_valid(found, ggml_type)
    assert loss(weight, found, hessian).sum() < 0.8 * loss(weight, start(weight, ggml_type, hessian), hessian).sum()


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda columns, seed: normal(3, columns, seed=seed),
    "heavy tails": lambda columns, seed: normal(3, columns, seed=seed) ** 5,
    "small": lambda columns, seed: 1e-6 * normal(3, columns, seed=seed),
    "large": lambda columns, seed: 1e3 * normal(3, columns, seed=seed),
    "all above zero": lambda columns, seed: 1 + normal(3, columns, seed=seed).abs(),
    "all below zero": lambda columns, seed: -1 - normal(3, columns, seed=seed).abs(),
    "mostly zeros": lambda columns, seed: normal(3, columns, seed=seed) * (normal(3, columns, seed=seed + 1) > 1.5),
    "constant": lambda columns, seed: torch.full((3, columns), float(normal(1, seed=seed))),
    "two values": lambda columns, seed: normal(3, columns, seed=seed).sign(),
}
MOMENTS: dict[str, Callable[[int, int], Tensor]] = {
    "correlated": lambda columns, seed: moment(columns, seed=seed),
    "common mean": lambda columns, seed: moment(columns, seed=seed, mean=5.0, spread=0.3),
    "unequal": lambda columns, seed: moment(columns, seed=seed, spread=3.0),
    "diagonal": lambda columns, seed: torch.diag(normal(columns, seed=seed).exp()),
    "one direction": lambda columns, seed: normal(columns, 1, seed=seed) @ normal(columns, 1, seed=seed).T,
    "columns without inputs": lambda columns, seed: (
        moment(columns, seed=seed) * torch.outer(torch.arange(columns) % 3 > 0, torch.arange(columns) % 3 > 0)
    ),
    "no inputs": lambda columns, seed: torch.zeros(columns, columns),
}


@settings(max_examples=60)
@given(
    ggml_type=st.sampled_from(TYPES),
    weight=st.sampled_from(list(WEIGHTS)),
    inputs=st.sampled_from(list(MOMENTS)),
    schedule=st.sampled_from([QUICK, THOROUGH, (Turn(False, 1),)]),
    seed=st.integers(0, 10**6),
)
def test_never_loses_more_than_what_it_began_with(
    ggml_type: GGMLType, weight: str, inputs: str, schedule: tuple[Turn, ...], seed: int
) -> None:
    columns = LAYOUTS[ggml_type].block
    own, hessian = WEIGHTS[weight](columns, seed), Hessian.prepare(MOMENTS[inputs](columns, seed))
    found = quantize_calibrated(own, ggml_type, hessian, schedule)
    assert_valid(found, ggml_type)
    before, after = loss(own, start(own, ggml_type, hessian), hessian), loss(own, found, hessian)
    # float32 knows the square of an error no better than this
    rounding = 1e-12 * ((own.double() @ hessian.regularized.double().abs()) * own).sum(dim=1).abs()
    assert (after <= before * (1 + 1e-4) + rounding).all()


@each_type
def test_a_longer_schedule_loses_less(ggml_type: GGMLType) -> None:
    weight, hessian = normal(24, 256, seed=4), Hessian.prepare(moment(256, seed=4, mean=2.0))
    quick = loss(weight, quantize_calibrated(weight, ggml_type, hessian, QUICK), hessian)
    thorough = loss(weight, quantize_calibrated(weight, ggml_type, hessian, THOROUGH), hessian)
    assert (thorough <= quick * (1 + 1e-4)).all()
    assert thorough.sum() < quick.sum()


@each_type
def test_what_is_known_of_the_loss_is_the_loss(ggml_type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns are compared by it, so that it must be far more precise than they differ."""
    weight, hessian = normal(16, 512, seed=2), Hessian.prepare(moment(512, seed=2, mean=5.0, spread=0.5))
    claimed: list[Tensor] = []
    better = search._Found.better

    def keep(self: search._Found, other: search._Found) -> search._Found:
        best = better(self, other)
        claimed.append(best.loss)
        return best

    monkeypatch.setattr(search._Found, "better", keep)
    true = loss(weight, quantize_calibrated(weight, ggml_type, hessian), hessian)
    torch.testing.assert_close(claimed[-1].double(), true, rtol=2e-3, atol=0)


def test_the_best_of_all_scales_where_columns_do_not_touch() -> None:
    """Without correlations every weight takes the nearest level, and a half has only so many values: try all."""
    weight = normal(1, 32, seed=8)
    hessian = Hessian.prepare(torch.diag(normal(32, seed=9).exp()))
    scales = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float()
    scales = scales[scales.isfinite() & (scales.abs() > 0.01) & (scales.abs() < 1)].unsqueeze(1)
    error = (weight / scales).round().clamp(-8, 7) * scales - weight
    best = float((error.square() @ hessian.regularized.diagonal()).min())
    found = float(loss(weight, quantize_calibrated(weight, GGMLType.Q4_0, hessian), hessian))
    assert best * (1 - 1e-4) <= found <= 1.1 * best


# weights that are unlike others


@each_type
def test_rows_of_zeros_stay_zeros(ggml_type: GGMLType) -> None:
    weight = normal(3, 256)
    weight[1] = 0
    found = quantize_calibrated(weight, ggml_type, Hessian.prepare(moment(256)), QUICK)
    assert_valid(found, ggml_type)
    assert not found.dequantize()[1].any()
    assert found.dequantize()[0].any()
    assert found.dequantize()[2].any()


@each_type
def test_a_block_of_zeros_beside_others(ggml_type: GGMLType) -> None:
    columns = 2 * LAYOUTS[ggml_type].block
    weight = normal(4, columns)
    weight[:, : columns // 2] = 0
    hessian = Hessian.prepare(moment(columns))
    found = quantize_calibrated(weight, ggml_type, hessian, QUICK)
    assert_valid(found, ggml_type)
    assert (loss(weight, found, hessian) <= loss(weight, start(weight, ggml_type, hessian), hessian)).all()


@each_type
@pytest.mark.parametrize("value", [0.37, -0.37])
def test_constant_rows(ggml_type: GGMLType, value: float) -> None:
    weight = torch.full((2, 256), value)
    found = quantize_calibrated(weight, ggml_type, Hessian.prepare(moment(256)), QUICK)
    assert_valid(found, ggml_type)
    torch.testing.assert_close(found.dequantize(), weight, rtol=0.02, atol=0)


@each_type
@pytest.mark.parametrize("value", [6e4, -6e4])
def test_one_huge_entry(ggml_type: GGMLType, value: float) -> None:
    weight = normal(3, 256)
    weight[1, 77] = value
    hessian = Hessian.prepare(moment(256))
    found = quantize_calibrated(weight, ggml_type, hessian)
    assert_valid(found, ggml_type)
    assert (loss(weight, found, hessian) <= loss(weight, start(weight, ggml_type, hessian), hessian) * 1.0001).all()
    assert abs(float(found.dequantize()[1, 77]) / value - 1) < 0.1
    assert found.dequantize()[[0, 2]].abs().max() < 10


@each_type
def test_all_entries_huge(ggml_type: GGMLType) -> None:
    """Scales as large as halves can be: a refitted one must not become infinite."""
    weight = 6e4 * normal(4, 256).clamp(-1, 1)
    hessian = Hessian.prepare(moment(256))
    found = quantize_calibrated(weight, ggml_type, hessian)
    assert_valid(found, ggml_type)
    assert (loss(weight, found, hessian) <= loss(weight, start(weight, ggml_type, hessian), hessian) * 1.0001).all()


@each_type
def test_weights_that_halves_hardly_hold(ggml_type: GGMLType) -> None:
    weight = 1e-6 * normal(4, 256)
    hessian = Hessian.prepare(moment(256))
    found = quantize_calibrated(weight, ggml_type, hessian, QUICK)
    assert_valid(found, ggml_type)
    assert (loss(weight, found, hessian) <= loss(weight, start(weight, ggml_type, hessian), hessian) * 1.0001).all()


@pytest.mark.parametrize("ggml_type", WITH_MINS)
@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_weights_far_from_zero(ggml_type: GGMLType, offset: float) -> None:
    """A K-quant's min cannot be negative: what lies above 0 takes all levels from 0 on."""
    weight, hessian = normal(4, 256) + offset, Hessian.prepare(moment(256))
    found = quantize_calibrated(weight, ggml_type, hessian, QUICK)
    assert_valid(found, ggml_type)
    assert (loss(weight, found, hessian) < loss(weight, start(weight, ggml_type, hessian), hessian)).all()
    if found.min_codes is not None:
        assert found.min is not None
        assert (found.min >= 0).all()
        assert (found.min_codes >= 0).all()
        assert found.min_codes.any() or offset > 0


@each_type
def test_columns_without_inputs(ggml_type: GGMLType) -> None:
    inputs = moment(256)
    inputs[:, ::2] = 0
    inputs[::2] = 0
    weight, hessian = normal(4, 256), Hessian.prepare(inputs)
    found = quantize_calibrated(weight, ggml_type, hessian, QUICK)
    assert_valid(found, ggml_type)
    assert (found.dequantize() - weight).square().mean() < 0.3  # they may give way, but are not given up
    assert loss(weight, found, hessian).sum() < loss(weight, start(weight, ggml_type, hessian), hessian).sum()


# what does not matter


@each_type
def test_the_same_again(ggml_type: GGMLType) -> None:
    weight, hessian = normal(5, 256), Hessian.prepare(moment(256))
    first, again = (pack(quantize_calibrated(weight, ggml_type, hessian, QUICK), ggml_type) for _ in range(2))
    assert torch.equal(first, again)


@each_type
def test_a_single_row_is_as_good_as_among_others(ggml_type: GGMLType) -> None:
    weight, hessian = normal(4, 256), Hessian.prepare(moment(256))
    together = loss(weight, quantize_calibrated(weight, ggml_type, hessian, QUICK), hessian)
    alone = [loss(row, quantize_calibrated(row, ggml_type, hessian, QUICK), hessian) for row in weight.split(1)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0.05, atol=0)


@each_type
def test_rows_in_blocks(ggml_type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = normal(5, 256), Hessian.prepare(moment(256))
    at_once = loss(weight, quantize_calibrated(weight, ggml_type, hessian, QUICK), hessian)
    monkeypatch.setattr(search, "_BLOCK_ENTRIES", 3 * 256)
    monkeypatch.setattr(search, "_SYSTEM_ENTRIES", 1)
    in_blocks = quantize_calibrated(weight, ggml_type, hessian, QUICK)
    assert_valid(in_blocks, ggml_type)
    torch.testing.assert_close(loss(weight, in_blocks, hessian), at_once, rtol=0.05, atol=0)


@each_type
@pytest.mark.parametrize("power", [-60, 40])
def test_the_size_of_the_inputs_does_not_matter(ggml_type: GGMLType, power: int) -> None:
    """ggml adds importance up in float32, and takes none of it seriously where it is far from 1."""
    weight, inputs = normal(5, 256), moment(256)
    plain = quantize_calibrated(weight, ggml_type, Hessian.prepare(inputs), QUICK)
    scaled = quantize_calibrated(weight, ggml_type, Hessian.prepare(inputs * 2.0**power), QUICK)
    assert torch.equal(pack(scaled, ggml_type), pack(plain, ggml_type))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    weight, hessian = normal(3, 256).to(dtype), Hessian.prepare(moment(256))
    found = quantize_calibrated(weight, GGMLType.Q4_K, hessian, QUICK)
    same = quantize_calibrated(weight.float(), GGMLType.Q4_K, hessian, QUICK)
    assert torch.equal(pack(found, GGMLType.Q4_K), pack(same, GGMLType.Q4_K))


def test_the_input_is_left_alone() -> None:
    weight, inputs = normal(3, 256), moment(256)
    hessian = Hessian.prepare(inputs)
    before = weight.clone(), hessian.regularized.clone(), hessian.factor.clone()
    quantize_calibrated(weight, GGMLType.Q4_K, hessian, QUICK)
    assert all(map(torch.equal, before, (weight, hessian.regularized, hessian.factor)))


# bad input


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 128), r"expected a weight \[out, 256\], got shape \(4, 128\)"),
        (torch.zeros(256), r"expected a weight \[out, 256\], got shape \(256,\)"),
        (torch.full((1, 256), torch.nan), "not finite"),
        (torch.full((1, 256), torch.inf), "not finite"),
        (torch.full((1, 256), 1e5), "too large for Q4_K"),
    ],
    ids=["columns", "no matrix", "NaN", "infinity", "too large"],
)
def test_a_weight_that_cannot_be(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_calibrated(weight, GGMLType.Q4_K, Hessian.prepare(torch.eye(256)), QUICK)


def test_rows_of_partial_blocks() -> None:
    with pytest.raises(ValueError, match="rows of 96 weights cannot be Q6_K, whose blocks are of 256"):
        quantize_calibrated(torch.zeros(2, 96), GGMLType.Q6_K, Hessian.prepare(torch.eye(96)))
