"""The same model in other forms: what each would take on the disk."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from srd_modifier.checkpoint.writer import ResidualEntry
from srd_modifier.errors import SRDError
from srd_modifier.planning.files import gguf_bytes, planned_files
from srd_modifier.planning.modules import ModulePlan, PlannedModule
from srd_modifier.planning.source import ModelSource
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.depth import count_layers, in_range

_REASONING = (0.40, 0.77)
_GGUF_TYPES = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class Alternative:
    """One form of a model.

    Attributes:
        name: of the form.
        bytes: of its files with weights, headers included; for GGUF the whole file.
        bits_per_weight: of the weights that the recipe quantizes; None for GGUF, which quantizes others.
        total_bits_per_weight: of all weights of the model.
    """

    name: str
    bytes: int
    bits_per_weight: float | None
    total_bits_per_weight: float


def alternatives(source: ModelSource, plan: ModulePlan) -> tuple[Alternative, ...]:
    """The original, W4 alone, W4 with an int8 residual everywhere and in the reasoning range, and two GGUF files.

    A GGUF file is left out where llama.cpp's names for the architecture are not known, or its tokenizer is not here.
    """
    weights = sum(module.weights for module in plan.modules)
    all_weights = total_weights(source)
    stored = 8 * source.weight_bytes / all_weights
    layers = count_layers(module.name for module in plan.modules)
    default = ResidualFormat()

    def corrected(name: str, modules: Iterable[PlannedModule]) -> Alternative:
        entries = {module.name: ResidualEntry(*module.shape, default) for module in modules}
        files = planned_files(source, plan, entries)
        size = sum(module.base_bytes for module in plan.modules) + sum(entry.bytes() for entry in entries.values())
        total = files.base + (files.residual if entries else 0)
        return Alternative(name, total, 8 * size / weights, 8 * total / all_weights)

    reasoning = [module for module in plan.modules if in_range(module.name, layers, *_REASONING)]
    found = [
        Alternative("original", source.weight_bytes, float(_original_bits(source, plan)), stored),
        corrected("W4 alone", []),
        corrected("W4 and D8 at 40-77 % of depth", reasoning),
        corrected("W4 and D8 everywhere", plan.modules),
    ]
    return (*found, *_gguf(source, all_weights))


def total_weights(source: ModelSource) -> int:
    """Entries of all tensors of the model."""
    return sum(math.prod(shape) for shape in source.shapes.values())


def _original_bits(source: ModelSource, plan: ModulePlan) -> float:
    """Bits of the original's weights; experts that are fused in the file are as wide as everything else there."""
    bits = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
    widths = [
        bits.get(source.dtypes[name], 16)
        for name in (f"{m.name}.weight" for m in plan.modules)
        if name in source.dtypes
    ]
    return sum(widths) / len(widths) if widths else 8 * source.weight_bytes / total_weights(source)


def _gguf(source: ModelSource, all_weights: int) -> list[Alternative]:
    if not source.has_weights:
        return []
    found = []
    for name in _GGUF_TYPES:
        try:
            head, data, _ = gguf_bytes(source, name, calibrated=False)
        except SRDError:
            return []
        found.append(Alternative(f"GGUF {name}", head + data, None, 8 * (head + data) / all_weights))
    return found
