"""The tensors that vLLM is given to load: those of the checkpoint, the corrected layers' replaced.

The model routes tensors by their names, so those of a corrected layer are given the names that the layer's method
asks for: `weight` for a merged one, another `weight_packed` and `weight_scale` for int8, and besides W4 those of
`residual` for split.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, ModelConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from srd_modifier.checkpoint.config import CONFIG_KEY
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.vllm.checkpoint import ServedCheckpoint
from srd_modifier.vllm.config import CorrectedConfig
from srd_modifier.vllm.int8 import Int8Weight, pack_int8
from srd_modifier.vllm.layers import (
    RESIDUAL,
    Arrival,
    Int8LinearMethod,
    MergedExpertsMethod,
    SplitLinearMethod,
    scale_factor,
)
from srd_modifier.vllm.settings import Settings

logger = init_logger(f"vllm.{__name__}")

_PACKED = "weight_packed"
_BASE_SUFFIXES = (_PACKED, "weight_scale", "weight_shape", "weight_zero_point")

Method = Arrival | MergedExpertsMethod


def corrected_weights(
    weights: Iterable[tuple[str, Tensor]], model_config: ModelConfig, model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Replace the tensors of corrected layers in the stream of a checkpoint's tensors.

    Whatever can be wrong with the settings or the model is found before the first tensor.

    Args:
        weights: names and tensors as the checkpoint has them.
        model_config: of the model, with the settings of now: they may have changed since it was made.
        model: whose layers are those of this rank.

    Raises:
        CheckpointError: the model lacks a layer that has a residual; on reading, a residual is damaged.
        ConfigError: a setting is unknown or out of range, or needs a layer that the engine left to W4.
    """
    config = next(
        (found for m in model.modules() if isinstance(found := getattr(m, "quant_config", None), CorrectedConfig)), None
    )
    if config is None:
        raise CheckpointError(
            f"{model_config.model}: {type(model).__name__} of vLLM does not say how its layers are quantized, so no "
            "residual can be added; serve plain W4 with `--quantization compressed-tensors`"
        )
    if model_config.model != config.model:
        raise ConfigError(
            f"{model_config.model}: the weights of another model cannot be loaded into an engine of the SRD checkpoint "
            f"{config.model}; start another engine"
        )
    checkpoint = config.checkpoint
    given = getattr(model_config.hf_config, CONFIG_KEY)
    checkpoint = replace(checkpoint, settings=Settings.read(checkpoint.sidecar, given))
    methods = _methods(config, model)
    if model_config.runner_type != "draft":  # which may be a part of the model only, and changes no answer
        _check_layers(config, checkpoint, methods, model)
    _check_reload(methods)
    size = sum(weight.nbytes for layer in _layers(model) for weight in layer.parameters())
    elsewhere = _experts_elsewhere(config, methods, model)
    return _Stream(checkpoint, methods, elsewhere, model_config.dtype, size).tensors(weights)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(getattr(m, "quant_method", None), Method))


def _methods(config: CorrectedConfig, model: nn.Module) -> dict[str, Method]:
    """The method of each module of the checkpoint that this rank corrects, experts of other ranks left out."""
    methods: dict[str, Method] = {}
    for layer in _layers(model):
        method = layer.quant_method
        if isinstance(method, Arrival):
            methods |= dict.fromkeys(config.checkpoint.quantized.intersection(method.parts), method)
        else:
            methods |= {
                name: method
                for module, name in config.names.items()
                if module.startswith(f"{method.stem}.") and _is_local(layer, module.removeprefix(f"{method.stem}."))
            }
    return methods


def _experts_elsewhere(config: CorrectedConfig, methods: dict[str, Method], model: nn.Module) -> frozenset[str]:
    """Experts of other ranks: a merged layer has no place for their W4, not even one that is passed over."""
    stems = tuple(f"{m.quant_method.stem}." for m in _layers(model) if isinstance(m.quant_method, MergedExpertsMethod))
    return frozenset(name for module, name in config.names.items() if module.startswith(stems)) - methods.keys()


def _is_local(experts: Any, name: str) -> bool:
    """Whether an expert (`3.up_proj`) has a place on this rank, as far as that is fixed."""
    number, of_rank = name.partition(".")[0], experts.expert_map
    if of_rank is None or not number.isdigit() or experts.moe_config.moe_parallel_config.enable_eplb:
        return True
    return int(of_rank[int(number)]) >= 0


