"""The dense weights of a model on disk, one tensor at a time, whatever form they are stored in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import (
    IMPORTANCE,
    SRDConfig,
    module_alphas,
    read_model_config,
    read_srd_config,
)
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.checkpoint.shards import Shard
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, SRDError

_PACKED = ".weight_packed"
_PACKED_SUFFIXES = (_PACKED, ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
_IMPORTANCE_SUFFIX = ".importance"


@dataclass(frozen=True)
class ModelWeights:
    """A Hugging Face model, a compressed-tensors W4A16 checkpoint, or an SRD checkpoint, seen as a dense model.

    Nothing is read before it is asked for, and the files are mapped, so a tensor costs memory only while it is used.

    Attributes:
        directory: where the files lie.
        config: config.json.
        alphas: share of the residual by module; empty for a model without a residual.
    """

    directory: Path
    config: dict[str, Any]
    alphas: Mapping[str, float]
    _base: BaseCheckpoint
    _sidecar: Sidecar | None

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        alpha: float | None = None,
        layer_alphas: Mapping[str, float] | None = None,
        chunks: Iterable[str] | None = None,
    ) -> "ModelWeights":
        """Open the files of a model and check what can be checked without reading the weights.

        Args:
            name: a directory, or a Hugging Face hub id.
            alpha: for a checkpoint with a residual, the share of it to apply; None is the checkpoint's own.
            layer_alphas: alpha by module name or `re:` pattern; None is the checkpoint's own, unless alpha is given.
            chunks: for a checkpoint with a residual, the chunks of depth to apply it to; None is all.

        Raises:
            SRDError: there is no such model, or alphas or chunks were given for one without a residual.
            CheckpointError: it is damaged, incomplete, or quantized in a way that this version does not read.
            ConfigError: an alpha is outside [0, 1] or a chunk is unknown.
        """
        directory = find_model(name, fetch_weights=True)
        config = read_model_config(directory)
        srd_config = read_srd_config(directory)
        if srd_config is not None:
            sidecar = Sidecar.open(directory, srd_config)
            layers = sidecar.base.layers
            alphas = module_alphas(srd_config, layers, alpha=alpha, layer_alphas=layer_alphas, chunks=chunks)
            return cls(directory, config, alphas, sidecar.base, sidecar)
        given = {"alpha": alpha, "layer_alphas": layer_alphas, "chunks": chunks}
        refused = [option for option, value in given.items() if value is not None]
        if refused:
            raise SRDError(
                f"{name} has no residual (config.json has no srd_config), so {' and '.join(refused)} cannot be applied"
            )
        base = BaseCheckpoint(directory)
        _check_quantization(directory, config, base)
        return cls(directory, config, {}, base, None)

    @property
    def srd_config(self) -> SRDConfig | None:
        """The residual's settings; None for a model without one."""
        return None if self._sidecar is None else self._sidecar.config

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every tensor by the name it has in the dense model, in the order of the files."""
        return tuple(
            name.removesuffix(_PACKED) + ".weight" if name.endswith(_PACKED) else name
            for name in self._base
            if name.endswith(_PACKED) or not self._is_part_of_packed(name)
        )

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a dense tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        module = self._packed_module(name)
        return self._base.info(name).shape if module is None else self._base.weight_shape(module)

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, which must not be written to.

        As it is stored for a dense one; for a quantized module float32 `W4 + alpha * residual`.

        Raises:
            CheckpointError: there is no such tensor, or its residual does not match its digest.
        """
        module = self._packed_module(name)
        if module is None:
            tensor = self._base.tensor(name)
            if not tensor.is_floating_point():
                raise CheckpointError(f"{self.path_of(name)}: {name} is {tensor.dtype}, expected floating point")
            return tensor
        if self._sidecar is not None and module in self.alphas:
            return self._sidecar.correct(module, self.alphas[module])
        return self._base.dequantize(module)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        module = self._packed_module(name)
        return self._base.path_of(name if module is None else module + _PACKED)

    def importance(self) -> dict[str, Tensor]:
        """Mean squared input by module, float32 `[in]`, where the checkpoint has it; else empty.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.directory / IMPORTANCE
        if self._sidecar is None or not path.is_file():
            return {}
        shard = Shard.open(path)
        return {name.removesuffix(_IMPORTANCE_SUFFIX): shard.tensor(name).clone() for name in shard.tensors}

    def release(self) -> None:
        """Give the pages of the files back that reading has brought into memory; tensors stay valid."""
        (self._sidecar or self._base).release()

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _packed(self) -> frozenset[str]:
        return frozenset(self._base.quantized_modules)

    def _packed_module(self, name: str) -> str | None:
        """The quantized module whose weight this is; None for a tensor that is stored as it is."""
        module = name.removesuffix(".weight")
        return module if module != name and module in self._packed else None

    def _is_part_of_packed(self, name: str) -> bool:
        return any(name.endswith(suffix) and name.removesuffix(suffix) in self._packed for suffix in _PACKED_SUFFIXES)


def _check_quantization(directory: Path, config: Mapping[str, Any], base: BaseCheckpoint) -> None:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and not base.quantized_modules:
        method = quantization.get("quant_method")
        raise CheckpointError(
            f"{directory / 'config.json'}: the weights are quantized by {method!r} in a form that cannot be read here; "
            "name the unquantized model, or a compressed-tensors W4A16 checkpoint"
        )
