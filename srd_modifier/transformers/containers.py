"""Transformers on a container: the small files in a directory of their own, the weights where they are.

Transformers opens files by their names, which those in a container do not have. So a verified container has a view: a
private directory, removed when the process ends, with the configuration and the tokenizer copied out of it, and an
empty file in the place of each safetensors file. What opens one of these gets the tensors mapped from inside the
container. Where the hooks are is for `srd_modifier._container_hooks` to know.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from srd_modifier.axm.entries import EntryPath, open_root
from srd_modifier.axm.extract import extract_files
from srd_modifier.axm.scratch import private_directory
from srd_modifier.checkpoint.shards import Shard
from srd_modifier.errors import CheckpointError, SRDError

_WEIGHTS = ".safetensors"
# weights that are not read from a container; nothing is copied that is large, and no pickle is ever opened
_LEFT_OUT = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")

_ADAPTER = "adapter_config.json"

_LOCK = threading.RLock()
_VIEWS: dict[EntryPath, Path] = {}
_ROOTS: dict[str, EntryPath] = {}  # the same, the other way round


def view_of(container: str | os.PathLike[str]) -> Path:
    """The directory that stands for a container, which is verified before anything of it is used.

    Raises:
        CheckpointError: it was changed, or was packed with another key than the one in the environment.
        SRDError: it holds no checkpoint directory.
    """
    root = open_root(Path(container))
    with _LOCK:
        if root not in _VIEWS:
            if not (root / "config.json").is_file():
                raise _no_checkpoint(root)
            _VIEWS[root] = _make_view(root)
            _ROOTS[str(_VIEWS[root])] = root
        return _VIEWS[root]


def entry_of(path: Any) -> EntryPath | None:
    """The file in a container that a path in a view stands for; None for every other path."""
    if not _ROOTS or not isinstance(path, str | os.PathLike):
        return None
    path = Path(path)
    for folder in path.parents:
        root = _ROOTS.get(str(folder))
        if root is not None:
            return root.joinpath(path.relative_to(folder))
    return None


def check_weights(container: str | os.PathLike[str], *, use_safetensors: bool | None) -> None:
    """Raise SRDError if Transformers would find no safetensors files in a container, or does not look for them."""
    if use_safetensors is False:
        raise SRDError(
            f"{container}: only safetensors files are read from a container; leave out use_safetensors=False"
        )
    root = open_root(Path(container))
    if not any(root.rglob(f"*{_WEIGHTS}")):
        raise _no_checkpoint(root)


def refuse_adapter(container: str | os.PathLike[str], found: Sequence[str]) -> None:
    """Raise SRDError if one of the files that were found is an adapter's: its weights are not read in place."""
    if any(Path(file).name == _ADAPTER for file in found):
        raise SRDError(
            f"{container} holds an adapter ({_ADAPTER}), which is not read from a container; unpack it with "
            "`srd axm extract`"
        )


def refuse_offloading(entry: EntryPath, device_map: Mapping[str, Any] | None) -> None:
    """Raise SRDError if a part of the model is to stay on the disk: accelerate reads it there, by the files' names."""
    if device_map is not None and "disk" in device_map.values():
        raise SRDError(
            f"{entry.container.path}: a part of the model would stay on the disk, and is not read from a container "
            "there; give it more memory, or unpack it with `srd axm extract`"
        )


class MappedFile:
    """A safetensors file in a container, as `safetensors.safe_open` gives one.

    Tensors are maps of the container: they cost no memory until they are read, and writing to one changes a private
    copy of its pages.
    """

    def __init__(self, path: Path, device: Any = "cpu") -> None:
        """Open a file.

        Raises:
            CheckpointError: it is not a safetensors file.
        """
        self._shard = Shard.open(path)
        self._device = device

    def __enter__(self) -> "MappedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close: the map lives as long as a tensor of it."""

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._shard.tensors)

    def metadata(self) -> dict[str, str] | None:
        """Free-form strings."""
        return self._shard.metadata or None

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, on the device of the file."""
        return self._shard.tensor(name).to(self._device)

    def get_slice(self, name: str) -> "MappedSlice":
        """A tensor that is not read before it is indexed."""
        return MappedSlice(self._shard, name, self._device)


class MappedSlice:
    """A tensor of a `MappedFile`, of which any part can be read."""

    def __init__(self, shard: Shard, name: str, device: Any) -> None:
        self._shard, self._name, self._device = shard, name, device

    def __getitem__(self, index: Any) -> Tensor:
        return self._shard.tensor(self._name)[index].to(self._device)

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self._shard.tensors[self._name].shape)

    def get_dtype(self) -> str:
        """Its dtype, as safetensors names it."""
        return self._shard.tensors[self._name].dtype


def _make_view(root: EntryPath) -> Path:
    view, container = private_directory(), root.container
    records = container.manifest.files
    try:
        for record in records:
            if record.path.endswith(_WEIGHTS):
                placeholder = view / record.path
                placeholder.parent.mkdir(parents=True, exist_ok=True)
                placeholder.touch()
        extract_files(container, [record for record in records if _is_small(record.path)], view)
    except OSError as error:
        raise CheckpointError(
            f"cannot copy the configuration of {container.path} to {view}: {error.strerror or error}"
        ) from error
    return view


def _is_small(name: str) -> bool:
    return not name.endswith((_WEIGHTS, *_LEFT_OUT))


def _no_checkpoint(root: EntryPath) -> SRDError:
    name = root.container.path
    if any(root.rglob("*.gguf")):
        return SRDError(
            f"{name} holds no weights that Transformers reads, only a GGUF file: score it with `srd eval`, or unpack "
            "it with `srd axm extract --gguf`"
        )
    return SRDError(f"{name} holds no weights that Transformers reads, these are safetensors files beside config.json")
