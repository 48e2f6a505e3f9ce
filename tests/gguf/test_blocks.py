"""Packed blocks against gguf's numpy code, which knows the layouts of its own accord."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srd_modifier.gguf import ggml
from srd_modifier.gguf.blocks import LAYOUTS, Blocks, pack, unpack
from srd_modifier.gguf.ggml import GGMLType

TYPES = list(LAYOUTS)
each_type = pytest.mark.parametrize("ggml_type", TYPES)
some_blocks = given(
    ggml_type=st.sampled_from(TYPES), rows=st.integers(1, 9), count=st.integers(1, 3), seed=st.integers(0, 2**31)
)

# where a block has halves; all else of it may be any bytes
HALVES = {GGMLType.Q4_1: (0, 2), GGMLType.Q5_1: (0, 2), GGMLType.Q4_K: (0, 2), GGMLType.Q5_K: (0, 2)}
HALVES |= {GGMLType.Q6_K: (208,)}


def finite_halves(*shape: int, generator: torch.Generator) -> Tensor:
    """Any of the finite halves, those below the normal ones and both zeros among them."""
    bits = torch.randint(0, 1 << 16, shape, generator=generator)
    bits = torch.where((bits >> 10 & 31) == 31, bits & ~(1 << 10), bits)  # the largest exponent is that of infinity
    return bits.to(torch.uint16).view(torch.float16)


def random_bytes(ggml_type: GGMLType, rows: int, count: int, seed: int) -> Tensor:
    """Blocks `[rows, row_bytes]` of random bytes with finite scales."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, count, ggml_type.block_bytes)
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if ggml_type is GGMLType.Q8_0:
        data[data == 128] = 129  # -128, which ggml does not write
    for start in HALVES.get(ggml_type, (0,)):
        halves = finite_halves(rows, count, 1, generator=generator)
        data[..., start : start + 2] = halves.view(torch.uint8)
    return data.flatten(1)


