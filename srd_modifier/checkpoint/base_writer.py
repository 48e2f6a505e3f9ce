"""The safetensors files of a W4A16 model, laid out before a tensor is computed, and written in any order.

They are, byte for byte, the files that Transformers' `save_pretrained` writes of the same tensors: split as
huggingface_hub splits a state dict, each in the order of the safetensors library (widest dtypes first, then by name).
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from srd_modifier.checkpoint.placed import PlacedFile
from srd_modifier.checkpoint.shards import DTYPE_NAMES

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by tensor name, in the order of the model."""

INDEX_NAME = "model.safetensors.index.json"

_FILES = "model{suffix}.safetensors"
MAX_FILE = "5GB"
"""Of the files of a W4A16 model; llm-compressor's 20 GB would all be in memory when it saves a model from the disk."""

_ALIGNMENT = 8
_METADATA = {"format": "pt"}

# the order of dtypes in the safetensors library, narrowest first
_RANKS = {
    dtype: rank
    for rank, dtype in enumerate(
        (
            torch.bool,
            torch.uint8,
            torch.int8,
            torch.float8_e5m2,
            torch.float8_e4m3fn,
            torch.int16,
            torch.float16,
            torch.bfloat16,
            torch.int32,
            torch.float32,
            torch.float64,
            torch.int64,
        )
    )
}


def tensor_size(place: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Bytes of a tensor of some dtype and shape."""
    return place[0].itemsize * math.prod(place[1])


class SafetensorsLayout:
    """Header and places of a file as the safetensors library writes it: a length of 8 bytes, the header, the data.

    Attributes:
        header: length and header, as bytes.
        places: start and end of every tensor, in bytes from the start of the file.
        size: of the file in bytes.
    """

    def __init__(self, layout: Layout, *, metadata: Mapping[str, str] | None) -> None:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        places: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, place in sorted(layout.items(), key=lambda item: (-_RANKS[item[1][0]], item[0])):
            places[name] = (offset, offset := offset + tensor_size(place))
            dtype, shape = place
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": list(places[name])}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        start = len(self.header)
        self.places = {name: (start + first, start + last) for name, (first, last) in places.items()}
        self.size = start + offset


class BaseLayout:
    """How the tensors of a model are split into files.

    Args:
        saved: every tensor.
        buffers: those that are no parameters, which the index does not count.

    Attributes:
        files: layout by file name.
        index: content of the index, or None where one file holds everything.
    """

    def __init__(self, saved: Layout, *, buffers: Collection[str] = ()) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            saved, get_storage_size=tensor_size, filename_pattern=_FILES, max_shard_size=MAX_FILE
        )
        self.files = {
            file: SafetensorsLayout({name: saved[name] for name in names}, metadata=_METADATA)
            for file, names in split.filename_to_tensors.items()
        }
        self.index: str | None = None
        if split.is_sharded:
            weights = sum(math.prod(shape) for name, (_, shape) in saved.items() if name not in buffers)
            metadata = {"total_parameters": weights, **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            self.index = json.dumps(index, indent=2, sort_keys=True) + "\n"


class BaseWriter:
    """The files of a model, being written.

    Args:
        directory: where the files go; it exists.
        saved: every tensor that will be written.
        buffers: those that are no parameters.
        keep: go on with the files of a writer that did not finish.

    Raises:
        CheckpointError: the disk has no room for them.
    """

    def __init__(self, directory: Path, saved: Layout, *, buffers: Collection[str] = (), keep: bool = False) -> None:
        self._directory = directory
        self._layout = BaseLayout(saved, buffers=buffers)
        self._files = {
            name: PlacedFile(directory / name, file.size, "the W4 model") for name, file in self._layout.files.items()
        }
        self._file_of = {tensor: name for name, file in self._layout.files.items() for tensor in file.places}
        try:
            for file in self._files.values():
                file.reserve(keep=keep)
        except Exception:
            self.close()
            raise

    def write(self, tensor: str, chunks: Iterable[memoryview | bytes]) -> str:
        """Write a tensor's bytes to their place and return their SHA-256.

        Raises:
            CheckpointError: the disk refuses.
        """
        name = self._file_of[tensor]
        return self._files[name].write(chunks, self._layout.files[name].places[tensor][0])

    def holds(self, tensor: str, digest: str) -> bool:
        """Whether the file has bytes of this SHA-256 at the tensor's place."""
        name = self._file_of[tensor]
        return self._files[name].digest(*self._layout.files[name].places[tensor]) == digest

    def flush(self, tensors: Iterable[str]) -> None:
        """Wait until the files of these tensors are on the disk."""
        for name in {self._file_of[tensor] for tensor in tensors}:
            self._files[name].flush()

    def finish(self) -> list[Path]:
        """Write headers and index; the paths of all files."""
        for name, file in self._files.items():
            file.write([self._layout.files[name].header], 0)
        self.close()
        paths = [file.path for file in self._files.values()]
        if self._layout.index is not None:
            index = self._directory / INDEX_NAME
            index.write_text(self._layout.index, encoding="utf-8")
            paths.append(index)
        return paths

    def close(self) -> None:
        """Give the files back; harmless when done twice."""
        for file in self._files.values():
            file.close()
