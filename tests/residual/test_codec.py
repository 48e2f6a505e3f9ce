from itertools import product

import pytest
import torch
from torch import Tensor

from srd_modifier.residual import EncodedResidual, ResidualFormat, add_decoded_, codec, decode, encode

ROUNDINGS = ("nearest", "stochastic", "dithered")
NARROW = (4, 3, 2)
BITS = (8, *NARROW)


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 1e-3) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def w4_residual(rows: int, columns: int, sigma: float = 0.02, group: int = 64, seed: int = 0) -> Tensor:
    """What round-to-nearest W4 with scale `absmax / 7` loses of normal weights: uniform within half a step."""
    weight = gaussian(rows, columns, seed, sigma).reshape(rows, -1, group)
    scale = weight.abs().amax(-1, keepdim=True) / 7
    return (weight - (weight / scale).round() * scale).reshape(rows, columns)


def round_trip(residual: Tensor, fmt: ResidualFormat, key: str = "k", importance: Tensor | None = None) -> Tensor:
    encoded = encode(residual, fmt, key=key, importance=importance)
    return decode(encoded, fmt, in_features=residual.shape[1], key=key)


def entry_scale(encoded: EncodedResidual, fmt: ResidualFormat, in_features: int) -> Tensor:
    """The scale of every entry, `[out, in]`, without its sign."""
    columns = fmt.columns_per_group(in_features)
    return encoded.scale.float().abs().repeat_interleave(columns, dim=1)[:, :in_features]


def group_sums(matrix: Tensor, fmt: ResidualFormat) -> Tensor:
    columns = fmt.columns_per_group(matrix.shape[1])
    return torch.stack([part.double().sum(1) for part in matrix.split(columns, dim=1)], dim=1)


def relative_error(residual: Tensor, decoded: Tensor) -> float:
    residual = residual.double()
    return float((decoded.double() - residual).norm() / residual.norm())


# --- 8 bits, nearest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("shape", [(16, 256), (7, 200), (3, 31), (1, 129), (5, 1)])
def test_nearest_at_8_bits_is_within_half_a_step_everywhere(
    shape: tuple[int, int], group_size: int, scale_dtype: str
) -> None:
    residual = gaussian(*shape)
    fmt = ResidualFormat(group_size=group_size, scale_dtype=scale_dtype)
    encoded = encode(residual, fmt)
    error = (residual - decode(encoded, fmt, in_features=shape[1])).abs()
    assert bool((error <= entry_scale(encoded, fmt, shape[1]) / 2 * (1 + 1e-4)).all())
    assert encoded.codes.abs().max() <= 127


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("columns", [128, 200, 31])
def test_nearest_at_8_bits_equals_the_formula(columns: int, group_size: int) -> None:
    residual = gaussian(9, columns, seed=1)
    fmt = ResidualFormat(group_size=group_size, scale_dtype="float32")
    encoded = encode(residual, fmt)
    for number, part in enumerate(residual.split(columns if group_size == -1 else group_size, dim=1)):
        scale = part.abs().max(dim=1).values / 127
        start = number * group_size if number else 0
        codes = torch.clamp(torch.round(part / scale[:, None]), -127, 127)
        assert torch.equal(encoded.scale[:, number], scale)
        assert torch.equal(encoded.codes[:, start : start + part.shape[1]].float(), codes)
        decoded = decode(encoded, fmt, in_features=columns)[:, start : start + part.shape[1]]
        assert torch.equal(decoded, codes * scale[:, None])


def test_a_bfloat16_scale_is_the_next_one_that_clips_nothing() -> None:
    residual = gaussian(64, 256)
    exact = residual.reshape(64, 4, 64).abs().amax(-1).double() / 127
    scale = encode(residual, ResidualFormat()).scale
    below = (scale.view(torch.int16) - 1).view(torch.bfloat16)
    assert bool((scale.double() >= exact * (1 - 1e-7)).all())
    assert bool((below.double() < exact).all())


# --- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
def test_layout_and_bytes_are_those_of_the_tensors(bits: int, rounding: str, density: float, scale_dtype: str) -> None:
    for group_size, shape in product((8, 32, -1), ((5, 100), (1, 64), (33, 1), (1, 1))):
        fmt = ResidualFormat(
            bits=bits, group_size=group_size, rounding=rounding, density=density, scale_dtype=scale_dtype
        )
        tensors = encode(gaussian(*shape), fmt).tensors()
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == fmt.layout(*shape)
        assert sum(t.nbytes for t in tensors.values()) == fmt.bytes(*shape)
        assert all(t.is_contiguous() for t in tensors.values())