def random_blocks(ggml_type: GGMLType, rows: int = 2, count: int = 1, seed: int = 0) -> Blocks:
    """Any numbers that the type can hold."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS[ggml_type]

    def codes(columns: int, bounds: tuple[int, int]) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (rows, columns), generator=generator)

    def group_codes() -> Tensor | None:
        per_row = count * layout.groups_per_block
        return None if layout.scale_codes is None else codes(per_row, layout.scale_codes).to(torch.int16)

    return Blocks(
        levels=codes(count * layout.block, (layout.low, layout.high)).to(torch.int8),
        scale=finite_halves(rows, count, generator=generator),
        scale_codes=group_codes(),
        min=finite_halves(rows, count, generator=generator) if layout.has_min else None,
        min_codes=group_codes() if layout.has_min else None,
    )


def assert_same(found: Blocks, expected: Blocks) -> None:
    for name, values in vars(expected).items():
        own = getattr(found, name)
        if values is None:
            assert own is None, name
        else:
            assert own.dtype == values.dtype, name
            assert own.shape == values.shape, name
            # halves by their bits, which tell -0 from 0
            assert own.numpy().tobytes() == values.numpy().tobytes(), name


# round trips


@settings(max_examples=120)
@some_blocks
def test_bytes_come_back(ggml_type: GGMLType, rows: int, count: int, seed: int) -> None:
    data = random_bytes(ggml_type, rows, count, seed)
    assert torch.equal(pack(unpack(data, ggml_type), ggml_type), data)


@settings(max_examples=120)
@some_blocks
def test_numbers_come_back(ggml_type: GGMLType, rows: int, count: int, seed: int) -> None:
    blocks = random_blocks(ggml_type, rows, count, seed)
    data = pack(blocks, ggml_type)
    assert data.dtype == torch.uint8
    assert data.shape == (rows, count * ggml_type.block_bytes)
    assert data.is_contiguous()
    assert_same(unpack(data, ggml_type), blocks)


@each_type
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 5), (7, 1), (33, 3)])
def test_rows_that_fill_nothing_evenly(ggml_type: GGMLType, rows: int, count: int) -> None:
    blocks = random_blocks(ggml_type, rows, count, seed=rows)
    assert_same(unpack(pack(blocks, ggml_type), ggml_type), blocks)


@each_type
@pytest.mark.parametrize("end", [0, 1], ids=["least", "greatest"])
def test_extreme_codes(ggml_type: GGMLType, end: int) -> None:
    layout = LAYOUTS[ggml_type]
    blocks = random_blocks(ggml_type)
    blocks = replace(blocks, levels=torch.full_like(blocks.levels, (layout.low, layout.high)[end]))
    if layout.scale_codes is not None:
        assert blocks.scale_codes is not None
        blocks = replace(blocks, scale_codes=torch.full_like(blocks.scale_codes, layout.scale_codes[end]))
    if blocks.min_codes is not None:
        assert layout.scale_codes is not None
        blocks = replace(blocks, min_codes=torch.full_like(blocks.min_codes, layout.scale_codes[end]))
    assert_same(unpack(pack(blocks, ggml_type), ggml_type), blocks)


# against gguf and ggml


@settings(max_examples=120)
@some_blocks
def test_the_weights_are_those_that_gguf_reads_bit_for_bit(
    ggml_type: GGMLType, rows: int, count: int, seed: int
) -> None:
    data = random_bytes(ggml_type, rows, count, seed)
    expected = ggml.dequantize(data.numpy(), ggml_type)
    assert torch.equal(unpack(data, ggml_type).dequantize().view(torch.int32), expected.view(torch.int32))


@each_type
def test_what_is_packed_is_valid_to_ggml_and_reads_the_same(ggml_type: GGMLType) -> None:
    blocks = random_blocks(ggml_type, rows=5, count=4, seed=3)
    data = pack(blocks, ggml_type).numpy()
    assert ggml.validate(data, ggml_type)
    assert torch.equal(ggml.dequantize(data, ggml_type), blocks.dequantize())


@each_type
def test_what_ggml_quantizes_comes_back(ggml_type: GGMLType) -> None:
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    data = torch.from_numpy(ggml.quantize(weight, ggml_type))
    blocks = unpack(data, ggml_type)
    assert torch.equal(pack(blocks, ggml_type), data)
    levels = blocks.levels.unflatten(1, (-1, LAYOUTS[ggml_type].group))
    # weight = scale * level - min
    rebuilt = blocks.group_scales().unsqueeze(2) * levels - blocks.group_mins().unsqueeze(2)
    assert torch.equal(rebuilt.flatten(1), blocks.dequantize())
    assert (rebuilt.flatten(1) - weight).square().mean() < 0.01


def test_a_block_of_ones() -> None:
    weight = torch.ones(1, 32)
    blocks = unpack(torch.from_numpy(ggml.quantize(weight, GGMLType.Q8_0)), GGMLType.Q8_0)
    assert torch.equal(blocks.levels, torch.full((1, 32), 127, dtype=torch.int8))
    assert np.float16(blocks.scale.item()) == np.float16(1 / 127)


# parts


@each_type
def test_rows_and_their_stack(ggml_type: GGMLType) -> None:
    blocks = random_blocks(ggml_type, rows=7, count=2)
    parts = [blocks.rows(slice(0, 3)), blocks.rows(slice(3, 4)), blocks.rows(slice(4, 7))]
    assert torch.equal(parts[1].dequantize(), blocks.dequantize()[3:4])
    assert_same(Blocks.stack(parts), blocks)
    assert_same(blocks.to(torch.device("cpu")), blocks)


def test_packing_leaves_its_input_alone() -> None:
    for ggml_type in TYPES:
        blocks, same = (random_blocks(ggml_type, seed=5) for _ in range(2))
        pack(blocks, ggml_type)
        assert_same(blocks, same)


# bad input


def test_a_type_that_is_not_made_of_these_blocks() -> None:
    with pytest.raises(ValueError, match="F16 blocks cannot be packed here, only Q4_0, "):
        unpack(torch.zeros(1, 32, dtype=torch.uint8), GGMLType.F16)
    with pytest.raises(ValueError, match="F32 blocks cannot be packed here"):
        pack(random_blocks(GGMLType.Q4_0), GGMLType.F32)


@pytest.mark.parametrize(
    "data",
    [torch.zeros(2, 19, dtype=torch.uint8), torch.zeros(18, dtype=torch.uint8), torch.zeros(2, 18)],
    ids=["half a block", "no matrix", "no bytes"],
)
def test_rows_of_partial_blocks_are_not_unpacked(data: Tensor) -> None:
    with pytest.raises(ValueError, match="expected rows of whole Q4_0 blocks, got torch"):
        unpack(data, GGMLType.Q4_0)


def test_rows_of_partial_blocks_are_not_packed() -> None:
    blocks = random_blocks(GGMLType.Q4_0)
    with pytest.raises(ValueError, match="rows of 31 weights are not whole Q4_0 blocks"):
        pack(replace(blocks, levels=blocks.levels[:, :31]), GGMLType.Q4_0)


@pytest.mark.parametrize(
    ("ggml_type", "bad"),
    [
        (ggml_type, bad)
        for ggml_type, layout in LAYOUTS.items()
        for bad in (layout.low - 1, layout.high + 1)
        if bad <= 127  # int8 itself holds no more
    ],
)
def test_a_level_that_the_type_cannot_hold(ggml_type: GGMLType, bad: int) -> None:
    layout, blocks = LAYOUTS[ggml_type], random_blocks(ggml_type)
    blocks.levels[1, 7] = bad
    with pytest.raises(ValueError, match=f"{ggml_type.value} holds levels from {layout.low} to {layout.high}, got "):
        pack(blocks, ggml_type)


@pytest.mark.parametrize(
    ("ggml_type", "field", "bad", "message"),
    [
        (GGMLType.Q4_K, "scale_codes", 64, "Q4_K holds scale codes from 0 to 63, got .* to 64"),
        (GGMLType.Q4_K, "scale_codes", -1, "Q4_K holds scale codes from 0 to 63, got -1 to "),
        (GGMLType.Q5_K, "min_codes", 64, "Q5_K holds min codes from 0 to 63, got .* to 64"),
        (GGMLType.Q5_K, "min_codes", -1, "Q5_K holds min codes from 0 to 63, got -1 to "),
        (GGMLType.Q6_K, "scale_codes", 128, "Q6_K holds scale codes from -128 to 127, got .* to 128"),
        (GGMLType.Q6_K, "scale_codes", -129, "Q6_K holds scale codes from -128 to 127, got -129 to "),
    ],
)
def test_a_code_that_the_type_cannot_hold(ggml_type: GGMLType, field: str, bad: int, message: str) -> None:
    blocks = random_blocks(ggml_type)
    getattr(blocks, field)[0, 0] = bad
    with pytest.raises(ValueError, match=message):
        pack(blocks, ggml_type)


@pytest.mark.parametrize(
    ("ggml_type", "field", "message"),
    [
        (GGMLType.Q6_K, "scale_codes", "Q6_K needs scale codes"),
        (GGMLType.Q4_K, "min_codes", "Q4_K needs min codes"),
        (GGMLType.Q4_K, "min", "Q4_K needs mins"),
        (GGMLType.Q4_1, "min", "Q4_1 needs mins"),
        (GGMLType.Q5_1, "min", "Q5_1 needs mins"),
    ],
)
def test_numbers_that_the_type_needs(ggml_type: GGMLType, field: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(replace(random_blocks(ggml_type), **{field: None}), ggml_type)


def test_mins_that_the_type_does_not_have() -> None:
    blocks = replace(random_blocks(GGMLType.Q5_1), levels=random_blocks(GGMLType.Q5_0).levels)
    with pytest.raises(ValueError, match="Q5_0 has no mins"):
        pack(blocks, GGMLType.Q5_0)
