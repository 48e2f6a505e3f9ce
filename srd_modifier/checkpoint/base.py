"""The base of a checkpoint: its W4A16 tensors, the digest that binds a sidecar to them, its weights in float32."""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from srd_modifier.checkpoint.config import read_json
from srd_modifier.checkpoint.shards import Shard, TensorInfo
from srd_modifier.checkpoint.w4 import dequantize_w4, unpack_zero_points
from srd_modifier.errors import CheckpointError
from srd_modifier.selection.depth import count_layers

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PACKED = ".weight_packed"

# the fingerprint reads this many pages of a tensor, evenly spaced, first and last included
_SAMPLE_PAGES = 16
_PAGE = 4096


class BaseCheckpoint:
    """The safetensors files in the root of a model directory, opened and checked but not read.

    Raises:
        CheckpointError: there are none, or one is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        weight_map = _weight_map(directory)
        self.shards = [Shard.open(directory / name) for name in sorted(set(weight_map.values()))]
        self._shard_of: dict[str, Shard] = {}
        for shard in self.shards:
            for name in shard.tensors:
                if name in self._shard_of:
                    raise CheckpointError(f"{name} is in both {self._shard_of[name].path} and {shard.path}")
                self._shard_of[name] = shard
        for name, file in weight_map.items():
            if name and (name not in self._shard_of or self._shard_of[name].path.name != file):
                raise CheckpointError(f"{directory / file}: {name} is missing, {_INDEX} promises it there")

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return [shard.path for shard in self.shards]

    @cached_property
    def quantized_modules(self) -> list[str]:
        """Modules whose weight is packed int4, in the order of the files."""
        return [name.removesuffix(_PACKED) for name in self._shard_of if name.endswith(_PACKED)]

    @cached_property
    def layers(self) -> int:
        """Decoder layers, counted from the tensors' names."""
        return count_layers(self._shard_of)

    def info(self, tensor: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self._shard(tensor).tensors[tensor]

    def tensor(self, tensor: str) -> Tensor:
        """A tensor, mapped from its file."""
        return self._shard(tensor).tensor(tensor)

    def chunks(self, tensor: str) -> Iterator[bytes]:
        """The bytes of a tensor, read piece by piece, without memory for more than a piece."""
        return self._shard(tensor).chunks(tensor)

    def release(self) -> None:
        """Give back the memory that reading has filled; tensors stay valid."""
        for shard in self.shards:
            shard.release()

    def path_of(self, tensor: str) -> Path:
        """The file that holds a tensor."""
        return self._shard(tensor).path

    def module_tensors(self, module: str) -> dict[str, TensorInfo]:
        """The tensors of a quantized module by their own names (`weight_packed`, `weight_scale`, ...)."""
        suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        return {suffix: self.info(f"{module}.{suffix}") for suffix in suffixes if f"{module}.{suffix}" in self}

    def quantized_size(self) -> tuple[int, int]:
        """How many weights are quantized, and the bytes of their codes, scales, zero points and shapes."""
        weights = sum(math.prod(self.weight_shape(module)) for module in self.quantized_modules)
        tensors = (info for module in self.quantized_modules for info in self.module_tensors(module).values())
        return weights, sum(info.end - info.start for info in tensors)

    def weight_shape(self, module: str) -> tuple[int, int]:
        """`(out_features, in_features)` of a quantized module.

        Raises:
            CheckpointError: the module's tensors are not those of `pack-quantized` int4.
        """
        shape = self.tensor(f"{module}.weight_shape")
        if shape.shape != (2,) or shape.is_floating_point() or not bool((shape > 0).all()):
            raise CheckpointError(
                f"{self.path_of(f'{module}.weight_shape')}: {module}.weight_shape is {shape.tolist()}, "
                "expected the rows and columns of a matrix"
            )
        out_features, in_features = shape.tolist()
        packed = self.info(module + _PACKED)
        if packed.dtype != "I32" or packed.shape != (out_features, -(-in_features // 8)):
            raise CheckpointError(
                f"{self.path_of(module + _PACKED)}: {module}.weight_packed is {packed.dtype} {list(packed.shape)}, "
                f"expected I32 {[out_features, -(-in_features // 8)]} for 4-bit weights"
            )
        return out_features, in_features

    def dequantize(
        self, module: str, device: torch.device | str = "cpu", *, scale_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The W4 weight of a module: float32 `[out, in]` on `device`.

        Args:
            module: a quantized module.
            device: where it is computed.
            scale_dtype: round the scales to this dtype first, as a loader does that casts the whole checkpoint;
                None takes them as they are stored.

        Raises:
            CheckpointError: the module's tensors are not those of `pack-quantized` int4, or do not fit together.
        """
        out_features, in_features = self.weight_shape(module)
        if f"{module}.weight_g_idx" in self:
            raise CheckpointError(
                f"{self.path_of(module + _PACKED)}: {module} orders its groups by activation (weight_g_idx), which "
                "this version does not read; quantize with actorder: static"
            )
        zero_point = f"{module}.weight_zero_point"
        groups = self._check_scale(module, out_features, in_features)
        if zero_point in self:
            self._check_layout(zero_point, ("I32",), (-(-out_features // 8), groups))
        return dequantize_w4(
            self.tensor(module + _PACKED).to(device),
            self.tensor(f"{module}.weight_scale").to(device, scale_dtype),
            unpack_zero_points(self.tensor(zero_point).to(device) if zero_point in self else None, out_features),
            in_features,
        )

    def _check_scale(self, module: str, out_features: int, in_features: int) -> int:
        """The groups per row; broadcasting would spread scales of another shape over the weight without a word."""
        name = f"{module}.weight_scale"
        shape = self.info(name).shape
        groups = shape[1] if len(shape) == 2 and shape[1] > 0 and in_features % shape[1] == 0 else 1
        self._check_layout(name, ("F32", "BF16", "F16"), (out_features, groups))
        return groups

    def _check_layout(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        info = self.info(name)
        if info.dtype not in dtypes or info.shape != shape:
            raise CheckpointError(
                f"{self.path_of(name)}: {name} is {info.dtype} {list(info.shape)}, "
                f"expected {' or '.join(dtypes)} {list(shape)}"
            )

    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 of the bytes of every tensor, in hexadecimal; reads every file once, on all cores."""
        return self._hash_tensors(_hash)

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes; it does not depend on how the tensors are sharded."""
        return self.combine(self.tensor_digests())

    def fingerprint(self) -> str:
        """As `digest`, over samples of the bytes: another model is noticed, one flipped bit may not be."""
        return self.combine(self._hash_tensors(_hash_sample))

    def combine(self, tensor_digests: dict[str, str]) -> str:
        """One digest out of the tensors' own, names, dtypes and shapes included."""
        total = hashlib.sha256()
        for name in sorted(tensor_digests):
            info = self.info(name)
            total.update(f"{name}\t{info.dtype}\t{list(info.shape)}\t{tensor_digests[name]}\n".encode())
        return "sha256:" + total.hexdigest()

    def _hash_tensors(self, hash_tensor: Callable[[Shard, str], str]) -> dict[str, str]:
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda name: hash_tensor(self._shard_of[name], name), self._shard_of)
            return dict(zip(self._shard_of, hashes, strict=True))

    def _shard(self, tensor: str) -> Shard:
        if tensor not in self._shard_of:
            raise CheckpointError(f"{self.directory} has no tensor {tensor}")
        return self._shard_of[tensor]


def _hash(shard: Shard, name: str) -> str:
    total = hashlib.sha256()
    for chunk in shard.chunks(name):
        total.update(chunk)
    return total.hexdigest()


def _hash_sample(shard: Shard, name: str) -> str:
    info = shard.tensors[name]
    spare = info.end - info.start - _PAGE
    if spare < _SAMPLE_PAGES * _PAGE:
        return _hash(shard, name)
    sample = hashlib.sha256()
    pages = [info.start + spare * page // (_SAMPLE_PAGES - 1) for page in range(_SAMPLE_PAGES)]
    for data in shard.read(pages, _PAGE, end=info.end):
        sample.update(data)
    return sample.hexdigest()


def _weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor, from the index; `{"": file}` where one file holds everything."""
    index = directory / _INDEX
    single = (directory / _SINGLE).is_file()
    if not index.is_file():
        if not single:
            raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
        return {"": _SINGLE}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} points to {file!r}, expected a file name in the same folder")
    if single and _SINGLE not in weight_map.values():
        # Transformers would load the one, vLLM the others
        raise CheckpointError(f"{directory} has both {_SINGLE} and {_INDEX} with other files; remove what is stale")
    return weight_map
