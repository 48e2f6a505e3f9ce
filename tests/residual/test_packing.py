import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srd_modifier.residual.packing import PACKABLE_BITS, pack, packed_columns, unpack


def reference_pack(rows: list[list[int]], bits: int) -> list[list[int]]:
    """The layout of the module's docstring, one bit at a time, with Python's integers."""
    packed = []
    for row in rows:
        stream = [(value >> bit) & 1 for value in row for bit in range(bits)]
        stream += [0] * (-len(stream) % 8)
        packed.append([sum(stream[start + bit] << bit for bit in range(8)) for start in range(0, len(stream), 8)])
    return packed


def random_values(rows: int, n: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    bits = draw(st.sampled_from(PACKABLE_BITS))
    n = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=1, max_size=5)), bits


@pytest.mark.parametrize(
    ("values", "bits", "packed"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b00001101, 0b00000001]),
        ([1, 2, 3], 2, [0b00111001]),
        ([1, 2, 3, 4, 5, 6, 7, 0], 3, [0b11010001, 0b01011000, 0b00011111]),
        ([1, 2, 15], 4, [0x21, 0x0F]),
        ([1, 2, 31, 16], 5, [0b010_00001, 0b0_11111_00, 0b1000]),
        ([1, 2, 63, 32, 5], 6, [0b10_000001, 0b1111_0000, 0b100000_11, 0b000101]),
    ],
)
def test_bytes_written_by_hand(values: list[int], bits: int, packed: list[int]) -> None:
    assert pack(torch.tensor([values], dtype=torch.uint8), bits).tolist() == [packed]
    assert unpack(torch.tensor([packed], dtype=torch.uint8), bits, len(values)).tolist() == [values]


@settings(max_examples=150, derandomize=True)
@given(matrices())
def test_round_trip_and_reference(case: tuple[list[list[int]], int]) -> None:
    rows, bits = case
    values = torch.tensor(rows, dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference_pack(rows, bits)
    assert torch.equal(unpack(packed, bits, values.shape[1]), values)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (83, 545), (2, 4096)])
def test_awkward_shapes(bits: int, shape: tuple[int, int]) -> None:
    values = random_values(*shape, bits)
    packed = pack(values, bits)
    assert packed.shape == (shape[0], packed_columns(shape[1], bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, shape[1]), values)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_the_largest_value_fills_every_bit(bits: int) -> None:
    values = torch.full((2, 8), 2**bits - 1, dtype=torch.uint8)
    assert pack(values, bits).tolist() == [[255] * bits] * 2


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_size_law(bits: int) -> None:
    for n in range(1, 70):
        assert packed_columns(n, bits) == -(-n * bits // 8) == len(reference_pack([[0] * n], bits)[0])


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_strided_input(bits: int) -> None:
    values = random_values(13, 6, bits)
    assert torch.equal(pack(values.t(), bits), pack(values.t().contiguous(), bits))
    packed = pack(values, bits)
    wide = torch.zeros(13, 2 * packed.shape[1], dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(unpack(wide[:, ::2], bits, 6), values)


@pytest.mark.parametrize("bits", [0, 7, 8, -1])
def test_width_that_cannot_be_packed(bits: int) -> None:
    values = torch.zeros(1, 8, dtype=torch.uint8)
    message = rf"bits is {bits}, expected one of \(1, 2, 3, 4, 5, 6\)"
    with pytest.raises(ValueError, match=message):
        pack(values, bits)
    with pytest.raises(ValueError, match=message):
        unpack(values, bits, 8)


def test_dtype_other_than_uint8() -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 matrix, got torch\.int8 of shape \(1, 8\)"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 4)


@pytest.mark.parametrize("shape", [(8,), (1, 2, 8)])
def test_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 matrix, got torch\.uint8 of shape"):
        unpack(torch.zeros(shape, dtype=torch.uint8), 4, 16)


@pytest.mark.parametrize("columns", [14, 17])
def test_columns_that_do_not_fit_the_bytes(columns: int) -> None:
    expected = packed_columns(columns, 4)
    with pytest.raises(ValueError, match=f"{columns} integers of 4 bits take {expected} bytes, got 8"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 4, columns)