def by_hand(codes: list[list[int]], scale: list[list[float]], mask: list[list[int]] | None, bits: int) -> Tensor:
    fmt = ResidualFormat(bits=bits, group_size=8, density=1.0 if mask is None else 0.5)
    stored = EncodedResidual(
        torch.tensor(codes, dtype=torch.int8 if bits == 8 else torch.uint8),
        torch.tensor(scale, dtype=torch.bfloat16),
        None if mask is None else torch.tensor(mask, dtype=torch.uint8),
    )
    return decode(stored, fmt, in_features=10)


def test_decode_of_8_bit_codes_written_by_hand() -> None:
    decoded = by_hand([[-127, 0, 1, 2, 3, 4, 5, 6, 7, 127]], [[0.5, 0.25]], None, 8)
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [[-63.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 1.75, 31.75]]


def test_decode_of_4_bit_codes_written_by_hand() -> None:
    # low nibble first, two's complement; the scale of the second group is negative
    decoded = by_hand([[0x78, 0x10, 0x2F, 0xE3, 0x78]], [[0.5, -2.0]], None, 4)
    assert decoded.tolist() == [[-4, 3.5, 0, 0.5, -0.5, 1, 1.5, -1, 16, -14]]


def test_decode_of_2_bit_codes_written_by_hand() -> None:
    decoded = by_hand([[0b11100100, 0b00000001, 0b1011]], [[1.0, 1.0]], None, 2)
    assert decoded.tolist() == [[0, 1, -2, -1, 1, 0, 0, 0, -1, -2]]


def test_decode_of_sparse_codes_written_by_hand() -> None:
    # one row of codes fills the set bits of the mask in row-major order
    decoded = by_hand([[-8 & 15 | 3 << 4, 1]], [[0.5, 0.25], [1.0, 2.0]], [[0b10000001, 0], [0, 0b10]], 4)
    expected = torch.zeros(2, 10)
    expected[0, 0], expected[0, 7], expected[1, 9] = -4.0, 1.5, 2.0
    assert torch.equal(decoded, expected)


def test_suffixes_of_the_tensors() -> None:
    residual = gaussian(2, 64)
    assert list(encode(residual, ResidualFormat()).tensors()) == ["weight_d8", "weight_d8_scale"]
    sparse = encode(residual, ResidualFormat(density=0.5)).tensors()
    assert list(sparse) == ["weight_d8", "weight_d8_scale", "weight_d8_mask"]


# --- any input -----------------------------------------------------------------------------------------------------

ALL_FORMATS = [
    ResidualFormat(bits=bits, rounding=rounding, density=density)
    for bits, rounding, density in product(BITS, ROUNDINGS, (1.0, 0.25))
]


