"""GGUF files, written tensor by tensor: nothing but the tensor at hand is in memory.

The file appears whole or not at all, under a temporary name beside the target until then. The same input gives the
same bytes.
"""

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srd_modifier._extras import require
from srd_modifier.checkpoint.atomic import refuse_existing_file, sibling
from srd_modifier.errors import SRDError
from srd_modifier.gguf.ggml import GGMLType

_ALIGNMENT = 32  # of every tensor's data, the format's default


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, its shape in torch's order, and its type."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType

    @property
    def weights(self) -> int:
        """How many entries the tensor has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data.

        Raises:
            ValueError: its rows are not whole blocks.
        """
        return prod(self.shape[:-1]) * self.ggml_type.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    entries: Sequence[Entry],
    data: Callable[[Entry], Iterable[NDArray[np.uint8]]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a file.

    Args:
        path: the file to make, in a directory that is made if it is not there.
        architecture: gguf's name for it, the value of `general.architecture`.
        add_metadata: adds everything else to a `gguf.GGUFWriter`.
        entries: the tensors, in their order in the file.
        data: the bytes of a tensor, in as many pieces as is convenient; asked once for each, in order, by a thread of
            its own, which makes one piece while the one before is written.
        overwrite: replace an existing file.

    Raises:
        SRDError: the file is in the way, or the disk refused a write.
        ValueError: `data` gave more or fewer bytes than its entry says.

    Whatever `data` raises is passed on. In all these cases nothing is left behind, and an existing file untouched.
    """
    refuse_existing_file(path, overwrite=overwrite)
    writer = _prepare(architecture, add_metadata, entries)
    temporary = sibling(path)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        parts = _parts(entries, data)
        with ThreadPoolExecutor(1, thread_name_prefix="srd-gguf") as pool:
            following = pool.submit(next, parts, None)
            stream = _write_head(writer, temporary)
            while (part := following.result()) is not None:
                following = pool.submit(next, parts, None)  # made while this one is written
                stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
        writer.close()
        temporary.replace(path)
    except OSError as error:
        raise SRDError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def head_bytes(architecture: str, add_metadata: Callable[[Any], None], entries: Sequence[Entry]) -> int:
    """Bytes of a file before the first tensor's data; arguments as of `write_gguf`."""
    writer = _prepare(architecture, add_metadata, entries)
    with tempfile.TemporaryDirectory(prefix="srd-gguf-") as folder:
        size = _write_head(writer, Path(folder) / "head").tell()
        writer.close()
    return int(size)


def padded_bytes(entry: Entry) -> int:
    """Bytes that a tensor takes in the file: its data, and what aligns the next one."""
    return -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT


def open_writer(path: Path | None, architecture: str) -> Any:
    """A `gguf.GGUFWriter` that packs the texts and numbers of a vocabulary at once, to the same bytes.

    One by one, as gguf does it, they take as long as the quantization of ten million weights.

    Raises:
        MissingExtraError: gguf is not installed.
    """
    require("gguf", extra="gguf")
    return _writer_class()(path, architecture)


@cache
def _writer_class() -> Any:
    import gguf

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            plain = sub_type is None and self.endianess is gguf.GGUFEndian.LITTLE
            packed = _packed(val) if plain and vtype is gguf.GGUFValueType.ARRAY else None
            if packed is None:
                return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
            kind = struct.pack("<I", vtype) if add_vtype else b""
            return kind + struct.pack("<IQ", gguf.GGUFValueType.get_type(val[0]), len(val)) + packed

    return Writer


def _packed(values: Sequence[Any]) -> bytes | None:
    """The entries of an array, which are all of one type; None for what gguf packs itself."""
    kinds = set(map(type, values)) if isinstance(values, list | tuple) else set()
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is str:
        texts = [text.encode() for text in values]
        return b"".join([part for text in texts for part in (len(text).to_bytes(8, "little"), text)])
    if kind is float:
        return struct.pack(f"<{len(values)}f", *values)
    if kind is not None and kind is not bool and issubclass(kind, int):
        return struct.pack(f"<{len(values)}i", *values)
    return None


def _prepare(architecture: str, add_metadata: Callable[[Any], None], entries: Sequence[Entry]) -> Any:
    """A `gguf.GGUFWriter` that knows everything but the data."""
    writer = open_writer(None, architecture)
    add_metadata(writer)
    for entry in entries:
        # with the type given, the dtype only says that the shape counts weights and not bytes
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, entry.ggml_type.in_gguf())
    return writer


def _write_head(writer: Any, path: Path) -> Any:
    """Everything before the data of the first tensor; gives the open stream."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    return stream


def _parts(
    entries: Sequence[Entry], data: Callable[[Entry], Iterable[NDArray[np.uint8]]]
) -> Iterator[memoryview | bytes]:
    """The data of all tensors, and what aligns it."""
    for entry in entries:
        size = 0
        for part in data(entry):
            size += part.nbytes
            yield np.ascontiguousarray(part).data
        if size != entry.nbytes:
            raise ValueError(
                f"{entry.name} got {size} bytes, a {entry.ggml_type.value} of its shape has {entry.nbytes}"
            )
        padding = padded_bytes(entry) - size
        if padding:
            yield bytes(padding)
