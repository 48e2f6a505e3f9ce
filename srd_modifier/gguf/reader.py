"""A GGUF file: its metadata, its tensors dequantized by `gguf`, and what they cost."""

import math
import mmap
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srd_modifier._extras import require
from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.header import DamageError, StoredTensor, read_header


class GGUFFile:
    """A GGUF file with a model in it, mapped and checked but not read.

    Attributes:
        path: The file.
        architecture: llama.cpp's name of the model's architecture.
        metadata: Every key and its value.
        tensors: Where every tensor is and of which type and shape, by name.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            MissingExtraError: gguf is not installed.
            CheckpointError: The file is missing, damaged, or holds no model.
        """
        require("gguf", extra="gguf")
        self.path = path
        try:
            with path.open("rb") as file:
                if not file.seek(0, 2):
                    raise DamageError("it is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, tensors = read_header(self._map)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except DamageError as error:
            raise CheckpointError(f"{path} is not a whole GGUF file: {error}") from None
        self.tensors: dict[str, StoredTensor] = {tensor.name: tensor for tensor in tensors}
        self.architecture = str(self.metadata.get("general.architecture", ""))
        kind = self.metadata.get("general.type", "model")
        if kind != "model" or not self.architecture:
            raise CheckpointError(f"{path} holds no model, its general.type is {kind!r}")
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(f"{path} is one of {parts} parts of a model; merge them with llama-gguf-split first")

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32, dequantized by gguf, in torch's order of dimensions.

        Raises:
            CheckpointError: gguf does not know its type.
        """
        stored = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, stored.n_bytes, stored.start)
        rows = data.reshape(*reversed(stored.shape[1:]), stored.row_bytes)
        try:
            values = import_module("gguf").quants.dequantize(rows, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name} is of type {stored.tensor_type.name}, which gguf cannot read back"
            ) from error
        # float32 comes back as a view of the file
        return torch.from_numpy(values.astype("float32", copy=not values.flags.writeable))

    @property
    def file_type(self) -> str:
        """llama.cpp's name of the mixture of types, such as `Q4_K_M`; `unknown` where the file says none."""
        kinds = import_module("gguf").LlamaFileType
        try:
            return kinds(self.metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except (KeyError, ValueError):
            return "unknown"

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of more than one weight."""
        return import_module("gguf").GGML_QUANT_SIZES[self.tensors[name].tensor_type][0] > 1

    @property
    def size(self) -> CheckpointSize:
        """What the file costs: bits per weight are those of the decoder layers' matrices, routers aside.

        Routers are small and stay in float32, in the files of `llama-quantize` too; quantization does not cover them.
        """
        matrices = [
            tensor
            for name, tensor in self.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) >= 2 and ".ffn_gate_inp" not in name
        ]
        weights = sum(tensor.n_elements for tensor in matrices)
        size = sum(tensor.n_bytes for tensor in matrices)
        return CheckpointSize(
            bytes_on_disk=self.path.stat().st_size,
            bits_per_weight=8 * size / weights if weights else math.nan,
            quantized_weights=weights,
            total_weights=sum(tensor.n_elements for tensor in self.tensors.values()),
        )
