"""Integers of 1 to 6 bits to bytes and back.

Eight integers fill `bits` bytes: integer `i` of a row occupies bits `i * bits` to `(i + 1) * bits - 1` of the
row, counted from the least significant bit of its first byte. A row starts at a byte and its last byte is
padded with zeros, so `n` integers take `ceil(n * bits / 8)` bytes.
"""

import torch
from torch import Tensor

PACKABLE_BITS = (1, 2, 3, 4, 5, 6)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack `values` uint8 `[rows, n]`, each below `2**bits`, into uint8 `[rows, ceil(n * bits / 8)]`."""
    _check(values, bits)
    rows, n = values.shape
    padded = torch.nn.functional.pad(values, (0, -n % 8)).reshape(rows, -1, 8)
    # a word holds eight integers, 8 to 48 bits: int64 keeps it clear of the sign
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=values.device)
    for position in range(8):
        words |= padded[:, :, position].to(torch.int64) << (position * bits)
    packed = torch.stack([(words >> (8 * byte)).to(torch.uint8) for byte in range(bits)], dim=-1)
    return packed.reshape(rows, -1)[:, : packed_columns(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 `[rows, columns]`."""
    _check(packed, bits)
    rows, width = packed.shape
    if width != packed_columns(columns, bits):
        raise ValueError(f"{columns} integers of {bits} bits take {packed_columns(columns, bits)} bytes, got {width}")
    padded = torch.nn.functional.pad(packed, (0, -width % bits)).reshape(rows, -1, bits)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= padded[:, :, byte].to(torch.int64) << (8 * byte)
    mask = (1 << bits) - 1
    values = torch.stack([((words >> (position * bits)) & mask).to(torch.uint8) for position in range(8)], dim=-1)
    return values.reshape(rows, -1)[:, :columns].contiguous()


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` integers takes."""
    return (columns * bits + 7) // 8


def _check(values: Tensor, bits: int) -> None:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits is {bits}, expected one of {PACKABLE_BITS}")
    if values.dtype != torch.uint8 or values.dim() != 2:
        raise ValueError(f"expected a uint8 matrix, got {values.dtype} of shape {tuple(values.shape)}")
