from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from srd_modifier.residual import (
    EncodedResidual,
    ResidualFormat,
    add_decoded_,
    codec,
    decode,
    encode,
    from_levels,
    level_range,
    nearest_levels,
)
from srd_modifier.residual.codec import row_blocks
from srd_modifier.residual.rounding import uniform_noise

ROUNDINGS = ("nearest", "stochastic", "dithered")
NARROW = (6, 5, 4, 3, 2, 1)
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
    """The scale of every entry, `[out, in]`."""
    columns = fmt.columns_per_group(in_features)
    return encoded.scale.float().repeat_interleave(columns, dim=1)[:, :in_features]


def group_sums(matrix: Tensor, fmt: ResidualFormat) -> Tensor:
    columns = fmt.columns_per_group(matrix.shape[1])
    return torch.stack([part.double().sum(1) for part in matrix.split(columns, dim=1)], dim=1)


def all_levels(bits: int) -> Tensor:
    """Every level a code can stand for, in the order of the codes; written out anew, from docs/format.md."""
    if bits == 8:
        return torch.arange(-127.0, 128.0)
    return torch.tensor([code + 0.5 for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))])


def nearest_of_all(steps: Tensor, bits: int) -> Tensor:
    """The nearest level, found by comparing with every one."""
    levels = all_levels(bits)
    return levels[(steps.unsqueeze(-1) - levels).abs().argmin(-1)]


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


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # two's complement from the lowest bits up, and every code stands for itself + 1/2; the scales are 2 and 4
        (6, [0b11_100000, 0b0000_0111, 0b000001_00, 0b00_111110, 0b0000_0101, 0b000000_00, 0b11_100000, 0b0111],
         [-63, 63, 1, 3, -3, 41, 1, 1, -126, 126]),
        (5, [0b111_10000, 0b0_00001_01, 0b1110_0000, 0b10_00000_1, 0b00000_000, 0b111_10000, 0b01],
         [-31, 31, 3, 1, -3, 1, 5, 1, -62, 62]),
        (4, [0x78, 0x10, 0x2F, 0xE3, 0x78], [-15, 15, 1, 3, -1, 5, 7, -3, -30, 30]),
        (3, [0b00_011_100, 0b0_111_001_0, 0b000_010_11, 0b011100], [-7, 7, 1, 3, -1, -3, 5, 1, -14, 14]),
        (2, [0b11100100, 0b00000001, 0b1011], [1, 3, -3, -1, 3, 1, 1, 1, -2, -6]),
        (1, [0b00110010, 0b10], [1, -1, 1, 1, -1, -1, 1, 1, 2, -2]),
    ],
)  # fmt: skip
def test_decode_of_narrow_codes_written_by_hand(bits: int, codes: list[int], expected: list[float]) -> None:
    assert by_hand([codes], [[2.0, 4.0]], None, bits).tolist() == [expected]


def test_decode_of_sparse_codes_written_by_hand() -> None:
    # one row of codes fills the set bits of the mask in row-major order
    decoded = by_hand([[-8 & 15 | 3 << 4, 1]], [[0.5, 0.25], [1.0, 2.0]], [[0b10000001, 0], [0, 0b10]], 4)
    expected = torch.zeros(2, 10)
    expected[0, 0], expected[0, 7], expected[1, 9] = -3.75, 1.75, 3.0
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
        monkeypatch.setattr(codec, "row_blocks", partial(row_blocks, entries=entries))
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
    steps = residual / scale - all_levels(bits)[0]
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


@pytest.mark.parametrize("rounding", ["stochastic", "dithered"])
@pytest.mark.parametrize("bits", NARROW)
def test_noisy_roundings_take_the_least_scale_that_covers(bits: int, rounding: str) -> None:
    # the highest level is the extreme; dither needs no more, for its noise ends where the extreme's code does
    residual = gaussian(64, 256)
    exact = residual.reshape(64, 4, 64).abs().amax(-1).double() / float(all_levels(bits)[-1])
    scale = encode(residual, ResidualFormat(bits=bits, rounding=rounding)).scale
    below = (scale.view(torch.int16) - 1).view(torch.bfloat16)
    assert bool((scale.double() >= exact * (1 - 1e-7)).all())
    assert bool((below.double() < exact).all())


@pytest.mark.parametrize("bits", NARROW)
def test_noisy_codes_are_those_of_the_formula(bits: int) -> None:
    residual = gaussian(16, 128)
    noise = uniform_noise((16, 128), 5, "k").double()
    for rounding in ("stochastic", "dithered"):
        fmt = ResidualFormat(bits=bits, rounding=rounding, scale_dtype="float32", seed=5)
        encoded = encode(residual, fmt, key="k")
        scale = entry_scale(encoded, fmt, 128).double()
        steps = residual.double() / scale
        # to the level below or the one above, the latter with the share of the way that lies behind
        below = (steps - 0.5).floor() + 0.5
        level = torch.where(noise + 0.5 >= 1 - (steps - below), below + 1, below)
        expected = level - noise if rounding == "dithered" else level
        decoded = decode(encoded, fmt, in_features=128, key="k").double() / scale
        off = (decoded - expected).abs() > 1e-4
        assert off.sum() <= 1  # the extreme of a group may be an ulp beyond the highest level