def label(fmt: ResidualFormat) -> str:
    return f"{fmt.bits}-{fmt.rounding}-{fmt.density:g}"


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_a_residual_of_zero_stays_zero(fmt: ResidualFormat) -> None:
    assert not round_trip(torch.zeros(4, 100), fmt).any()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_a_group_of_zeros_stays_zero_beside_others(fmt: ResidualFormat) -> None:
    residual = gaussian(4, 192)
    residual[1, 64:128] = 0
    residual[3] = 0
    decoded = round_trip(residual, fmt)
    assert bool(torch.isfinite(decoded).all())
    assert not decoded[1, 64:128].any()
    assert not decoded[3].any()
    assert decoded[0].any()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_encoding_twice_gives_the_same_bits(fmt: ResidualFormat) -> None:
    residual = gaussian(6, 100)
    first, second = encode(residual, fmt, key="k").tensors(), encode(residual, fmt, key="k").tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_inputs_are_left_alone(fmt: ResidualFormat) -> None:
    residual, importance = gaussian(6, 100), torch.rand(100, generator=torch.Generator().manual_seed(0))
    copies = residual.clone(), importance.clone()
    encoded = encode(residual, fmt, key="k", importance=importance)
    stored = {name: tensor.clone() for name, tensor in encoded.tensors().items()}
    decode(encoded, fmt, in_features=100, key="k")
    assert torch.equal(residual, copies[0])
    assert torch.equal(importance, copies[1])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoded.tensors().items())


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_blocks_of_rows_change_nothing(fmt: ResidualFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    residual, importance = gaussian(23, 100), torch.rand(100, generator=torch.Generator().manual_seed(0))
    whole = encode(residual, fmt, key="k", importance=importance)
    decoded = decode(whole, fmt, in_features=100, key="k")
    for entries in (1, 100, 450):
        monkeypatch.setattr(codec, "_BLOCK_ENTRIES", entries)
        blocked = encode(residual, fmt, key="k", importance=importance)
        for name, tensor in whole.tensors().items():
            assert torch.equal(blocked.tensors()[name], tensor)
        assert torch.equal(decode(whole, fmt, in_features=100, key="k"), decoded)


def test_a_matrix_larger_than_a_block() -> None:
    residual = gaussian(1030, 1032)
    assert residual.numel() > codec._BLOCK_ENTRIES
    fmt = ResidualFormat(scale_dtype="float32")
    assert torch.equal(encode(residual, fmt).codes[-7:], encode(residual[-7:], fmt).codes)
    assert relative_error(residual, round_trip(residual, fmt)) < 0.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_input_dtype_only_matters_by_its_values(dtype: torch.dtype, bits: int) -> None:
    residual = gaussian(4, 128, scale=1.0).to(dtype)
    fmt = ResidualFormat(bits=bits)
    for tensor, same in zip(encode(residual, fmt)[:2], encode(residual.float(), fmt)[:2], strict=True):
        assert torch.equal(tensor, same)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_strided_input(fmt: ResidualFormat) -> None:
    residual = gaussian(100, 6).t()
    assert not residual.is_contiguous()
    strided, compact = encode(residual, fmt).tensors(), encode(residual.contiguous(), fmt).tensors()
    assert all(torch.equal(strided[name], compact[name]) for name in strided)


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [-100, -40, -20, 20, 60, 100])
def test_a_power_of_two_only_moves_the_scales(exponent: int, bits: int, density: float) -> None:
    # 2**-40 is 1e-12; 2**100 squared is beyond float32
    fmt = ResidualFormat(bits=bits, density=density)
    residual = gaussian(4, 128, scale=1.0)
    plain, moved = encode(residual, fmt), encode(residual * 2.0**exponent, fmt)
    assert torch.equal(moved.scale.double(), plain.scale.double() * 2.0**exponent)
    assert torch.equal(moved.codes, plain.codes)


