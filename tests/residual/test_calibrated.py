from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from srd_modifier.errors import ConfigError
from srd_modifier.residual import (
    WHOLE_ROW,
    EncodedResidual,
    Hessian,
    QuantizedBase,
    ResidualFormat,
    calibrated,
    decode,
    encode,
    encode_calibrated,
    from_levels,
    quantize_base,
)
from srd_modifier.residual.packing import unpack

ROWS, COLUMNS = 48, 128
BITS = (8, 6, 5, 4, 3, 2, 1)
KINDS = ("autoregressive", "low rank")
each_kind = pytest.mark.parametrize("kind", KINDS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def moment(kind: str, columns: int = COLUMNS) -> Tensor:
    """Second moment, float64, of 2000 correlated inputs with columns of unequal size."""
    if kind == "autoregressive":
        position = torch.arange(columns)
        mixing = torch.linalg.cholesky(0.9 ** (position[:, None] - position).abs().double())
        inputs = gaussian(2000, columns, seed=1).double() @ mixing.T
    else:
        inputs = gaussian(2000, columns // 12, seed=1) @ gaussian(columns // 12, columns, seed=2)
        inputs = (inputs + gaussian(2000, columns, seed=3)).double()
    inputs = inputs * (gaussian(columns, seed=4) * 0.5).exp()
    return inputs.T @ inputs / len(inputs)


@cache
def hessian_of(kind: str, columns: int = COLUMNS) -> Hessian:
    return Hessian.prepare(moment(kind, columns))


@cache
def weight_of(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return gaussian(rows, columns, seed=5) * 0.02


def rtn(weight: Tensor, group: int = 64) -> Tensor:
    """Round-to-nearest W4, scale `absmax / 7.5`, dequantized."""
    grouped = weight.reshape(len(weight), -1, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    return ((grouped / scale).round().clamp(-8, 7) * scale).view_as(weight)


@cache
def residual_of(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    weight = weight_of(rows, columns)
    return weight - rtn(weight, 64 if columns % 64 == 0 else columns)


def loss(error: Tensor, kind: str) -> float:
    """`tr(E H E^T)` with the moment as measured, in float64."""
    error = error.double()
    return float((error * (error @ moment(kind, error.shape[1]))).sum())


def loss_left(residual: Tensor, encoded: EncodedResidual, fmt: ResidualFormat, kind: str) -> float:
    return loss(residual - decode(encoded, fmt, in_features=residual.shape[1]), kind)


def feedback(bits: int = 4, **settings: int | float | str) -> ResidualFormat:
    return ResidualFormat(bits=bits, rounding="feedback", **settings)  # type: ignore[arg-type]


def by_nearest(residual: Tensor, fmt: ResidualFormat, importance: Tensor | None = None) -> EncodedResidual:
    return encode(residual, replace(fmt, rounding="nearest"), importance=importance)


def same(first: EncodedResidual, second: EncodedResidual) -> bool:
    one, other = first.tensors(), second.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mask_of(encoded: EncodedResidual, columns: int) -> Tensor:
    assert encoded.mask is not None
    return unpack(encoded.mask, 1, columns).bool()


# --- the format ----------------------------------------------------------------------------------------------------


def test_feedback_is_not_for_encode() -> None:
    with pytest.raises(ValueError, match=r"'feedback' needs the Hessian .* encode_calibrated\(\) does it"):
        encode(residual_of(), feedback())


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_rows_of_feedback_are_not_encoded_on_their_own(density: float) -> None:
    assert not feedback(density=density).rows_are_independent


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("bits", BITS)
def test_feedback_is_stored_and_decoded_as_nearest_is(bits: int, density: float) -> None:
    fmt = feedback(bits, density=density)
    plain = replace(fmt, rounding="nearest")
    assert fmt.layout(ROWS, COLUMNS) == plain.layout(ROWS, COLUMNS)
    encoded = by_nearest(residual_of(), fmt)
    decoded = decode(encoded, fmt, in_features=COLUMNS, key="a")
    assert torch.equal(decoded, decode(encoded, plain, in_features=COLUMNS, key="b"))


# --- residuals -----------------------------------------------------------------------------------------------------

# nearest's loss over that of feedback, at least; both inputs gain 3.5 to 7 at most widths
LEAST_GAIN = {1: 2.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.0, 6: 3.0, 8: 3.0}


@each_kind
@pytest.mark.parametrize("bits", BITS)
def test_feedback_lowers_the_layers_loss(bits: int, kind: str) -> None:
    residual, fmt = residual_of(), feedback(bits)
    found = loss_left(residual, encode_calibrated(residual, [fmt], hessian_of(kind))[0], fmt, kind)
    for importance in (None, moment(kind).diagonal()):
        plain = loss_left(residual, by_nearest(residual, fmt, importance), fmt, kind)
        assert LEAST_GAIN[bits] * found < plain
    assert found < 0.5 * loss(residual, kind)


@each_kind
def test_more_bits_lose_less(kind: str) -> None:
    residual = residual_of()
    formats = [feedback(bits) for bits in BITS]
    results = encode_calibrated(residual, formats, hessian_of(kind))
    losses = [loss_left(residual, one, fmt, kind) for one, fmt in zip(results, formats, strict=True)]
    for finer, coarser in pairwise(losses):
        assert 2 * finer < coarser


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [32, 64, 128, WHOLE_ROW, 80])
@pytest.mark.parametrize("columns", [128, 100])
def test_any_groups(columns: int, group_size: int, scale_dtype: str) -> None:
    # the last group may be shorter: 128 in groups of 80, 100 in any, and longer than the row
    kind, residual = "autoregressive", residual_of(ROWS, columns)
    formats = [feedback(bits, group_size=group_size, scale_dtype=scale_dtype) for bits in (8, 4, 1)]
    results = encode_calibrated(residual, formats, hessian_of(kind, columns))
    for fmt, encoded in zip(formats, results, strict=True):
        tensors = encoded.tensors()
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == fmt.layout(ROWS, columns)
        assert bool((encoded.scale >= 0).all())
        plain = loss_left(residual, by_nearest(residual, fmt), fmt, kind)
        assert 2 * loss_left(residual, encoded, fmt, kind) < plain


def test_what_is_stored_is_contiguous() -> None:
    for encoded in encode_calibrated(residual_of(), [feedback(4), feedback(4, density=0.5)], hessian_of("low rank")):
        assert all(tensor.is_contiguous() for tensor in encoded.tensors().values())


@pytest.mark.parametrize("bits", BITS)
def test_what_is_decoded_are_levels_times_scales(bits: int) -> None:
    residual, fmt = residual_of(), feedback(bits, scale_dtype="float32")
    encoded = encode_calibrated(residual, [fmt], hessian_of("low rank"))[0]
    scale = encoded.scale.repeat_interleave(64, dim=1)
    decoded = decode(encoded, fmt, in_features=COLUMNS)
    levels = (decoded / scale * 2).round() / 2
    assert torch.allclose(levels * scale, decoded, rtol=1e-6)
    if bits == 8:
        assert torch.equal(levels, levels.round())
        assert levels.abs().max() <= 127
    else:
        assert torch.equal(levels + 0.5, (levels + 0.5).round())
        assert levels.abs().max() <= 2 ** (bits - 1) - 0.5
    assert same(from_levels(levels, encoded.scale, fmt), encoded)


@each_kind
def test_formats_encoded_together_are_those_encoded_alone(kind: str) -> None:
    residual = residual_of()
    formats = [
        *(feedback(bits) for bits in BITS),
        *(feedback(bits, group_size=128) for bits in (4, 1)),
        feedback(3, density=0.25),
        feedback(2, scale_dtype="float32"),
        feedback(4, density=0.5),
        feedback(4),
    ]
    together = encode_calibrated(residual, formats, hessian_of(kind))
    assert len(together) == len(formats)
    assert same(together[3], together[-1])
    for fmt, encoded in zip(formats, together, strict=True):
        alone = encode_calibrated(residual, [fmt], hessian_of(kind))[0]
        decoded, decoded_alone = (decode(one, fmt, in_features=COLUMNS) for one in (encoded, alone))
        # the matrix products may round differently, and a tie then goes the other way: in a row, not in all
        assert (decoded != decoded_alone).any(dim=1).sum() <= 1
        assert loss(residual - decoded, kind) == pytest.approx(loss(residual - decoded_alone, kind), rel=0.01)


def test_no_formats() -> None:
    assert encode_calibrated(residual_of(), [], hessian_of("low rank")) == []


FORMATS = [feedback(8), feedback(4), feedback(2), feedback(1), feedback(4, density=0.2), feedback(1, density=0.2)]


def test_encoding_twice_gives_the_same_bits_and_leaves_the_input_alone() -> None:
    residual = residual_of().clone()
    first, second = (encode_calibrated(residual, FORMATS, hessian_of("low rank")) for _ in range(2))
    assert all(same(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(residual, residual_of())


def test_the_input_dtype_only_matters_by_its_values() -> None:
    half = residual_of().bfloat16()
    first, second = (encode_calibrated(some, FORMATS, hessian_of("low rank")) for some in (half, half.double()))
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_strided_input() -> None:
    strided = residual_of().t().contiguous().t()
    assert not strided.is_contiguous()
    first, second = (encode_calibrated(some, FORMATS, hessian_of("low rank")) for some in (strided, residual_of()))
    for fmt, one, other in zip(FORMATS, first, second, strict=True):
        decoded, expected = (decode(some, fmt, in_features=COLUMNS) for some in (one, other))
        assert (decoded != expected).any(dim=1).sum() <= 1


def test_blocks_of_rows_change_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, kind = residual_of(23), "low rank"
    whole = encode_calibrated(residual, FORMATS, hessian_of(kind))
    base = quantize_base(weight_of(23), hessian_of(kind), group_size=64)
    monkeypatch.setattr(calibrated, "_BLOCK_ENTRIES", 10 * COLUMNS)  # three blocks, the last one of 3 rows
    for fmt, one, other in zip(FORMATS, encode_calibrated(residual, FORMATS, hessian_of(kind)), whole, strict=True):
        if fmt.sparse:
            # the scales of a block are taken or left together, so other blocks may keep other entries
            assert mask_of(one, COLUMNS).sum() == fmt.kept(23, COLUMNS)
            assert loss_left(residual, one, fmt, kind) < 1.2 * loss_left(residual, other, fmt, kind)
        else:
            decoded, expected = (decode(some, fmt, in_features=COLUMNS) for some in (one, other))
            assert (decoded != expected).any(dim=1).sum() <= 1
    again = quantize_base(weight_of(23), hessian_of(kind), group_size=64)
    assert (again.codes != base.codes).any(dim=1).sum() <= 1


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.bits}-{fmt.density:g}")
def test_a_residual_of_zero_stays_zero(fmt: ResidualFormat) -> None:
    encoded = encode_calibrated(torch.zeros(4, COLUMNS), [fmt], hessian_of("low rank"))[0]
    assert not decode(encoded, fmt, in_features=COLUMNS).any()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.bits}-{fmt.density:g}")
def test_a_row_of_zeros_stays_zero_beside_others(fmt: ResidualFormat) -> None:
    residual = residual_of().clone()
    residual[3] = 0
    encoded = encode_calibrated(residual, [fmt], hessian_of("autoregressive"))[0]
    decoded = decode(encoded, fmt, in_features=COLUMNS)
    assert bool(torch.isfinite(decoded).all())
    assert not decoded[3].any()
    assert bool(decoded[[row for row in range(ROWS) if row != 3]].any(dim=1).all())


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_a_layer_that_saw_no_input_is_rounded_to_nearest(bits: int) -> None:
    residual, fmt = residual_of(), feedback(bits, scale_dtype="float32")
    encoded = encode_calibrated(residual, [fmt], Hessian.prepare(torch.zeros(COLUMNS, COLUMNS)))[0]
    nearest = decode(by_nearest(residual, fmt), fmt, in_features=COLUMNS)
    error, plain = ((residual - some).norm() for some in (decode(encoded, fmt, in_features=COLUMNS), nearest))
    # no worse than by the codec, whose scales are searched once and not refitted; below 4 bits it is shrunk by 1 %
    assert error <= 1.002 * plain


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_power_of_two_only_moves_the_scales(bits: int) -> None:
    residual, fmt = residual_of(), feedback(bits)
    plain = encode_calibrated(residual, [fmt], hessian_of("low rank"))[0]
    for exponent in (-30, -10, 10, 30):
        moved = encode_calibrated(residual * 2.0**exponent, [fmt], hessian_of("low rank"))[0]
        assert torch.equal(moved.codes, plain.codes)
        assert torch.equal(moved.scale.double(), plain.scale.double() * 2.0**exponent)


def test_dead_columns_cost_nothing() -> None:
    dead = moment("autoregressive").clone()
    dead[64:96], dead[:, 64:96] = 0, 0
    residual, fmt = residual_of(), feedback(2)
    encoded = encode_calibrated(residual, [fmt], Hessian.prepare(dead))[0]
    error = (residual - decode(encoded, fmt, in_features=COLUMNS)).double()
    plain = (residual - decode(by_nearest(residual, fmt), fmt, in_features=COLUMNS)).double()
    assert bool(torch.isfinite(error).all())
    assert 3 * (error * (error @ dead)).sum() < (plain * (plain @ dead)).sum()


@pytest.mark.parametrize("shape", [(COLUMNS,), (2, 2, COLUMNS), (4, COLUMNS + 1), (COLUMNS, 4)])
def test_a_residual_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a residual \[out, 128\], got shape \("):
        encode_calibrated(torch.zeros(shape), [feedback()], hessian_of("low rank"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "dithered"])
def test_another_rounding_is_refused(rounding: str) -> None:
    with pytest.raises(ValueError, match="feedback"):
        encode_calibrated(residual_of(), [feedback(), replace(feedback(), rounding=rounding)], hessian_of("low rank"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.bits}-{fmt.density:g}")
def test_a_residual_that_is_not_finite(fmt: ResidualFormat, value: float) -> None:
    residual = residual_of().clone()
    residual[2, 99] = value
    with pytest.raises(ValueError, match="the residual has NaN or infinite entries"):
        encode_calibrated(residual, [fmt], hessian_of("low rank"))


# --- sparse residuals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_a_sparse_residual_keeps_what_the_format_says(bits: int, density: float) -> None:
    residual, fmt = residual_of(), feedback(bits, density=density)
    encoded = encode_calibrated(residual, [fmt], hessian_of("autoregressive"))[0]
    tensors = encoded.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == fmt.layout(ROWS, COLUMNS)
    keep = mask_of(encoded, COLUMNS)
    assert keep.sum() == fmt.kept(ROWS, COLUMNS)
    decoded = decode(encoded, fmt, in_features=COLUMNS)
    assert not decoded[~keep].any()


def test_no_entry_is_kept_in_vain() -> None:
    weight, fmt = weight_of(), feedback(4, density=0.02)
    base = quantize_base(weight, hessian_of("low rank"), group_size=64, balance=0)
    encoded = encode_calibrated(weight - base.dequantize(64), [fmt], hessian_of("low rank"))[0]
    # below 8 bits no level is 0
    assert bool((decode(encoded, fmt, in_features=COLUMNS)[mask_of(encoded, COLUMNS)] != 0).all())


@each_kind
@pytest.mark.parametrize("density", [0.05, 0.125, 0.5])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_a_sparse_residual_lowers_the_layers_loss(bits: int, density: float, kind: str) -> None:
    residual, fmt = residual_of(), feedback(bits, density=density)
    found = loss_left(residual, encode_calibrated(residual, [fmt], hessian_of(kind))[0], fmt, kind)
    plain = loss_left(residual, by_nearest(residual, fmt, moment(kind).diagonal()), fmt, kind)
    assert {0.05: 1.05, 0.125: 1.15, 0.5: 1.8}[density] * found < plain < loss(residual, kind)


def losses_on_a_base_that_compensated(fmt: ResidualFormat, kind: str) -> tuple[float, float, float]:
    """The layer's loss with the base alone, with a residual by nearest, and with one by feedback."""
    hessian, weight = hessian_of(kind), weight_of()
    residual = weight - quantize_base(weight, hessian, group_size=64, balance=0).dequantize(64)
    plain = loss_left(residual, by_nearest(residual, fmt, moment(kind).diagonal()), fmt, kind)
    return loss(residual, kind), plain, loss_left(residual, encode_calibrated(residual, [fmt], hessian)[0], fmt, kind)


@pytest.mark.parametrize(
    ("kind", "density"),
    [("autoregressive", 0.125), ("autoregressive", 0.25), ("low rank", 0.25), ("low rank", 0.5)],
)
def test_a_sparse_residual_helps_a_base_that_compensated(density: float, kind: str) -> None:
    # its errors make good for one another: correcting the largest on their own tears that web
    alone, plain, found = losses_on_a_base_that_compensated(feedback(4, density=density), kind)
    assert found < 0.95 * alone
    assert 1.5 * found < plain


@each_kind
@pytest.mark.parametrize("density", [0.05, 0.125])
def test_a_few_entries_help_a_base_that_compensated(density: float, kind: str) -> None:
    alone, plain, found = losses_on_a_base_that_compensated(feedback(4, density=density), kind)
    assert plain > alone
    assert found < alone


# --- W4 ------------------------------------------------------------------------------------------------------------


def gptq(weight: Tensor, measured: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """GPTQ, dequantized: scales `absmax / 7.5`, 1 % damping, columns by falling mean square; float64, no blocks."""
    matrix = measured + 0.01 * measured.diagonal().mean() * torch.eye(len(measured), dtype=torch.float64)
    grouped = weight.reshape(len(weight), -1, group)
    scale = (grouped.abs().amax(-1) / 7.5).to(dtype).double().repeat_interleave(group, dim=1)
    work, inverse = weight.double().clone(), matrix.inverse()
    for column in matrix.diagonal().argsort(descending=True).tolist():
        level = (work[:, column] / scale[:, column]).round().clamp(-8, 7)
        error = (work[:, column] - level * scale[:, column]) / inverse[column, column]
        done = work[:, column] * 0 + level * scale[:, column]
        work = work - error[:, None] * inverse[column]
        work[:, column] = done
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0
    return work.float()


def per_entry(scale: Tensor, base: QuantizedBase) -> Tensor:
    """The size of each entry's step, `[out, in]`."""
    return scale.float().abs().repeat_interleave(base.codes.shape[1] // scale.shape[1], dim=1)


@each_kind
@pytest.mark.parametrize("group", [32, WHOLE_ROW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_loses_less_than_round_to_nearest_and_gptq(dtype: torch.dtype, group: int, kind: str) -> None:
    weight, columns = weight_of(), COLUMNS if group == WHOLE_ROW else group
    base = quantize_base(weight, hessian_of(kind), group_size=group, balance=0, scale_dtype=dtype)
    found = loss(weight - base.dequantize(group), kind)
    by_gptq = loss(weight - gptq(weight, moment(kind), columns, dtype), kind)
    assert found < 0.85 * by_gptq
    assert 4 * found < loss(weight - rtn(weight, columns), kind)


@each_kind
@pytest.mark.parametrize(("group", "symmetric"), [(64, True), (WHOLE_ROW, False)])
def test_balance_trades_the_bases_loss_for_its_residual(group: int, symmetric: bool, kind: str) -> None:
    weight = weight_of()
    losses, sizes, remaining = [], [], []
    for balance in (1, 0.7, 0):  # the best start for a residual, the best for W4 alone, and between
        base = quantize_base(weight, hessian_of(kind), group_size=group, balance=balance, symmetric=symmetric)
        residual = weight - base.dequantize(group)
        losses.append(loss(residual, kind))
        sizes.append(float(residual.std()))
        fmt = feedback(4)
        encoded = encode_calibrated(residual, [fmt], hessian_of(kind))[0]
        remaining.append(loss_left(residual, encoded, fmt, kind))
    assert losses[0] > 1.5 * losses[1]
    assert losses[1] > losses[2]
    assert sizes == sorted(sizes)
    assert remaining == sorted(remaining)


@pytest.mark.parametrize("balance", [0, 1])
@pytest.mark.parametrize("group", [32, WHOLE_ROW])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_base_is(dtype: torch.dtype, symmetric: bool, group: int, balance: float) -> None:
    weight, kind = weight_of(16), "autoregressive"
    groups = 1 if group == WHOLE_ROW else COLUMNS // group
    base = quantize_base(
        weight, hessian_of(kind), group_size=group, balance=balance, symmetric=symmetric, scale_dtype=dtype
    )
    assert (base.codes.dtype, base.codes.shape) == (torch.int8, weight.shape)
    assert (base.scale.dtype, base.scale.shape) == (dtype, (16, groups))
    assert base.codes.min() >= -8
    assert base.codes.max() <= 7
    assert bool(torch.isfinite(base.scale).all())
    assert base.codes.is_contiguous()
    assert base.scale.is_contiguous()
    grouped = weight.reshape(16, groups, -1)
    high, low = grouped.amax(-1), grouped.amin(-1)
    if symmetric:
        assert base.zero_point is None
        # the code that stands alone, -8, is on the side of the extreme
        assert torch.equal(base.scale < 0, high > -low)
        zero = torch.zeros(16, groups)
    else:
        assert base.zero_point is not None
        assert (base.zero_point.dtype, base.zero_point.shape) == (torch.int8, (16, groups))
        assert base.zero_point.min() >= -8
        assert base.zero_point.max() <= 7
        assert bool((base.scale > 0).all())
        zero = base.zero_point.float()
    by_hand = torch.stack(
        [(part.float() - zero[:, i, None]) * base.scale[:, i, None].float()
         for i, part in enumerate(base.codes.split(COLUMNS // groups, dim=1))], dim=1
    ).view_as(weight)  # fmt: skip
    assert torch.equal(base.dequantize(group), by_hand)
    assert loss(weight - by_hand, kind) < 0.9 * loss(weight - rtn(weight, COLUMNS // groups), kind)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_at_balance_1_every_code_is_the_nearest(symmetric: bool, dtype: torch.dtype, kind: str) -> None:
    weight = weight_of()
    base = quantize_base(weight, hessian_of(kind), group_size=64, balance=1, symmetric=symmetric, scale_dtype=dtype)
    steps = (weight - base.dequantize(64)).abs() / per_entry(base.scale, base)
    # the covering scale is rounded to its dtype, which an extreme of 8.5 or 15 steps sees that many times
    assert steps.max() <= 0.5 + (8.5 if symmetric else 15) * torch.finfo(dtype).eps / 2 + 1e-4


@each_kind
@pytest.mark.parametrize("symmetric", [True, False])
def test_at_balance_1_codes_are_close_to_the_weight(symmetric: bool, kind: str) -> None:
    weight = weight_of()
    base = quantize_base(weight, hessian_of(kind), group_size=64, balance=1, symmetric=symmetric)
    steps = (weight - base.dequantize(64)).abs() / per_entry(base.scale, base)
    assert (steps > 0.55).double().mean() < 0.02
    assert steps.max() < 1.5


@each_kind
@pytest.mark.parametrize("balance", [0.7, 0.9])
def test_balance_bounds_how_far_a_code_may_be(balance: float, kind: str) -> None:
    weight = weight_of()
    base = quantize_base(weight, hessian_of(kind), group_size=64, balance=balance, scale_dtype=torch.float32)
    steps = (weight - base.dequantize(64)) / per_entry(base.scale, base)
    within = (base.codes > -8) & (base.codes < 7)  # what is clipped may be farther
    assert steps[within].abs().max() <= 0.5 / balance + 1e-4


@each_kind
@pytest.mark.parametrize("balance", [0, 0.7, 1])
def test_balance_bounds_how_small_a_scale_may_be(balance: float, kind: str) -> None:
    weight = weight_of()
    base = quantize_base(weight, hessian_of(kind), group_size=64, balance=balance, scale_dtype=torch.float32)
    grouped = weight.reshape(ROWS, -1, 64)
    smaller = torch.minimum(grouped.amax(-1), -grouped.amin(-1))
    cover = torch.maximum(grouped.abs().amax(-1) / 8.5, smaller / 7.5)
    least = calibrated._LEAST_SCALE + (1 - calibrated._LEAST_SCALE) * balance
    assert bool((base.scale.abs() >= cover * least * (1 - 1e-5)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_lone_code_is_on_the_side_of_the_extreme(symmetric: bool) -> None:
    weight = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    weight[16:] *= -1  # rows that are all positive, then rows that are all negative
    hessian = Hessian.prepare(torch.zeros(64, 64))
    base = quantize_base(weight, hessian, group_size=64, symmetric=symmetric, balance=1, scale_dtype=torch.float32)
    steps = (weight - base.dequantize(64)).abs() / per_entry(base.scale, base)
    assert steps.max() < 0.6
    if symmetric:
        assert bool((base.scale[:16] < 0).all())
        assert bool((base.scale[16:] > 0).all())
        assert base.codes.max() <= 0
        assert bool((base.codes == -8).any(dim=1).all())


def test_scales_of_a_narrow_dtype_cost_little() -> None:
    weight, kind = weight_of(), "low rank"
    bases = {
        dtype: quantize_base(weight, hessian_of(kind), group_size=64, scale_dtype=dtype).dequantize(64)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    exact, half, brain = (loss(weight - dequantized, kind) for dequantized in bases.values())
    assert half < 1.05 * exact
    assert brain < 1.06 * exact


def test_the_defaults() -> None:
    weight, hessian = weight_of(8), hessian_of("low rank")
    default = quantize_base(weight, hessian, group_size=64)
    explicit = quantize_base(
        weight,
        hessian,
        group_size=64,
        balance=calibrated.DEFAULT_BALANCE,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )
    assert 0 < calibrated.DEFAULT_BALANCE < 1
    assert torch.equal(default.codes, explicit.codes)
    assert torch.equal(default.scale, explicit.scale)


def test_channel_wise_is_one_group_of_all_columns() -> None:
    weight, hessian = weight_of(8), hessian_of("low rank")
    row, group = (quantize_base(weight, hessian, group_size=size) for size in (WHOLE_ROW, COLUMNS))
    assert torch.equal(row.codes, group.codes)
    assert torch.equal(row.scale, group.scale)
    assert torch.equal(row.dequantize(WHOLE_ROW), group.dequantize(COLUMNS))


def test_quantizing_twice_gives_the_same_bits_and_leaves_the_weight_alone() -> None:
    weight = weight_of().bfloat16()
    copy = weight.clone()
    for symmetric in (True, False):
        first, second, third = (
            quantize_base(some, hessian_of("low rank"), group_size=64, symmetric=symmetric)
            for some in (weight, weight, weight.double())
        )
        for other in (second, third):
            assert torch.equal(first.codes, other.codes)
            assert torch.equal(first.scale, other.scale)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("balance", [0, 0.7, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric: bool, balance: float) -> None:
    hessian = hessian_of("autoregressive")
    base = quantize_base(torch.zeros(4, COLUMNS), hessian, group_size=64, balance=balance, symmetric=symmetric)
    assert not base.dequantize(64).any()
    weight = weight_of().clone()
    weight[1], weight[2, 64:128] = 0, 0
    base = quantize_base(weight, hessian, group_size=64, balance=balance, symmetric=symmetric)
    dequantized = base.dequantize(64)
    assert bool(torch.isfinite(dequantized).all())
    assert not dequantized[1].any()
    assert not dequantized[2, 64:128].any()
    assert dequantized[2, :64].any()
    assert base.codes.min() >= -8
    assert base.codes.max() <= 7


@pytest.mark.parametrize("balance", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_a_bad_balance(balance: object) -> None:
    with pytest.raises(ConfigError, match=r"balance is .*, expected a number from 0 \(best W4\) to 1"):
        quantize_base(weight_of(), hessian_of("low rank"), group_size=64, balance=balance)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "group_size"), [((4, 128), 80), ((4, 128), 256), ((4, 192), 64), ((128,), 64)])
def test_a_weight_that_does_not_fit(shape: tuple[int, ...], group_size: int) -> None:
    with pytest.raises(ValueError, match=r"expected a weight \[out, 128\] whose columns groups of \d+ divide"):
        quantize_base(torch.zeros(shape), hessian_of("low rank"), group_size=group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(value: float) -> None:
    weight = weight_of().clone()
    weight[2, 99] = value
    with pytest.raises(ValueError, match="the weight has NaN or infinite entries"):
        quantize_base(weight, hessian_of("low rank"), group_size=64)


@pytest.mark.parametrize(("shape", "group_size"), [((128,), WHOLE_ROW), ((4, 128), 0)])
def test_a_weight_of_no_dimensions_and_groups_of_nothing(shape: tuple[int, ...], group_size: int) -> None:
    with pytest.raises(ValueError, match=r"expected a weight \[out, 128\]"):
        quantize_base(torch.zeros(shape), hessian_of("low rank"), group_size=group_size)
