"""`engine.py` with a reference kernel: compute `int8` and `split` on a CPU, whose vLLM has no kernel for them.

The kernel is plain torch and reads its tensors by the definition of `pack-quantized`. All else of an engine is as it
is: how the plugin decides (told that a CPU is a CUDA device), what vLLM allocates, routes, fuses and slices. vLLM
starts its processes by running this file anew, so every one of them has the kernel.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

import srd_modifier.vllm.config as plugin

sys.path.insert(0, str(Path(__file__).parent))

from engine import main


class ReferenceKernel(MPLinearKernel):
    """Symmetric int8 weights in groups, multiplied in float32.

    Like Marlin it leaves other parameters behind than it was given, and permutes the bias of its layer in place.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return c.weight_type == scalar_types.uint8b128 and not c.zero_points, "only symmetric int8"

    def process_weights_after_loading(self, layer: Any) -> None:
        columns, rows = self.config.partition_weight_shape
        packed, scale = layer.weight_packed.data, layer.weight_scale.data
        assert packed.shape == (rows, columns // 4)
        assert scale.shape == (rows, columns // self.config.group_size)
        codes = torch.stack([(packed >> shift) & 255 for shift in (0, 8, 16, 24)], -1).view(rows, columns) - 128
        weight = codes * scale.float().repeat_interleave(self.config.group_size, 1)
        del layer.weight_packed, layer.weight_scale
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.flip(0)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(x.float(), layer.weight, None if bias is None else bias.float().flip(0))
        return output.to(x.dtype)


class _AsCuda:
    """The platform of this process, which says that it is CUDA."""

    def is_cuda(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)


register_linear_kernel(ReferenceKernel, PlatformEnum.CPU)
plugin.current_platform = _AsCuda()

if __name__ == "__main__":
    main(Path(sys.argv[1]))