@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), ()])
def test_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a residual \[out_features, in_features\], got shape \("):
        encode(torch.zeros(shape), ResidualFormat())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_not_finite(fmt: ResidualFormat, value: float) -> None:
    residual = gaussian(4, 100)
    residual[2, 99] = value
    with pytest.raises(ValueError, match="the residual has NaN or infinite entries"):
        encode(residual, fmt)


def test_a_float64_entry_beyond_float32_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(torch.full((1, 64), 1e300, dtype=torch.float64), ResidualFormat())


# --- the three roundings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["stochastic", "dithered"])
def test_noise_depends_on_seed_and_key(rounding: str, bits: int) -> None:
    residual = gaussian(4, 128)
    fmt = ResidualFormat(bits=bits, rounding=rounding)
    codes = encode(residual, fmt, key="a").codes
    assert not torch.equal(codes, encode(residual, fmt, key="b").codes)
    other_seed = ResidualFormat(bits=bits, rounding=rounding, seed=1)
    assert not torch.equal(codes, encode(residual, other_seed, key="a").codes)


def test_nearest_does_not_depend_on_seed_and_key() -> None:
    residual = gaussian(4, 128)
    codes = encode(residual, ResidualFormat(), key="a").codes
    assert torch.equal(codes, encode(residual, ResidualFormat(seed=1), key="b").codes)


def test_dithered_codes_need_their_own_key() -> None:
    residual = gaussian(4, 128)
    fmt = ResidualFormat(bits=4, rounding="dithered")
    encoded = encode(residual, fmt, key="a")
    right, wrong = (decode(encoded, fmt, in_features=128, key=key) for key in "ab")
    assert relative_error(residual, wrong) > 1.3 * relative_error(residual, right)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_stochastic_is_right_on_average(bits: int, scale_dtype: str) -> None:
    residual = gaussian(4, 128, seed=2)
    seeds = 300
    formats = [
        ResidualFormat(bits=bits, rounding="stochastic", scale_dtype=scale_dtype, seed=seed) for seed in range(seeds)
    ]
    scale = entry_scale(encode(residual, formats[0]), formats[0], 128)
    errors = torch.stack([(round_trip(residual, fmt) - residual) / scale for fmt in formats]).double()
    # per entry the steps are Bernoulli: never more than a step off, with a variance of p (1 - p)
    assert errors.abs().max() <= 1 + 1e-4
    steps = residual / scale
    variance = ((steps - steps.floor()) * (steps.ceil() - steps)).double()
    assert (errors.mean(0).sum() / (variance.sum() / seeds).sqrt()).abs() < 4
    z = errors.mean(0)[variance > 0.01] / (variance[variance > 0.01] / seeds).sqrt()
    # 512 entries: five standard errors happen by chance once in three thousand runs; the seeds are fixed
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean() < 1.25


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_dithered_error_is_uniform_and_independent_of_the_residual(bits: int, scale_dtype: str) -> None:
    residual = gaussian(256, 256, seed=3)
    fmt = ResidualFormat(bits=bits, rounding="dithered", scale_dtype=scale_dtype)
    encoded = encode(residual, fmt, key="k")
    scale = entry_scale(encoded, fmt, 256)
    error = ((decode(encoded, fmt, in_features=256, key="k") - residual) / scale).double().flatten()
    n = error.numel()
    assert error.abs().max() <= 0.5 + 1e-4  # more would be a clipped code
    assert error.mean().abs() < 4 * (1 / 12 / n) ** 0.5
    assert (error.square().mean() - 1 / 12).abs() < 4 * (1 / 180 / n) ** 0.5
    # Kolmogorov-Smirnov against the uniform, at one in a thousand
    expected = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (error.sort().values + 0.5 - expected).abs().max() < 1.95 / n**0.5
    steps = (residual / scale).double().flatten()
    fraction = steps - steps.round()
    for a, b in [
        (error, steps),
        (error, fraction),
        (error.square(), steps.square()),
        (error.square(), fraction.square()),
    ]:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 4 / n**0.5


@pytest.mark.parametrize("rounding", ["stochastic", "dithered"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_noisy_roundings_never_clip_the_extremes(bits: int, rounding: str, scale_dtype: str) -> None:
    # every entry is the absmax of its group, of either sign
    magnitude = gaussian(200, 1, seed=4).abs()
    residual = magnitude * torch.tensor([1.0, -1.0]).repeat(64)
    fmt = ResidualFormat(bits=bits, rounding=rounding, scale_dtype=scale_dtype)
    encoded = encode(residual, fmt, key="k")
    error = (decode(encoded, fmt, in_features=128, key="k") - residual).abs()
    limit = 0.5 if rounding == "dithered" else 1.0
    assert bool((error <= entry_scale(encoded, fmt, 128) * limit * (1 + 1e-4)).all())


def test_nearest_error_follows_a_constant_residual_and_dithered_error_does_not() -> None:
    residual = torch.full((64, 64), 0.3)
    residual[:, 0] = 7.0  # at 4 bits a step of 1 or a little more
    error = {}
    for rounding in ("nearest", "dithered"):
        fmt = ResidualFormat(bits=4, rounding=rounding, scale_dtype="float32")
        error[rounding] = (round_trip(residual, fmt) - residual)[:, 1:]
    assert error["nearest"].unique().numel() == 1
    assert error["nearest"].mean().abs() > 0.25
    step = 7.0 / 6.5
    assert error["dithered"].mean().abs() < 4 * step * (1 / 12 / (64 * 63)) ** 0.5


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_nearest_has_the_least_error(bits: int, group_size: int) -> None:
    residual = w4_residual(64, 512)
    error = {}
    for rounding in ROUNDINGS:
        fmt = ResidualFormat(bits=bits, group_size=group_size, rounding=rounding)
        error[rounding] = relative_error(residual, round_trip(residual, fmt))
    assert error["nearest"] < min(error["stochastic"], error["dithered"])


@pytest.mark.parametrize(
    ("bits", "rounding", "figure"),
    [
        (8, "nearest", 0.0039),
        (8, "stochastic", 0.0055),
        (8, "dithered", 0.0039),
        (4, "stochastic", 0.099),
        (4, "dithered", 0.077),
        (2, "stochastic", 0.69),
        (2, "dithered", 0.99),
    ],
)
def test_measured_relative_error(bits: int, rounding: str, figure: float) -> None:
    residual = w4_residual(256, 1024)
    fmt = ResidualFormat(bits=bits, rounding=rounding)
    assert relative_error(residual, round_trip(residual, fmt)) == pytest.approx(figure, rel=0.02)


# --- narrow codes: the search of the scale -------------------------------------------------------------------------


def covering_error(residual: Tensor, fmt: ResidualFormat, importance: Tensor | None = None) -> Tensor:
    """Squared error of each group with scale `absmax / high`, with which no entry is clipped."""
    high = 2 ** (fmt.bits - 1) - 1
    parts = []
    for part in residual.split(fmt.columns_per_group(residual.shape[1]), dim=1):
        scale = part.abs().max(dim=1, keepdim=True).values / high
        parts.append(torch.round(part / scale) * scale - part)
    error = torch.cat(parts, dim=1).square()
    return group_sums(error if importance is None else error * importance, fmt)


@pytest.mark.parametrize("residual", [w4_residual(64, 512), gaussian(64, 500)], ids=["w4", "gaussian"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", NARROW)
def test_the_search_lowers_the_error_of_the_covering_scale(bits: int, group_size: int, residual: Tensor) -> None:
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    error = group_sums((round_trip(residual, fmt) - residual).square(), fmt)
    assert error.sum() < 0.95 * covering_error(residual, fmt).sum()


@pytest.mark.parametrize("residual", [w4_residual(64, 512), gaussian(64, 500)], ids=["w4", "gaussian"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", NARROW)
def test_the_search_is_in_no_group_worse_than_the_covering_scale(bits: int, group_size: int, residual: Tensor) -> None:
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    error = group_sums((round_trip(residual, fmt) - residual).square(), fmt)
    worse = error > covering_error(residual, fmt) * (1 + 1e-4)
    assert not worse.any(), f"{worse.double().mean():.1%} of the groups"


@pytest.mark.parametrize("bits", NARROW)
def test_the_extra_code_goes_to_the_larger_extreme(bits: int) -> None:
    residual = gaussian(64, 128)
    fmt = ResidualFormat(bits=bits)
    encoded = encode(residual, fmt)
    groups = residual.reshape(64, 2, 64)
    assert torch.equal(encoded.scale < 0, groups.amax(-1) > -groups.amin(-1))
    assert torch.equal(round_trip(-residual, fmt), -round_trip(residual, fmt))


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", NARROW)
def test_importance_lowers_the_weighted_error_of_every_group(bits: int, group_size: int) -> None:
    residual = w4_residual(32, 512)
    importance = gaussian(1, 512, seed=5, scale=1.0).exp().square().flatten()
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    plain = group_sums((round_trip(residual, fmt) - residual).square() * importance, fmt)
    weighted = group_sums((round_trip(residual, fmt, importance=importance) - residual).square() * importance, fmt)
    assert bool((weighted <= plain * (1 + 1e-4)).all())
    assert weighted.sum() < 0.99 * plain.sum()


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("bits", BITS)
def test_equal_importance_is_no_importance(bits: int, density: float) -> None:
    residual = gaussian(4, 100)
    fmt = ResidualFormat(bits=bits, density=density)
    plain, equal = encode(residual, fmt), encode(residual, fmt, importance=torch.full((100,), 4.0))
    assert all(torch.equal(tensor, equal.tensors()[name]) for name, tensor in plain.tensors().items())


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("bits", NARROW)
def test_columns_that_saw_no_input_are_encoded_as_without_importance(bits: int, density: float) -> None:
    # an expert that no calibration token was routed to
    residual = gaussian(4, 128)
    fmt = ResidualFormat(bits=bits, density=density)
    expected = relative_error(residual, round_trip(residual, fmt))
    assert relative_error(residual, round_trip(residual, fmt, importance=torch.zeros(128))) <= expected * 1.0001


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("length", [1, 32, 65, 129])
def test_importance_of_another_length_is_refused(length: int, density: float) -> None:
    with pytest.raises(ValueError, match="importance"):
        encode(gaussian(4, 64), ResidualFormat(bits=4, density=density), importance=torch.ones(length))


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importance_that_is_no_mean_square_is_refused(value: float, density: float) -> None:
    importance = torch.ones(64)
    importance[3] = value
    with pytest.raises(ValueError, match="importance"):
        encode(gaussian(4, 64), ResidualFormat(bits=4, density=density), importance=importance)


# --- sparse --------------------------------------------------------------------------------------------------------


def mask_of(encoded: EncodedResidual, in_features: int) -> Tensor:
    """The kept entries, read from the mask's bits with Python's integers."""
    assert encoded.mask is not None
    rows = [[byte >> bit & 1 for byte in row for bit in range(8)][:in_features] for row in encoded.mask.tolist()]
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(8, 64), (7, 100), (1, 9)])
def test_the_entries_of_largest_score_are_kept(shape: tuple[int, int], density: float, with_importance: bool) -> None:
    residual = gaussian(*shape, seed=6)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(7)) if with_importance else None
    fmt = ResidualFormat(density=density)
    keep = mask_of(encode(residual, fmt, importance=importance), shape[1])
    score = [
        value**2 * (1.0 if importance is None else float(importance[position % shape[1]]))
        for position, value in enumerate(residual.flatten().tolist())
    ]
    best = sorted(range(len(score)), key=lambda position: -score[position])
    assert keep.sum() == fmt.kept(*shape)
    assert keep.flatten().nonzero().flatten().tolist() == sorted(best[: fmt.kept(*shape)])


def test_equal_scores_are_kept_in_row_major_order() -> None:
    residual = torch.full((3, 10), 1e-3)
    residual[1] = -1e-3
    residual[2, 4] = 2e-3
    keep = mask_of(encode(residual, ResidualFormat(density=0.4)), 10)
    assert keep.flatten().nonzero().flatten().tolist() == [*range(11), 24]


@pytest.mark.parametrize("bits", BITS)
def test_the_least_density_keeps_the_one_largest_entry(bits: int) -> None:
    residual = gaussian(4, 100)
    residual[2, 70] = -1.0
    decoded = round_trip(residual, ResidualFormat(bits=bits, density=1 / 400))
    assert decoded.nonzero().tolist() == [[2, 70]]
    assert decoded[2, 70] == pytest.approx(-1.0, rel=0.01)
    assert torch.equal(round_trip(residual, ResidualFormat(bits=bits, density=1e-12)), decoded)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("density", [0.05, 0.37])
def test_sparse_round_trip(bits: int, rounding: str, density: float) -> None:
    residual = gaussian(9, 150)
    fmt = ResidualFormat(bits=bits, rounding=rounding, density=density, group_size=32)
    encoded = encode(residual, fmt, key="k")
    decoded = decode(encoded, fmt, in_features=150, key="k")
    keep = mask_of(encoded, 150)
    assert not decoded[~keep].any()
    steps = ((decoded - residual).abs() / entry_scale(encoded, fmt, 150))[keep]
    if rounding != "nearest" or bits == 8:  # a searched scale may clip
        assert steps.max() <= (1.0 if rounding == "stochastic" else 0.5) * (1 + 1e-4)
    assert relative_error(residual[keep], decoded[keep]) < {8: 0.02, 4: 0.2, 3: 0.4, 2: 1.1}[bits]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_kept_entries_are_coded_as_a_dense_residual_with_zeros(rounding: str) -> None:
    residual = gaussian(9, 150)
    sparse = ResidualFormat(rounding=rounding, density=0.3)
    encoded = encode(residual, sparse, key="k")
    keep = mask_of(encoded, 150)
    dense = encode(residual * keep, ResidualFormat(rounding=rounding), key="k")
    assert torch.equal(encoded.scale, dense.scale)
    assert torch.equal(encoded.codes.flatten(), dense.codes[keep])


# --- alpha ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_add_decoded_adds_alpha_times_the_residual_in_place(fmt: ResidualFormat, columns: int, alpha: float) -> None:
    weight = gaussian(5, columns, seed=8, scale=0.02)
    encoded = encode(gaussian(5, columns), fmt, key="k")
    expected = weight.double() + alpha * decode(encoded, fmt, in_features=columns, key="k").double()
    target = weight.clone()
    assert add_decoded_(target, encoded, fmt, key="k", alpha=alpha) is target
    torch.testing.assert_close(target.double(), expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=label)
def test_alpha_0_leaves_the_weight_bit_for_bit(fmt: ResidualFormat, columns: int) -> None:
    weight = gaussian(5, columns, seed=8, scale=0.02)
    encoded = encode(gaussian(5, columns), fmt, key="k")
    target = add_decoded_(weight.clone(), encoded, fmt, key="k", alpha=0.0)
    assert torch.equal(target.view(torch.int32), weight.view(torch.int32))


def test_alpha_0_leaves_a_negative_zero_its_sign() -> None:
    # a W4 code that rounds to zero from below is -0.0
    weight = torch.full((2, 64), -0.0)
    fmt = ResidualFormat()
    target = add_decoded_(weight.clone(), encode(gaussian(2, 64), fmt), fmt, alpha=0.0)
    assert torch.equal(target.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("rows", [128, 100])
def test_add_decoded_to_a_strided_weight(rows: int) -> None:
    fmt = ResidualFormat()
    encoded = encode(gaussian(5, rows), fmt)
    weight = gaussian(rows, 5, seed=8, scale=0.02).t()
    expected = add_decoded_(weight.contiguous().clone(), encoded, fmt)
    add_decoded_(weight, encoded, fmt)
    assert torch.equal(weight, expected)


# --- why there is no float16 scale ---------------------------------------------------------------------------------


def added_error(sigma: float, dtype: torch.dtype, keep_codes: bool) -> float:
    """How much larger the 8-bit error is with scales in `dtype` than with exact ones.

    `keep_codes` rounds only the stored scale, as a plain cast on saving does; otherwise the scale is rounded up first
    and the codes are computed from it, as `encode` does.
    """
    residual = w4_residual(256, 1024, sigma).reshape(256, -1, 64).double()
    exact = residual.abs().amax(-1, keepdim=True) / 127
    stored = exact.to(dtype)
    if not keep_codes:
        stored = (stored.view(torch.int16) + (stored.double() < exact).to(torch.int16)).view(dtype)
    stored = stored.double()

    def error(code_scale: Tensor, scale: Tensor) -> Tensor:
        return (torch.round(residual / code_scale).clamp(-127, 127) * scale - residual).norm()

    return float(error(exact if keep_codes else stored, stored) / error(exact, exact))


def test_8_bit_scales_lie_in_the_subnormal_range_of_float16() -> None:
    scale = encode(w4_residual(64, 1024, sigma=0.02), ResidualFormat(scale_dtype="float32")).scale
    assert 2e-5 < scale.median() < 4e-5
    assert bool((scale < torch.finfo(torch.float16).smallest_normal).all())


@pytest.mark.parametrize(
    ("sigma", "float16", "bfloat16"),
    [(0.02, 1.01, 1.08), (0.005, 1.18, 1.08), (0.002, 1.84, 1.08), (0.0002, 15.3, 1.09)],
)
def test_scales_rounded_after_the_codes(sigma: float, float16: float, bfloat16: float) -> None:
    assert added_error(sigma, torch.float16, keep_codes=True) == pytest.approx(float16, rel=0.03)
    assert added_error(sigma, torch.bfloat16, keep_codes=True) == pytest.approx(bfloat16, rel=0.03)


@pytest.mark.parametrize(
    ("sigma", "float16", "bfloat16"),
    [(0.02, 1.003, 1.012), (0.005, 1.012, 1.012), (0.002, 1.018, 1.011), (0.0002, 1.108, 1.012), (2e-5, 2.06, 1.012)],
)
def test_scales_rounded_up_before_the_codes(sigma: float, float16: float, bfloat16: float) -> None:
    # float16 loses nothing at ordinary weights; it is its range, not its precision, that ends too early
    assert added_error(sigma, torch.float16, keep_codes=False) == pytest.approx(float16, rel=0.004)
    assert added_error(sigma, torch.bfloat16, keep_codes=False) == pytest.approx(bfloat16, rel=0.004)


@pytest.mark.parametrize("sigma", [0.02, 0.002, 2e-5])
def test_a_bfloat16_scale_costs_about_a_hundredth_of_the_error(sigma: float) -> None:
    residual = w4_residual(256, 1024, sigma)
    error = {
        scale_dtype: relative_error(residual, round_trip(residual, ResidualFormat(scale_dtype=scale_dtype)))
        for scale_dtype in ("bfloat16", "float32")
    }
    assert 1.0 < error["bfloat16"] / error["float32"] < 1.02