def test_nearest_error_follows_a_constant_residual_and_dithered_error_does_not() -> None:
    residual = torch.full((64, 64), 0.3)
    residual[:, 0] = 7.5  # at 4 bits a step of 1
    error = {}
    for rounding in ("nearest", "dithered"):
        fmt = ResidualFormat(bits=4, rounding=rounding, scale_dtype="float32")
        error[rounding] = (round_trip(residual, fmt) - residual)[:, 1:]
    assert error["nearest"].unique().numel() == 1
    assert error["nearest"].mean().abs() > 0.15
    assert error["dithered"].mean().abs() < 4 * (1 / 12 / (64 * 63)) ** 0.5


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
        (6, "nearest", 0.0152),
        (5, "nearest", 0.0306),
        (4, "nearest", 0.0620),
        (4, "stochastic", 0.0937),
        (4, "dithered", 0.0663),
        (3, "nearest", 0.1254),
        (2, "nearest", 0.2531),
        (2, "stochastic", 0.468),
        (2, "dithered", 0.331),
        (1, "nearest", 0.508),
        (1, "dithered", 0.996),
    ],
)
def test_measured_relative_error(bits: int, rounding: str, figure: float) -> None:
    residual = w4_residual(256, 1024)
    fmt = ResidualFormat(bits=bits, rounding=rounding)
    assert relative_error(residual, round_trip(residual, fmt)) == pytest.approx(figure, rel=0.02)


# --- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_range_of_the_levels(bits: int) -> None:
    levels = all_levels(bits)
    assert level_range(bits) == (float(levels[0]), float(levels[-1]))
    assert len(levels) == (255 if bits == 8 else 2**bits)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_level_is_the_nearest_of_all(bits: int) -> None:
    steps = gaussian(50, 40, scale=2.0**bits / 3)
    copy = steps.clone()
    assert torch.equal(nearest_levels(steps, bits), nearest_of_all(steps, bits))
    assert torch.equal(steps, copy)


@pytest.mark.parametrize("bits", NARROW)
def test_the_nearest_level_has_the_sign_of_the_smallest_number(bits: int) -> None:
    assert nearest_levels(torch.tensor([-1e-30, 1e-30]), bits).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("bits", BITS)
def test_levels_are_stored_and_decoded_as_they_are(bits: int, columns: int) -> None:
    fmt = ResidualFormat(bits=bits, scale_dtype="float32")
    levels = all_levels(bits)[torch.randint(len(all_levels(bits)), (7, columns))]
    scale = gaussian(7, 2).abs()
    encoded = from_levels(levels, scale, fmt)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in encoded.tensors().items()} == fmt.layout(7, columns)
    assert torch.equal(
        decode(encoded, fmt, in_features=columns), levels * scale.repeat_interleave(64, dim=1)[:, :columns]
    )


@pytest.mark.parametrize("bits", BITS)
def test_sparse_levels_are_stored_and_decoded_as_they_are(bits: int) -> None:
    fmt = ResidualFormat(bits=bits, density=0.25)
    keep = torch.zeros(8, 64, dtype=torch.bool)
    keep.view(-1)[torch.randperm(512, generator=torch.Generator().manual_seed(0))[:128]] = True
    levels = all_levels(bits)[torch.randint(len(all_levels(bits)), (8, 64))]
    scale = gaussian(8, 1).abs().bfloat16()
    encoded = from_levels(levels, scale, fmt, keep)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in encoded.tensors().items()} == fmt.layout(8, 64)
    decoded = decode(encoded, fmt, in_features=64)
    assert torch.equal(decoded, levels * keep * scale.float())
    assert not decoded[~keep].any()


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_levels_are_what_encode_stores(bits: int, density: float) -> None:
    residual = gaussian(6, 100)
    fmt = ResidualFormat(bits=bits, density=density)
    encoded = encode(residual, fmt)
    keep = mask_of(encoded, 100) if fmt.sparse else None
    scale = entry_scale(encoded, fmt, 100)
    steps = torch.where(scale == 0, 0, residual / scale)
    again = from_levels(nearest_levels(steps, bits), encoded.scale, fmt, keep)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in encoded.tensors().items())


