"""How corrected layers are computed in vLLM: its own methods, given other weights, that check what has arrived.

    merge   a dense weight, `W4 + alpha * residual`, in the model's dtype
    int8    the same in groups of int8 (W8A16): half the memory of merge
    split   W4 as it is, plus the residual in groups of int8: two kernels, each exact

A fused layer (qkv, gate and up) and its slices for tensor parallelism are vLLM's own business: it routes every
tensor of the stream to its place. What it did not fill is still NaN when loading ends, and stops the engine.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from srd_modifier.errors import CheckpointError

RESIDUAL = "residual"  # the submodule of a layer that holds the residual in `split`

# Residuals are about 1/250 of W4's scale, which in float16 is close to the numbers that lose digits. Their output is
# about 1/10 of the layer's, so 8 times of it overflows no sooner than the layer's own.
_HALF_PRECISION_FACTOR = 8.0


def scale_factor(dtype: torch.dtype) -> float:
    """What residuals are multiplied with while they are in the kernel of `split`."""
    return _HALF_PRECISION_FACTOR if dtype == torch.float16 else 1.0


class Arrival:
    """The part of a method that knows which modules of the checkpoint make up its layer.

    Attributes:
        compute: how the layer is computed.
        parts: modules of the checkpoint, in the order of the layer's rows.
        loaded: whether the weights are in the layout of a kernel already.
    """

    compute: str
    parts: tuple[str, ...]
    loaded = False

    def expect(self, parts: tuple[str, ...], rows: list[int], marked: Tensor) -> None:
        """Mark a parameter `[rows, ...]` before loading; `rows` are those of each part on this rank."""
        self.parts, self._rows = parts, list(rows)
        marked.data.fill_(torch.nan)

    def check(self, marked: Tensor) -> None:
        """Raise CheckpointError unless the whole parameter has been loaded."""
        rows = self._rows if len(self._rows) == len(self.parts) else [len(marked)]
        for part, values in zip(self.parts, marked.data.split(rows), strict=False):
            if bool(values.amax().isnan()):  # NaN if one of them is; isnan() takes several times as long
                raise CheckpointError(
                    f"{part}: its residual is promised by srd_config, but vLLM has not loaded all of it; serve plain "
                    "W4 with `--quantization compressed-tensors`, and report the model's architecture"
                )
        self.loaded = True


class _Merged(Arrival):
    """`merge` for a layer with one weight, whatever method of vLLM's computes it."""

    compute = "merge"

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,
        **attributes: Any,
    ) -> None:
        super().create_weights(  # type: ignore[misc]
            layer, input_size_per_partition, output_partition_sizes, *sizes, **attributes
        )
        self.expect(self.parts, output_partition_sizes, layer.weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check(layer.weight)
        super().process_weights_after_loading(layer)  # type: ignore[misc]


@register_weight_loader_v2_supported_method
class MergedLinearMethod(_Merged, UnquantizedLinearMethod):
    """`merge` for a linear layer."""


class MergedHeadMethod(_Merged, UnquantizedEmbeddingMethod):
    """`merge` for an output head, whose rows vLLM pads."""


class MergedExpertsMethod(UnquantizedFusedMoEMethod):
    """`merge` for the experts of a layer, of which a rank may hold some.

    Attributes:
        stem: what the experts' names in the checkpoint begin with (`model.layers.0.mlp.experts`).
    """

    compute = "merge"
    loaded = False

    def __init__(self, moe: Any, stem: str) -> None:
        super().__init__(moe)
        self.stem = stem

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:  # noqa: D102
        super().create_weights(layer, *sizes, **attributes)
        for weight, *_ in self._weights(layer):
            weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: D102
        for weight, rows, columns, name in self._weights(layer):
            halves = 2 if name == "w13" and self.moe.is_act_and_mul else 1
            blocks = weight.data.view(len(weight), halves, -1, weight.shape[-1])
            missing = blocks[:, :, :rows, :columns].amax((1, 2, 3)).isnan()
            if bool(missing.any()):
                expert = self._global_number(layer, int(missing.nonzero()[0]))
                what = "gate and up projection" if name == "w13" else "down projection"
                raise CheckpointError(
                    f"{self.stem}.{expert}: the weight of its {what} has not arrived whole in vLLM; serve plain W4 "
                    "with `--quantization compressed-tensors`, and report the model's architecture"
                )
            blocks[:, :, rows:].zero_()  # what a kernel pads
            blocks[..., columns:].zero_()
        self.loaded = True
        if current_platform.is_cpu():
            self.moe_kernel = None  # vLLM packs weights for it only when it makes the kernel, not when it reloads
        super().process_weights_after_loading(layer)

    def _weights(self, layer: Any) -> Iterator[tuple[Tensor, int, int, str]]:
        """The two stacked weights, with the rows of a matrix in them and its columns before padding."""
        hidden, intermediate = self.moe.hidden_dim_unpadded, self.moe.intermediate_size_per_partition_unpadded
        yield layer.w13_weight, intermediate, hidden, "w13"
        yield layer.w2_weight, hidden, intermediate, "w2"

    @staticmethod
    def _global_number(layer: Any, local: int) -> int:
        of_rank = layer.expert_map
        return local if of_rank is None else int((of_rank == local).nonzero()[0])


@register_weight_loader_v2_supported_method
class Int8LinearMethod(CompressedTensorsLinearMethod, Arrival):
    """`int8` for a linear layer: vLLM's own W8A16."""

    compute = "int8"

    def __init__(self, config: CompressedTensorsConfig, parts: tuple[str, ...], group_size: int) -> None:
        super().__init__(config)
        self.parts, self.group_size = parts, group_size

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:  # noqa: D102
        layer.scheme = int8_scheme(self.group_size, self.parts[0])
        super().create_weights(layer, *sizes, **attributes)
        self.expect(self.parts, layer.output_partition_sizes, layer.weight_scale)

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: D102
        self.check(layer.weight_scale)
        super().process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class SplitLinearMethod(CompressedTensorsLinearMethod, Arrival):
    """`split` for a linear layer: the layer's own W4A16, and W8A16 for the residual in a submodule."""

    compute = "split"

    def __init__(self, config: CompressedTensorsConfig, parts: tuple[str, ...], group_size: int) -> None:
        super().__init__(config)
        self.parts, self.group_size = parts, group_size

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:  # noqa: D102
        super().create_weights(layer, *sizes, **attributes)
        residual: Any = nn.Module()
        # kernels permute the bias of the layer that they are given, in place
        residual.register_parameter("bias", None)
        residual.quant_method = _ResidualMethod(self)
        residual.quant_method.create_weights(residual, *sizes, **attributes)
        setattr(layer, RESIDUAL, residual)
        self.factor = scale_factor(residual.params_dtype)
        self.expect(self.parts, layer.output_partition_sizes, residual.weight_scale)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        residual = getattr(layer, RESIDUAL)
        correction = residual.quant_method.apply(residual, x)
        return torch.add(super().apply(layer, x, bias), correction, alpha=1 / self.factor)


class _ResidualMethod(CompressedTensorsLinearMethod):
    """Of the submodule that holds the residual: to vLLM a layer of its own, which it loads and loads again alone."""

    def __init__(self, split: SplitLinearMethod) -> None:
        super().__init__(split.quantization_config)
        self.split = split

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        layer.scheme = int8_scheme(self.split.group_size, self.split.parts[0])
        super().create_weights(layer, *sizes, **attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.split.check(layer.weight_scale)
        super().process_weights_after_loading(layer)


def int8_scheme(group_size: int, name: str) -> CompressedTensorsWNA16:
    """VLLM's W8A16 with symmetric groups."""
    return CompressedTensorsWNA16(strategy="group", num_bits=8, group_size=group_size, symmetric=True, layer_name=name)
