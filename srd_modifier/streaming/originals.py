"""The weights of a model directory, brought into a model without weights when their turn comes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.shards import DTYPE_NAMES, DTYPES
from srd_modifier.checkpoint.writer import tensor_bytes
from srd_modifier.planning.modules import direct_tensors

_BLOCK_BYTES = 2**24


class Originals:
    """The tensors of a model's files by the names that they have in the model.

    Args:
        files: of the model directory.
        model: on the meta device, without quantization parameters.

    Attributes:
        missing: tensors of the model that no file has.
        doubled: pairs of names that are one tensor in the model, and two in the files.
    """

    def __init__(self, files: BaseCheckpoint, model: nn.Module) -> None:
        self._files = files
        self._source: dict[str, str] = {}
        self.missing: list[str] = []
        self.doubled: list[tuple[str, str]] = []
        tied: dict[int, str] = {}
        names = [
            (f"{prefix}.{name}" if prefix else name, tensor)
            for prefix, module in model.named_modules()
            for name, tensor in direct_tensors(module).items()
        ]
        for name, tensor in names:
            if name in files and tied.setdefault(id(tensor), name) != name:
                self.doubled.append((tied[id(tensor)], name))
        for name, tensor in names:
            source = name if name in files else tied.get(id(tensor))
            if source is None:
                self.missing.append(name)
            else:
                self._source[name] = source
        self._dtypes = {name: tensor.dtype for name, tensor in names}

    def tensor(self, name: str) -> Tensor:
        """A tensor in the model's dtype; it shares the map's memory where the file has the same dtype."""
        return self._files.tensor(self._source[name]).to(self._dtypes[name])

    def chunks(self, name: str) -> Iterator[memoryview | bytes]:
        """The bytes of a tensor in the model's dtype, a few at a time."""
        source, dtype = self._source[name], self._dtypes[name]
        if self._files.info(source).dtype == DTYPE_NAMES.get(dtype):
            yield from self._files.chunks(source)
            return
        stored = DTYPES[self._files.info(source).dtype]
        flat = self._files.tensor(source).reshape(-1)
        for block in flat.split(_BLOCK_BYTES // stored.itemsize):
            yield tensor_bytes(block.to(dtype))

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._files.release()

    @contextmanager
    def present(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Have the own tensors of some modules in memory, and put them back to the meta device afterwards.

        Tensors that the files do not have are parameters of the quantization, which are yet to be computed.
        """
        modules = list(modules)
        for prefix, module in modules:
            for name, tensor in direct_tensors(module).items():
                full = f"{prefix}.{name}" if prefix else name
                real = self.tensor(full) if full in self._source else torch.zeros_like(tensor, device="cpu")
                _replace(module, name, real)
        try:
            yield
        finally:
            for _, module in modules:
                for name, tensor in direct_tensors(module).items():
                    _replace(module, name, torch.empty_like(tensor, device="meta"))
            self.release()


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
