"""vLLM's compressed-tensors config, which computes the layers that have a residual with it."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from srd_modifier.checkpoint.config import CONFIG_KEY
from srd_modifier.errors import ConfigError
from srd_modifier.vllm.checkpoint import ServedCheckpoint
from srd_modifier.vllm.int8 import kernel_group_size
from srd_modifier.vllm.layers import (
    Int8LinearMethod,
    MergedExpertsMethod,
    MergedHeadMethod,
    MergedLinearMethod,
    SplitLinearMethod,
)
from srd_modifier.vllm.loader import check_loader, install

TESTED = ("0.32", "0.33")

# `auto` merges as long as the weights leave at least this share of vLLM's memory to the KV cache
_KV_CACHE_SHARE = 0.5

_DRAFT_PREFIX = "draft_model."  # what vLLM puts before the layers of a draft model

logger = init_logger(f"vllm.{__name__}")


class CorrectedConfig(CompressedTensorsConfig):
    """The quantization config of a checkpoint with a sidecar.

    It keeps the name of its base class, which models ask for: what holds for compressed-tensors holds here.
    """

    model: str  # a directory or a hub id
    _revision: str | None
    _given: dict[str, Any]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """What vLLM tells a quantization config about its model, when the engine is configured.

        Raises:
            SRDError: the sidecar of a local directory is damaged, or a setting is wrong. Those of hub models are
                verified in each rank, which knows where vLLM keeps their files.
        """
        self.model, self._revision, self._given = model_name, revision, getattr(hf_config, CONFIG_KEY)
        if not vllm.__version__.startswith(TESTED):
            logger.warning_once(
                "srd-modifier is tested with vLLM %s, not with %s", " and ".join(TESTED), vllm.__version__
            )
        if self.transform_config is not None:
            raise ConfigError(
                f"{model_name}: config.json has a transform_config, which corrected layers do not apply; serve plain "
                "W4 with `--quantization compressed-tensors`"
            )
        if Path(model_name).is_dir():
            ServedCheckpoint.open(model_name, self._given)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes and copies: each opens the checkpoint itself."""
        return {name: value for name, value in vars(self).items() if name not in ("checkpoint", "compute")}

    @cached_property
    def checkpoint(self) -> ServedCheckpoint:
        """The checkpoint, opened and verified in this process, whose loader is made to read it.

        Raises:
            SRDError: the loader cannot read the sidecar, or the checkpoint or a setting is wrong.
        """
        load_config = get_current_vllm_config().load_config
        install()
        check_loader(load_config)
        return ServedCheckpoint.open(
            self.model, self._given, revision=self._revision, cache_directory=load_config.download_dir
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that a model gives its modules."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        # the names of tensors are what it maps: `lm_head.` is the prefix of one, and not of the module's own name
        mapped = {name: hf_to_vllm_mapper.apply_list([f"{name}.weight"]) for name in self.names}
        self.names = {new[0].removesuffix(".weight"): self.names[name] for name, new in mapped.items() if new}

    @cached_property
    def names(self) -> dict[str, str]:
        """What the checkpoint calls a quantized module, by vLLM's name for it."""
        return {module: module for module in self.checkpoint.sidecar.base.quantized_modules}

    @cached_property
    def compute(self) -> str:
        """How linear layers with a correction are computed in this engine.

        Raises:
            ConfigError: the platform or the dtype has no kernel for what the user wants.
        """
        wanted, dtype = self.checkpoint.settings.compute, get_current_vllm_config().model_config.dtype
        if wanted in ("int8", "split"):
            if not current_platform.is_cuda():
                raise ConfigError(
                    f"srd_config.compute {wanted!r} needs a CUDA device, this is {current_platform.device_name}; use "
                    "'merge'"
                )
            if dtype == torch.float32:
                raise ConfigError(f"srd_config.compute {wanted!r} needs bfloat16 or float16, not {dtype}; use 'merge'")
        if wanted != "auto":
            return wanted
        return "merge" if not current_platform.is_cuda() or self._merged_weights_fit() else "int8"

    def _merged_weights_fit(self) -> bool:
        vllm_config = get_current_vllm_config()
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        usable = current_platform.get_device_total_memory() * vllm_config.cache_config.gpu_memory_utilization
        return self.checkpoint.merged_bytes(self.packed_modules_mapping) / ranks <= (1 - _KV_CACHE_SHARE) * usable

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """VLLM's way to ask how a layer is computed: a method of ours where a residual is to be added.

        Raises:
            SRDError: the loader does not read the sidecar, or the checkpoint or a setting is wrong.
        """
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            parts = self._parts(prefix)
            if self._is_dense(parts):
                return self._linear_method(layer, prefix, parts)
        return super().get_quant_method(layer, prefix)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        stem = prefix.removeprefix(_DRAFT_PREFIX).removesuffix(".routed_experts")
        experts = [name for module, name in self.names.items() if module.startswith(f"{stem}.")]
        if not self._is_dense(experts):
            try:
                return super().get_quant_method(layer, prefix)
            except NotImplementedError:
                if not experts:
                    raise
                logger.warning_once("srd-modifier: vLLM has no W4 kernel for experts here, all of them are merged")
        return MergedExpertsMethod(layer.moe_config, stem)

    def _parts(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint that make up a layer; those that are not quantized keep vLLM's name."""
        stem, _, leaf = prefix.removeprefix(_DRAFT_PREFIX).rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        modules = [f"{stem}.{part}" if stem else part for part in leaves]
        return tuple(self.names.get(module, module) for module in modules)

    def _is_dense(self, parts: tuple[str, ...] | list[str]) -> bool:
        """Whether a layer is not left to vLLM's W4 kernels."""
        quantized = [part for part in parts if part in self.checkpoint.quantized]
        if get_current_vllm_config().model_config.dtype == torch.float32:
            return bool(quantized)  # W4 kernels compute in half precision only
        covered = [part for part in quantized if part in self.checkpoint.settings.alphas]
        # who asks for merge can turn the dial later, from 0 too
        dialled = self.checkpoint.settings.compute == "merge"
        return any(dialled or self.checkpoint.alpha(part) > 0 for part in covered)

    def _linear_method(self, layer: nn.Module, prefix: str, parts: tuple[str, ...]) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return MergedHeadMethod(parts)
        quantized = [part for part in parts if part in self.checkpoint.quantized]
        if self.compute == "merge" or len(quantized) < len(parts):
            return MergedLinearMethod(parts)
        ranks = get_current_vllm_config().parallel_config.tensor_parallel_size
        columns = self.checkpoint.sidecar.base.weight_shape(parts[0])[1]
        group_size = kernel_group_size(math.gcd(*map(self.checkpoint.group_size, parts)), columns, ranks)
        if group_size is None:
            if self.checkpoint.settings.compute == "auto":
                return MergedLinearMethod(parts)
            raise ConfigError(
                f"{parts[0]}: groups of 32, 64 or 128 do not divide its {columns} columns among {ranks} ranks, as "
                f"srd_config.compute {self.compute!r} needs; use 'merge'"
            )
        if self.compute == "int8":
            return Int8LinearMethod(self, parts, group_size)
        super().get_quant_method(layer, prefix)  # gives the layer its W4 scheme
        return SplitLinearMethod(self, parts, group_size)
