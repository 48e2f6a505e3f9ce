"""Write a sidecar module by module, in any order, without ever holding it in memory.

The shapes, dtypes and so the bytes of every tensor are known before the first is computed. The files are laid out
and their space is reserved at once, so a disk that is too small is noticed before calibration and not after it;
each module is then written to its place, and the headers, whose length does not depend on the digests in them, come
last.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.config import VERSION
from srd_modifier.checkpoint.placed import PlacedFile
from srd_modifier.checkpoint.shards import DTYPE_NAMES
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import EncodedResidual, ResidualFormat

INDEX_NAME = "residual.safetensors.index.json"
METADATA_KEY = "srd"
MAX_SHARD_BYTES = 5 * 10**9

_ALIGNMENT = 8
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class ResidualEntry:
    """One module of a sidecar: the shape of its weight and the format of its residual."""

    out_features: int
    in_features: int
    format: ResidualFormat

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the stored tensors, by suffix."""
        return self.format.layout(self.out_features, self.in_features)

    def bytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.format.bytes(self.out_features, self.in_features)


class SidecarWriter:
    """The files of a sidecar, being written.

    Args:
        directory: where the files go; made if need be.
        entries: every module that will be written, in the order of the files.
        max_shard_bytes: a new file is begun beyond this size.
        keep: go on with the files of a writer that did not finish; `restore` says what is in them.

    Raises:
        CheckpointError: the disk has no room for them.
    """

    def __init__(
        self,
        directory: Path,
        entries: Mapping[str, ResidualEntry],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        keep: bool = False,
    ) -> None:
        self.directory = directory
        self.entries = dict(entries)
        self._digests: dict[str, dict[str, str]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {directory}: {error.strerror or error}") from error
        groups = shard_groups(self.entries, max_shard_bytes)
        self._files = [
            _ShardFile(directory / f"residual-{number:05d}-of-{len(groups):05d}.safetensors", group)
            for number, group in enumerate(groups, 1)
        ]
        self._file_of = {module: file for file in self._files for module in file.entries}
        try:
            for file in self._files:
                file.reserve(keep=keep)
        except CheckpointError:
            self.close()
            raise

    @property
    def missing(self) -> list[str]:
        """Modules that have not been written yet."""
        return [module for module in self.entries if module not in self._digests]

    def write(self, module: str, encoded: EncodedResidual) -> None:
        """Write one module's tensors to their place."""
        tensors = encoded.tensors()
        layout = self.entries[module].layout()
        for suffix, (dtype, shape) in layout.items():
            found = tensors[suffix]
            if found.dtype != dtype or tuple(found.shape) != shape:
                raise ValueError(f"{module}.{suffix} is {found.dtype} {tuple(found.shape)}, planned {dtype} {shape}")
        self._digests[module] = {
            suffix: self._file_of[module].write(f"{module}.{suffix}", tensors[suffix]) for suffix in layout
        }

    def digests(self, module: str) -> dict[str, str]:
        """SHA-256 of the tensors of a module that was written, by suffix."""
        return dict(self._digests[module])

    def restore(self, module: str, digests: Mapping[str, str]) -> bool:
        """Take a module as written, if the files hold just these bytes for it; False if they do not."""
        suffixes = self.entries[module].layout()
        file = self._file_of[module]
        if set(digests) != set(suffixes) or any(
            file.digest(f"{module}.{suffix}") != digests[suffix] for suffix in suffixes
        ):
            return False
        self._digests[module] = dict(digests)
        return True

    def flush(self, modules: Iterable[str]) -> None:
        """Wait until the files of these modules are on the disk."""
        for file in {id(file): file for file in map(self._file_of.__getitem__, modules)}.values():
            file.flush()

    def finish(self, default: ResidualFormat) -> None:
        """Write headers and index; what is finished already stays as it is. Flushing is for who moves the files.

        Args:
            default: the format in srd_config; the index records the modules that differ from it.
        """
        if self.missing:
            raise CheckpointError(
                f"{self.directory}: {len(self.missing)} modules were never written, first {self.missing[0]}"
            )
        for file in self._files:
            file.finish(self._digests)
        index = json.dumps(self._index(default), indent=2)
        (self.directory / INDEX_NAME).write_text(index, encoding="utf-8")

    def close(self) -> None:
        """Give the files back; harmless when done twice."""
        for file in self._files:
            file.close()

    def _index(self, default: ResidualFormat) -> dict[str, Any]:
        weight_map = {tensor: file.path.name for file in self._files for tensor in file.places}
        differing = {
            module: entry.format.to_dict() for module, entry in self.entries.items() if entry.format != default
        }
        return {
            "metadata": {
                "total_size": sum(entry.bytes() for entry in self.entries.values()),
                "version": VERSION,
                "residual_digest": records_digest(
                    {module: _record(entry, self._digests[module]) for module, entry in self.entries.items()}
                ),
                "formats": differing,
            },
            "weight_map": dict(sorted(weight_map.items())),
        }


@dataclass
class _ShardFile:
    """One file: its header's length and every tensor's place are fixed when it is made."""

    path: Path
    entries: dict[str, ResidualEntry]
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = field(init=False)
    _data_start: int = field(init=False)
    _file: PlacedFile = field(init=False)
    _finished: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        tensors = {
            f"{module}.{suffix}": place
            for module, entry in self.entries.items()
            for suffix, place in entry.layout().items()
        }
        self.places = {}
        offset = 0
        # wider dtypes first keeps every tensor aligned, as safetensors itself orders them
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            size = dtype.itemsize * math.prod(shape)
            self.places[name] = (dtype, shape, offset, offset + size)
            offset += size
        self._data_start = len(self._header({module: {} for module in self.entries}))
        self._file = PlacedFile(self.path, self._data_start + offset, "the residual")

    def reserve(self, *, keep: bool) -> None:
        self._file.reserve(keep=keep)

    def write(self, name: str, tensor: Tensor) -> str:
        """Write a tensor to its place and return the SHA-256 of its bytes."""
        return self._file.write([tensor_bytes(tensor)], self._data_start + self.places[name][2])

    def digest(self, name: str) -> str:
        """SHA-256 of the bytes at a tensor's place."""
        _, _, start, end = self.places[name]
        return self._file.digest(self._data_start + start, self._data_start + end)

    def flush(self) -> None:
        self._file.flush()

    def finish(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        if self._finished:
            return
        header = self._header(digests)
        assert len(header) == self._data_start
        self._file.write([header], 0)
        self.close()
        self._finished = True

    def close(self) -> None:
        self._file.close()

    def _header(self, digests: Mapping[str, Mapping[str, str]]) -> bytes:
        modules = {module: _record(entry, digests[module]) for module, entry in self.entries.items()}
        srd = json.dumps({"version": VERSION, "modules": modules}, separators=(",", ":"))
        tensors = {
            name: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            for name, (dtype, shape, start, end) in self.places.items()
        }
        header = json.dumps({"__metadata__": {"format": "pt", METADATA_KEY: srd}, **tensors}, separators=(",", ":"))
        encoded = header.encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        return len(encoded).to_bytes(8, "little") + encoded


def header_bytes(entries: Mapping[str, ResidualEntry]) -> int:
    """Bytes before the tensors of a file that holds these modules."""
    return _ShardFile(Path(), dict(entries))._data_start


def records_digest(records: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over the shape, format and digests of every module: one line for a whole sidecar."""
    return "sha256:" + hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _record(entry: ResidualEntry, digests: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a file says about one module."""
    return {
        "shape": [entry.out_features, entry.in_features],
        "format": entry.format.to_dict(),
        "sha256": {suffix: digests.get(suffix, _NO_DIGEST) for suffix in entry.layout()},
    }


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order that safetensors stores them."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def shard_groups(entries: Mapping[str, ResidualEntry], max_bytes: int) -> list[dict[str, ResidualEntry]]:
    """The modules of each file, in order; a module larger than the limit gets a file of its own."""
    groups: list[dict[str, ResidualEntry]] = []
    used = 0
    for module, entry in entries.items():
        if not groups or used + entry.bytes() > max_bytes:
            groups.append({})
            used = 0
        groups[-1][module] = entry
        used += entry.bytes()
    return groups