def test_levels_of_another_scale_or_mask_are_refused() -> None:
    levels, scale = torch.full((4, 64), 0.5), torch.ones(4, 1, dtype=torch.bfloat16)
    dense, sparse = ResidualFormat(bits=4), ResidualFormat(bits=4, density=0.5)
    half = torch.arange(64).expand(4, 64) < 32
    from_levels(levels, scale, sparse, half)
    for other in (scale.float(), scale.T, torch.cat([scale, scale], dim=1)):
        with pytest.raises(ValueError, match=r"expected a scale torch.bfloat16 \(4, 1\), got torch"):
            from_levels(levels, other, dense)
    with pytest.raises(ValueError, match="expected 128 entries to keep, got 256"):
        from_levels(levels, scale, sparse)
    with pytest.raises(ValueError, match="expected 128 entries to keep, got 256"):
        from_levels(levels, scale, sparse, torch.ones(4, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected 256 entries to keep, got 128"):
        from_levels(levels, scale, dense, half)


# --- narrow codes: the search of the scale -------------------------------------------------------------------------


def covering_error(residual: Tensor, fmt: ResidualFormat, importance: Tensor | None = None) -> Tensor:
    """Squared error of each group with scale `absmax / high`, with which no entry is clipped."""
    high = float(all_levels(fmt.bits)[-1])
    parts = []
    for part in residual.split(fmt.columns_per_group(residual.shape[1]), dim=1):
        scale = part.abs().max(dim=1, keepdim=True).values / high
        parts.append(nearest_of_all(part / scale, fmt.bits) * scale - part)
    error = torch.cat(parts, dim=1).square()
    return group_sums(error if importance is None else error * importance, fmt)


def least_error(residual: Tensor, fmt: ResidualFormat, levels: Tensor, importance: Tensor | None = None) -> float:
    """Error of a residual on any grid, with the best of 200 scales of either sign for every group."""
    columns = fmt.columns_per_group(residual.shape[1])
    weight = torch.ones(residual.shape[1]) if importance is None else importance
    total = 0.0
    for part, part_weight in zip(residual.split(columns, dim=1), weight.split(columns), strict=True):
        least = torch.full((len(part),), torch.inf)
        reach = part.abs().amax(-1, keepdim=True) / float(levels.max())
        for fraction in torch.linspace(0.02, 1.1, 200).tolist():
            for scale in (reach * fraction, -reach * fraction):
                # the middles of neighbouring levels part them
                found = levels[torch.bucketize(part / scale, (levels[1:] + levels[:-1]) / 2)]
                least = torch.minimum(least, ((found * scale - part).square() * part_weight).sum(-1))
        total += float(least.double().sum())
    return total


RESIDUALS = {
    "w4": w4_residual(64, 512),
    "uniform": torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) - 0.5,
    "gaussian": gaussian(64, 512),
}


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_half_integers_have_less_error_than_twos_complement(bits: int, group_size: int, kind: str) -> None:
    residual = RESIDUALS[kind]
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    found = float((round_trip(residual, fmt) - residual).double().square().sum())
    whole = all_levels(bits) - 0.5
    reach, least = -float(whole.min()), torch.full((64, fmt.groups(512)), torch.inf).double()
    for fraction in torch.linspace(0.02, reach / (reach - 1), 200).tolist():  # scales up to the covering one
        parts = []
        for part in residual.split(fmt.columns_per_group(512), dim=1):
            scale = part.abs().amax(-1, keepdim=True) * fraction / reach
            parts.append((part / scale).round().clamp(-reach, reach - 1) * scale - part)
        least = torch.minimum(least, group_sums(torch.cat(parts, dim=1).square(), fmt))
    assert found < float(least.sum())
    # A scale with a sign gives the extra code to the larger extreme. That catches up on half-integers only where 3 or
    # 4 bits meet the extremes of small Gaussian groups.
    signed = least_error(residual, fmt, whole)
    if bits == 2 or kind == "uniform":
        assert found < signed
    else:
        assert found < 1.12 * signed


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("bits", "excess"), [(6, 1.25), (5, 1.12), (4, 1.05), (3, 1.02), (2, 1.02), (1, 1.0001)])
def test_the_search_comes_near_the_least_error(
    bits: int, excess: float, group_size: int, kind: str, weighted: bool
) -> None:
    residual = RESIDUALS[kind][:16]
    importance = gaussian(1, 512, seed=5, scale=1.0).exp().square().flatten() if weighted else torch.ones(512)
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    decoded = round_trip(residual, fmt, importance=importance)
    found = float(((decoded - residual).square() * importance).double().sum())
    assert found < excess * least_error(residual, fmt, all_levels(bits), importance)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", NARROW)
