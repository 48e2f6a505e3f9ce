"""One safetensors file, mapped into memory and checked in the order of its bytes.

The `safetensors` library reads tensors but gives neither their place in the file, which the digests need, nor an
error that names the file. The format is small: a length of 8 bytes, a JSON header, then the tensors without holes.
"""

import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.extents import open_extent
from srd_modifier.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its safetensors dtype name, shape, and place in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Shard:
    """A safetensors file open for reading; `Shard.open` checks it.

    Attributes:
        path: the file.
        metadata: its free-form strings.
        tensors: where each tensor is.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    _map: mmap.mmap = field(repr=False)
    _origin: int = field(repr=False)  # where the file begins in the map

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Map a file and check its header against its size.

        Raises:
            CheckpointError: the file is missing, truncated, or not a safetensors file.
        """
        try:
            with open_extent(path) as extent:
                size = extent.size
                if size < _LENGTH_BYTES:
                    raise CheckpointError(f"{path} is truncated: {size} bytes are no safetensors file")
                # a private writable map: torch wants writable memory, and nothing is ever written to it
                mapped, origin = extent.map(mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        header, data_start = _read_header(path, memoryview(mapped)[origin:], size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
        tensors = {name: _tensor_info(path, name, value, data_start) for name, value in header.items()}
        _check_cover(path, tensors, data_start, size)
        return cls(path, metadata, tensors, mapped, origin)

    def view(self, name: str) -> memoryview:
        """The bytes of a tensor, straight from the map."""
        info = self.tensors[name]
        return memoryview(self._map)[self._origin + info.start : self._origin + info.end]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, read piece by piece: unlike the map, they never count as this process's memory."""
        info = self.tensors[name]
        return self.read(range(info.start, info.end, _CHUNK_BYTES), _CHUNK_BYTES, end=info.end)

    def read(self, starts: Iterable[int], length: int, *, end: int) -> Iterator[bytes]:
        """Read `length` bytes from each of these places in the file, but none from `end` on.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        try:
            with open_extent(self.path) as extent:
                for start in starts:
                    wanted = min(length, end - start)
                    data = extent.read(start, wanted)
                    if len(data) != wanted:
                        raise CheckpointError(f"{self.path} is truncated: it was longer when it was opened")
                    yield data
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error

    def release(self) -> None:
        """Give back the memory that reading the map has filled; tensors stay valid and are read again if needed."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def tensor(self, name: str) -> Tensor:
        """A tensor that shares the map's memory: it costs nothing until it is read, and must not be written to."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {info.dtype}, which this version does not read")
        dtype = DTYPES[info.dtype]
        count = (info.end - info.start) // dtype.itemsize
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.start % dtype.itemsize:
            return torch.frombuffer(bytearray(self.view(name)), dtype=dtype).reshape(info.shape)
        place = self._origin + info.start
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=place).reshape(info.shape)


def _read_header(path: Path, content: memoryview, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file: it claims a header of {length} bytes")
    data_start = _LENGTH_BYTES + length
    if data_start > size:
        raise CheckpointError(f"{path} is truncated: the header ends at byte {data_start}, the file at {size}")
    try:
        header = json.loads(bytes(content[_LENGTH_BYTES:data_start]).decode(), object_pairs_hook=_no_duplicates)
    except _DuplicateError as error:
        raise CheckpointError(f"{path}: the header has {error.args[0]!r} twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, data_start


def _tensor_info(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    try:
        name.encode()  # JSON can spell half a surrogate pair, which is no text
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        well_formed = isinstance(dtype, str) and isinstance(shape, list) and all(map(_is_size, (*shape, start, end)))
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        shown = name.encode("ascii", "backslashreplace").decode()
        raise CheckpointError(f"{path}: the header entry of {shown} is malformed")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors must fill the file from the end of the header to its last byte, each as long as its shape says."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position or info.end < info.start:
            raise CheckpointError(f"{path}: {name} starts at byte {info.start}, expected {position}")
        if info.dtype in DTYPES:
            expected = DTYPES[info.dtype].itemsize
            for dimension in info.shape:
                expected *= dimension
            if info.end - info.start != expected:
                raise CheckpointError(
                    f"{path}: {name} {info.dtype} {list(info.shape)} takes {expected} bytes, "
                    f"the header gives it {info.end - info.start}"
                )
        position = info.end
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: its tensors end at byte {position}, the file at {size}")


class _DuplicateError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateError(key)
        result[key] = value
    return result
