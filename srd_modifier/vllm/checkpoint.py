"""The checkpoint that a vLLM process serves: opened and verified once, then asked for corrected tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.locate import find_model
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.residual import decode
from srd_modifier.vllm.int8 import Int8Weight, on_grid, to_int8
from srd_modifier.vllm.settings import Settings


@dataclass(frozen=True)
class ServedCheckpoint:
    """An SRD checkpoint and how it is to be served.

    Attributes:
        sidecar: verified.
        settings: the checkpoint's, or the user's.
    """

    sidecar: Sidecar
    settings: Settings

    @classmethod
    def open(
        cls,
        model: str | Path,
        given: Mapping[str, Any],
        *,
        revision: str | None = None,
        cache_directory: str | None = None,
    ) -> "ServedCheckpoint":
        """Open a directory or a hub id, whose files are fetched with the same revision.

        Args:
            model: as vLLM has it.
            given: `srd_config` as vLLM has it.
            revision: of a hub id.
            cache_directory: where vLLM keeps hub models (`--download-dir`).

        Raises:
            CheckpointError: the sidecar is damaged, incomplete or of another base.
            ConfigError: a setting is unknown or out of range.
            SRDError: the model cannot be found.
        """
        directory = find_model(model, fetch_weights=True, revision=revision, cache_directory=cache_directory)
        sidecar = Sidecar.open(directory)
        return cls(sidecar, Settings.read(sidecar, given))

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Modules whose weight is packed int4."""
        return frozenset(self.sidecar.base.quantized_modules)

    def alpha(self, module: str) -> float:
        """Alpha of a module; 0 where there is no residual."""
        return self.settings.alphas.get(module, 0.0)

    def group_size(self, module: str) -> int:
        """Columns per scale of a module's residual, or of its W4 where there is none."""
        columns = self.sidecar.base.weight_shape(module)[1]
        if module not in self.sidecar.entries:
            return columns // self._base_scale(module).shape[1]
        return self.sidecar.entries[module].format.columns_per_group(columns)

    def merged(self, module: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`W4 + alpha * residual`, `[out, in]` of `dtype`."""
        return self.sidecar.correct(module, self.alpha(module), dtype, device)

    def as_int8(
        self,
        module: str,
        group_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        merged: Tensor | None = None,
    ) -> Int8Weight:
        """`W4 + alpha * residual` in groups of int8; a module without a correction is kept exactly, where it can be.

        Args:
            module: a quantized module.
            group_size: columns per scale; divides those of the module.
            dtype: of the scale.
            device: where it is computed.
            merged: the weight in float32, of who has it already.
        """
        if self.alpha(module) == 0:
            weight = self.sidecar.base.dequantize(module, device, scale_dtype=dtype)
            scale = self._base_scale(module).to(device, dtype)
            columns = weight.shape[1] // scale.shape[1]
            if columns % group_size == 0:  # codes less their zero points are from -15 to 15
                return on_grid(weight, scale.float().repeat_interleave(columns // group_size, 1), dtype)
        return to_int8(self.merged(module, torch.float32, device) if merged is None else merged, group_size, dtype)

    def residual_as_int8(
        self, module: str, group_size: int, dtype: torch.dtype, device: torch.device, *, factor: float = 1.0
    ) -> Int8Weight:
        """`factor * alpha * residual` in groups of int8.

        Every residual but a dithered one is a multiple of its scale, or of half of it below 8 bits, and is kept up to
        the rounding of the scale where the groups fit. A module without a correction gives zeros.
        """
        rows, columns = self.sidecar.base.weight_shape(module)
        factor *= self.alpha(module)
        if factor == 0:
            return to_int8(torch.zeros(rows, columns, device=device), group_size, dtype)
        fmt = self.sidecar.entries[module].format
        encoded = self.sidecar.encoded(module, device)
        residual = decode(encoded, fmt, in_features=columns, key=module).mul_(factor)
        stored = fmt.columns_per_group(columns)
        if fmt.rounding == "dithered" or stored % group_size:
            return to_int8(residual, group_size, dtype)
        step = encoded.scale.float() * (factor if fmt.bits == 8 else factor / 2)
        step = step.repeat_interleave(stored // group_size, 1)[:, : columns // group_size]  # the last may be shorter
        return on_grid(residual, step, dtype)

    def merged_bytes(self, fused: Mapping[str, Sequence[str]] | None = None) -> int:
        """Bytes of all weights when the layers with a correction are dense, of 2 bytes per entry.

        Args:
            fused: the parts of each fused layer, by their last names (`qkv_proj: [q_proj, k_proj, v_proj]`): all of
                them are dense if one is corrected.
        """
        base = self.sidecar.base
        siblings = {part: parts for parts in (fused or {}).values() for part in parts}
        total = sum(info.end - info.start for info in map(base.info, base))
        for module in self.quantized:
            stem, _, leaf = module.rpartition(".")
            if any(self.alpha(f"{stem}.{part}") > 0 for part in siblings.get(leaf, [leaf])):
                rows, columns = base.weight_shape(module)
                total += 2 * rows * columns - sum(i.end - i.start for i in base.module_tensors(module).values())
        return total

    def _base_scale(self, module: str) -> Tensor:
        return self.sidecar.base.tensor(f"{module}.weight_scale")