def test_the_search_is_in_no_group_worse_than_the_covering_scale(bits: int, group_size: int, kind: str) -> None:
    residual = RESIDUALS[kind]
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    error = group_sums((round_trip(residual, fmt) - residual).square(), fmt)
    covering = covering_error(residual, fmt)
    worse = error > covering * (1 + 1e-4)
    assert not worse.any(), f"{worse.double().mean():.1%} of the groups"
    assert error.sum() < 0.99 * covering.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("residual", [gaussian(64, 500), gaussian(64, 500).pow(5)], ids=["gaussian", "heavy tails"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_one_bit_is_the_sign_and_twice_the_mean_size(group_size: int, residual: Tensor, weighted: bool) -> None:
    importance = torch.rand(500, generator=torch.Generator().manual_seed(5)) if weighted else torch.ones(500)
    fmt = ResidualFormat(bits=1, group_size=group_size, scale_dtype="float32")
    encoded = encode(residual, fmt, importance=importance)
    weight = importance.expand(64, 500)
    mean = group_sums(residual.abs() * weight, fmt) / group_sums(weight, fmt)
    torch.testing.assert_close(encoded.scale.double(), 2 * mean, rtol=1e-5, atol=0.0)
    assert torch.equal(decode(encoded, fmt, in_features=500) > 0, residual > 0)


@pytest.mark.parametrize("bits", NARROW)
def test_levels_are_symmetric_and_scales_positive(bits: int) -> None:
    residual = gaussian(64, 128)
    fmt = ResidualFormat(bits=bits)
    encoded, mirrored = encode(residual, fmt), encode(-residual, fmt)
    assert bool((encoded.scale > 0).all())
    assert torch.equal(encoded.scale, mirrored.scale)
    assert torch.equal(decode(mirrored, fmt, in_features=128), -decode(encoded, fmt, in_features=128))


@pytest.mark.parametrize("bits", NARROW)
def test_an_entry_that_is_not_clipped_is_within_half_a_step(bits: int) -> None:
    residual = gaussian(32, 200)
    fmt = ResidualFormat(bits=bits)
    scale = entry_scale(encode(residual, fmt), fmt, 200)
    decoded = round_trip(residual, fmt)
    assert torch.equal(decoded, nearest_of_all(residual / scale, bits) * scale)
    inside = residual.abs() <= scale * 2 ** (bits - 1)
    assert inside.float().mean() > 0.5
    assert bool(((decoded - residual).abs() <= scale / 2 * (1 + 1e-4))[inside].all())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", NARROW)
def test_the_padding_of_the_last_group_does_not_count(bits: int, weighted: bool) -> None:
    residual = gaussian(16, 44)
    importance = torch.rand(44, generator=torch.Generator().manual_seed(5)) if weighted else None
    padded, whole = ResidualFormat(bits=bits, group_size=64), ResidualFormat(bits=bits, group_size=44)
    assert torch.equal(
        encode(residual, padded, importance=importance).scale, encode(residual, whole, importance=importance).scale
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", NARROW)
def test_dropped_entries_do_not_count(bits: int, weighted: bool) -> None:
    residual = gaussian(16, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(5)) if weighted else None
    sparse = ResidualFormat(bits=bits, density=0.25, scale_dtype="float32")
    encoded = encode(residual, sparse, importance=importance)
    keep = mask_of(encoded, 64)
    for row in range(16):
        dense = ResidualFormat(bits=bits, group_size=-1, scale_dtype="float32")
        kept = residual[row : row + 1, keep[row]]
        alone = encode(kept, dense, importance=None if importance is None else importance[keep[row]])
        torch.testing.assert_close(encoded.scale[row], alone.scale[0], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bits", NARROW)
def test_a_group_that_saw_no_input_is_searched_without_importance(bits: int) -> None:
    residual = gaussian(8, 100)
    importance = torch.ones(100)
    importance[64:] = 0
    fmt = ResidualFormat(bits=bits)
    assert torch.equal(encode(residual, fmt, importance=importance).scale, encode(residual, fmt).scale)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", NARROW)
def test_importance_lowers_the_weighted_error(bits: int, group_size: int) -> None:
    residual = w4_residual(32, 512)
    importance = gaussian(1, 512, seed=5, scale=1.0).exp().square().flatten()
    fmt = ResidualFormat(bits=bits, group_size=group_size, scale_dtype="float32")
    plain = group_sums((round_trip(residual, fmt) - residual).square() * importance, fmt)
    weighted = group_sums((round_trip(residual, fmt, importance=importance) - residual).square() * importance, fmt)
    # not in every group: least squares may take the second best candidate further than the best one
    assert (weighted <= plain * 1.0001).double().mean() > (0.999 if bits == 1 else 0.8)
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
    most = {8: 0.02, 6: 0.05, 5: 0.1, 4: 0.2, 3: 0.4, 2: 0.8, 1: 1.7}[bits]
    assert relative_error(residual[keep], decoded[keep]) < most


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