def _check_layers(
    config: CorrectedConfig, checkpoint: ServedCheckpoint, methods: dict[str, Method], model: nn.Module
) -> None:
    """Every module with a correction must have a layer that adds it, here or on another rank."""
    names = {name: module for module, name in config.names.items()}
    stems = tuple(f"{m.stem}." for m in set(methods.values()) if isinstance(m, MergedExpertsMethod))
    for module, alpha in checkpoint.settings.alphas.items():
        if alpha == 0 or module in methods:
            continue
        name = names.get(module, "")
        if name.startswith(stems) or is_pp_missing_parameter(f"{name}.weight", model):
            continue  # an expert of another rank, a layer of another stage
        if config.checkpoint.alpha(module) == 0:
            raise ConfigError(
                f"{module}: the engine was started with alpha 0 for it, and computes it as W4; start it with "
                "srd_config.compute 'merge' to turn the dial later"
            )
        raise CheckpointError(
            f"{module} has a residual, but {type(model).__name__} of vLLM has no such layer; serve plain W4 with "
            "`--quantization compressed-tensors`"
        )


def _check_reload(methods: dict[str, Method]) -> None:
    """What is compiled for a CPU has the weights of before in it."""
    compiled = get_current_vllm_config().compilation_config.mode != CompilationMode.NONE
    if current_platform.is_cpu() and compiled and any(method.loaded for method in methods.values()):
        raise ConfigError("weights cannot be exchanged in a compiled model on a CPU; start it with --enforce-eager")


@dataclass
class _Stream:
    checkpoint: ServedCheckpoint
    methods: dict[str, Method]
    elsewhere: frozenset[str]  # modules whose tensors have no place on this rank
    dtype: torch.dtype
    bytes: int  # of the corrected layers
    # of int8 and split: sum of squares of what they lose, and of what the residual corrects
    lost: float = 0.0
    corrected: float = 0.0

    def tensors(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            module, _, suffix = name.rpartition(".")
            if module in self.elsewhere:
                continue
            method = self.methods.get(module)
            if method is None or suffix not in _BASE_SUFFIXES or isinstance(method, SplitLinearMethod):
                yield name, tensor
            if method is not None and suffix == _PACKED:
                yield from self._of(module, method)
        self._report()
        self.checkpoint.sidecar.release()

    @torch.no_grad()
    def _of(self, module: str, method: Method) -> Iterator[tuple[str, Tensor]]:
        checkpoint, device = self.checkpoint, torch.device(current_platform.device_type)
        if isinstance(method, Int8LinearMethod):
            exact = checkpoint.merged(module, torch.float32, device)
            weight = checkpoint.as_int8(module, method.group_size, self.dtype, device, merged=exact)
            self._measure(module, weight.dequantize(), exact)
            yield from self._packed(module, module, weight)
        elif isinstance(method, SplitLinearMethod):
            factor = scale_factor(self.dtype)
            residual = checkpoint.residual_as_int8(module, method.group_size, self.dtype, device, factor=factor)
            base = checkpoint.sidecar.base.dequantize(module, device, scale_dtype=self.dtype)
            exact = checkpoint.merged(module, torch.float32, device)
            self._measure(module, base.add_(residual.dequantize(), alpha=1 / factor), exact)
            yield from self._packed(f"{module}.{RESIDUAL}", module, residual)
        else:
            yield f"{module}.weight", checkpoint.merged(module, self.dtype, device)

    def _packed(self, name: str, module: str, weight: Int8Weight) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.{_PACKED}", pack_int8(weight.codes)
        yield f"{name}.weight_scale", weight.scale
        yield f"{name}.weight_shape", self.checkpoint.sidecar.base.tensor(f"{module}.weight_shape")

    def _measure(self, module: str, found: Tensor, exact: Tensor) -> None:
        base = self.checkpoint.sidecar.base.dequantize(module, exact.device, scale_dtype=self.dtype)
        self.lost += float((found - exact).square().sum())
        self.corrected += float((base - exact).square().sum())

    def _report(self) -> None:
        """One line per start, from the first rank of each stage."""
        if get_tensor_model_parallel_rank() != 0:
            return
        counts = Counter(method.compute for method in set(self.methods.values()))
        alphas = {self.checkpoint.alpha(module) for module in self.methods}
        logger.info(
            "srd-modifier: %s, %d modules of the checkpoint, alpha %s%s%s",
            ", ".join(f"{compute} {count} layers" for compute, count in sorted(counts.items()))
            or "no layers corrected",
            len(self.methods),
            " to ".join(f"{alpha:g}" for alpha in sorted({min(alphas, default=0), max(alphas, default=0)})),
            f", {self.bytes / 1e6:.1f} MB on this rank" if self.bytes else "",
            f", kernels lose {(self.lost / self.corrected) ** 0.5:.2%} of the correction" if self.corrected else "",
        )
