"""The header of a GGUF file: keys and values, and where each tensor is.

`gguf` reads one as well, in a dozen seconds where a vocabulary has 150 000 tokens and merges, and does not notice all
that is wrong. The format is small, and everything in it is little-endian:

    "GGUF", version (uint32), number of tensors, number of keys (uint64)
    for every key: its text, the type of its value (uint32), the value
    for every tensor: its name, number of dimensions (uint32), the dimensions (uint64), innermost first, its type
    (uint32), where its data is (uint64), counted from the end of the header
    the data of the tensors, in the same order; it and each of them begin at multiples of the alignment

A text is its length (uint64) and UTF-8; an array is the type of its entries (uint32), their number (uint64), and they.
"""

import struct
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # they differ in that a file of version 3 may be big-endian
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# by their numbers: the codes of `struct` and numpy, but for bool, text and array
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")


class DamageError(ValueError):
    """What is wrong with a file, in words that follow its name and a colon."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: its name.
        shape: in GGUF's order, innermost first.
        tensor_type: a `gguf.GGMLQuantizationType`.
        start: where its data begins, in bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    start: int

    @property
    def n_elements(self) -> int:
        """How many weights it has."""
        return prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of `shape[0]` weights."""
        weights, size = import_module("gguf").GGML_QUANT_SIZES[self.tensor_type]
        return int(self.shape[0] // weights * size)

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return self.row_bytes * prod(self.shape[1:])


def read_header(data: Any) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The values by key, and the tensors in their order, of a file.

    Args:
        data: the whole file, mapped.

    Raises:
        DamageError: it is no GGUF file, or is damaged.
        MissingExtraError: gguf is not installed.
    """
    cursor = _Cursor(data)
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise DamageError(f"it begins with {bytes(data[: len(_MAGIC)])!r} instead of {_MAGIC!r}")
    cursor.advance(len(_MAGIC), "its magic number")
    version = cursor.number("I", "its version")
    if version not in _VERSIONS:
        order = " of another byte order" if version >= 2**16 else ""
        raise DamageError(f"it is of version {version}{order}, only 2 and 3 can be read")
    tensors = cursor.number("Q", "the number of tensors")
    keys = cursor.number("Q", "the number of keys")
    metadata: dict[str, Any] = {}
    for number in range(keys):
        key = cursor.text(f"key {number + 1} of {keys}")
        if key in metadata:
            raise DamageError(f"it has the key {key} twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise DamageError(f"its general.alignment is {alignment!r}, expected a power of two")
    places = [_tensor(cursor, f"tensor {number + 1} of {tensors}") for number in range(tensors)]
    return metadata, _placed(places, cursor.at, alignment, len(data))


class _Cursor:
    """A place in the file, from which one thing after the other is read."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.at = 0

    def advance(self, size: int, what: str) -> int:
        """Go past `what`, which takes so many bytes; gives where it begins."""
        start = self.at
        if size > len(self.data) - start:
            raise DamageError(f"{what} ends at byte {start + size}, the file at {len(self.data)}")
        self.at += size
        return start

    def number(self, code: str, what: str) -> Any:
        """A number, by its code of `struct`."""
        return struct.unpack_from(f"<{code}", self.data, self.advance(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        data, end, length_at = self.data, len(self.data), _LENGTH.unpack_from
        found = []
        for _ in range(count):
            start = self.at + _LENGTH.size
            stop = start + length_at(data, self.at)[0] if start <= end else start
            if stop > end:
                raise DamageError(f"{what} ends at byte {stop}, the file at {end}")
            try:
                found.append(data[start:stop].decode())
            except UnicodeDecodeError as error:
                raise DamageError(f"{what} is not UTF-8: {error}") from None
            self.at = stop
        return found

    def value(self, kind: int, what: str) -> Any:
        """A value of a type, by its number."""
        if kind == _ARRAY:
            kind = self.number("I", f"the type of {what}")
            return self.array(kind, self.number("Q", f"the length of {what}"), what)
        return self.array(kind, 1, what)[0]

    def array(self, kind: int, count: int, what: str) -> list[Any]:
        if kind == _TEXT:
            return self.texts(count, what)
        code = "B" if kind == _BOOL else _CODES.get(kind)
        if code is None:
            raise DamageError(f"{what} is of a type with the number {kind}, which is not known")
        dtype = np.dtype(code).newbyteorder("<")
        start = self.advance(count * dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, count, start).tolist()
        if kind == _BOOL:
            if not {*values} <= {0, 1}:
                raise DamageError(f"{what} is neither true nor false")
            return [bool(value) for value in values]
        return values


def _tensor(cursor: _Cursor, what: str) -> StoredTensor:
    """A tensor whose `start` is counted from the end of the header."""
    gguf = import_module("gguf")
    name = cursor.text(what)
    dimensions = cursor.number("I", f"the number of dimensions of {name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise DamageError(f"{name} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))
    if 0 in shape:
        raise DamageError(f"{name} is of shape {[*shape]}, which is empty")
    number = cursor.number("I", f"the type of {name}")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise DamageError(f"{name} is of a type with the number {number}, which is not known") from None
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[0] % block:
        raise DamageError(f"{name} has rows of {shape[0]} weights, and {kind.name} blocks of {block}")
    return StoredTensor(name, shape, kind, cursor.number("Q", f"the place of {name}"))


def _placed(tensors: list[StoredTensor], header: int, alignment: int, size: int) -> list[StoredTensor]:
    """The tensors with their places in the file, checked as llama.cpp checks them."""
    begin = _padded(header, alignment)
    expected = 0
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise DamageError(f"it has the tensor {tensor.name} twice")
        if tensor.start != expected:
            raise DamageError(f"the data of {tensor.name} begins at {tensor.start}, expected {expected}")
        end = begin + expected + tensor.n_bytes
        if end > size:
            raise DamageError(f"{tensor.name} ends at byte {end}, the file at {size}")
        found[tensor.name] = StoredTensor(tensor.name, tensor.shape, tensor.tensor_type, begin + expected)
        expected = _padded(expected + tensor.n_bytes, alignment)
    return [*found.values()]


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
