"""Our dequantization against compressed-tensors' own, and against the definition."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def scheme(group_size: int, symmetric: bool) -> QuantizationScheme:
    grouping = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **grouping)
    )


def compressed(
    out_features: int, in_features: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a random weight, packed by compressed-tensors."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else in_features // group_size
    scale = torch.rand(out_features, groups, generator=generator) * 0.01 + 1e-4
    zero_point = torch.randint(-8, 8, (out_features, groups), generator=generator, dtype=torch.int8)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.03
    state = {"weight": weight, "weight_scale": scale.to(dtype)}
    if not symmetric:
        state["weight_zero_point"] = zero_point
    return PackedQuantizationCompressor.compress(state, scheme(group_size, symmetric))


def ours(state: dict[str, Tensor]) -> Tensor:
    out_features, in_features = state["weight_shape"].tolist()
    zero_point = unpack_zero_points(state.get("weight_zero_point"), out_features)
    return dequantize_w4(state["weight_packed"], state["weight_scale"], zero_point, in_features)


def same_bits(left: Tensor, right: Tensor) -> bool:
    integer = BITS_OF[left.dtype]
    return left.dtype == right.dtype and torch.equal(left.view(integer), right.contiguous().view(integer))


# --- against compressed-tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((16, 256), 32),
        ((16, 256), 64),
        ((16, 256), 128),
        ((16, 256), -1),
        ((13, 96), 32),  # rows that fill no whole word of zero points
        ((3, 64), 64),
        ((5, 64), 32),  # all zero points of a group in one word
        ((1, 128), 128),
        ((9, 100), -1),  # columns that fill no whole word of codes
        ((5, 31), -1),
        ((4, 3), -1),
        ((7, 1), -1),
        ((2100, 512), 64),  # more than one block of rows
    ],
)
def test_equals_compressed_tensors(
    shape: tuple[int, int], group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    state = compressed(*shape, group_size, symmetric, dtype)
    theirs = PackedQuantizationCompressor.decompress(state, scheme(group_size, symmetric))["weight"]
    found = ours(state)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert same_bits(found.to(dtype), theirs)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_bfloat16_scale_rounds_to_what_compressed_tensors_computes(symmetric: bool) -> None:
    """All 2**16 of them: normal, subnormal, zero, negative; NaN and infinity stay NaN and infinity."""
    scale = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(-1, 1)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(len(scale), 1)
    state = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([len(scale), 16]),
    }
    if not symmetric:
        zero_point = (torch.arange(len(scale)) % 16 - 8).to(torch.int8).reshape(-1, 1)
        state["weight_zero_point"] = pack_to_int32(zero_point, 4, packed_dim=0)
    theirs = PackedQuantizationCompressor.decompress(state, scheme(16, symmetric))["weight"]
    found = ours(state).bfloat16()
    finite = torch.isfinite(scale).flatten()
    assert same_bits(found[finite], theirs[finite])
    assert torch.equal(torch.isnan(found), torch.isnan(theirs))


# --- against the definition ------------------------------------------------------------------------------------------


def by_hand(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int) -> Tensor:
    """`(code - zero) * scale`, one entry at a time, in Python's integers."""
    rows, per_group = len(packed), in_features // scale.shape[1]

    def nibble(word: int, position: int) -> int:
        return ((word & 0xFFFFFFFF) >> (4 * position) & 15) - 8

    weight = torch.empty(rows, in_features)
    for row in range(rows):
        for column in range(in_features):
            code = nibble(int(packed[row, column // 8]), column % 8)
            group = column // per_group
            if zero_point is not None:
                code -= nibble(int(zero_point[row // 8, group]), row % 8)
            weight[row, column] = code * scale[row, group].float()
    return weight


@settings(max_examples=40)
@given(
    rows=st.integers(1, 11),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 12),
    asymmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_definition(rows: int, groups: int, per_group: int, asymmetric: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * per_group

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    packed, zero_point = words(rows, -(-columns // 8)), words(-(-rows // 8), groups) if asymmetric else None
    scale = torch.randn(rows, groups, generator=generator)
    found = dequantize_w4(packed, scale, unpack_zero_points(zero_point, rows), columns)
    assert torch.equal(found, by_hand(packed, scale, zero_point, columns))


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(-8, 7), min_size=1, max_size=20), min_size=1, max_size=9))
def test_brings_back_what_compressed_tensors_packed(rows: list[list[int]]) -> None:
    width = min(len(row) for row in rows)
    codes = torch.tensor([row[:width] for row in rows], dtype=torch.int8)
    found = dequantize_w4(pack_to_int32(codes, 4), torch.ones(len(rows), 1), None, width)
    assert torch.equal(found, codes.float())


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-8, 7), min_size=3, max_size=3), min_size=1, max_size=20))
def test_brings_back_the_zero_points_that_compressed_tensors_packed(rows: list[list[int]]) -> None:
    zeros = torch.tensor(rows, dtype=torch.int8)
    found = unpack_zero_points(pack_to_int32(zeros, 4, packed_dim=0), len(rows))
    assert found is not None
    assert torch.equal(found, zeros.float())


def test_the_inputs_are_left_alone_and_need_not_be_contiguous() -> None:
    state = compressed(16, 64, 32, False, torch.float32)
    before = {name: tensor.clone() for name, tensor in state.items()}
    expected = ours(state)
    transposed = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    assert torch.equal(ours(transposed), expected)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_no_zero_points_stay_none() -> None:
    assert unpack_zero_points(None, 8) is None


# --- errors ----------------------------------------------------------------------------------------------------------


def test_scales_that_do_not_divide_the_columns_are_refused() -> None:
    packed = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="3 scales per row do not divide 32 columns"):
        dequantize_w4(packed, torch.ones(2, 3), None, 32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_codes_that_are_not_int32_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"expected packed codes as int32, got {dtype}"):
        dequantize_w4(torch.zeros(2, 4, dtype=dtype), torch.ones(2, 1), None, 32)


def test_zero_points_that_are_not_int32_are_refused() -> None:
    with pytest.raises(ValueError, match="expected packed codes as int32"):
        unpack_zero_points(torch.zeros(1, 1, dtype=torch.int8), 8)
