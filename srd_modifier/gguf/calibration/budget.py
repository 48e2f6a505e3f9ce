"""The type of each tensor within a number of bytes: more bits where an error costs more.

llama.cpp's mixtures give some tensors of some layers a wider type by a fixed rule. Here the damage of each type is
measured for each tensor, and the exact solver that spends budgets of residuals chooses among them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError
from srd_modifier.gguf.calibration.damage import Damage
from srd_modifier.gguf.calibration.layers import LayeredModel
from srd_modifier.gguf.calibration.search import QUICK, quantize_calibrated
from srd_modifier.gguf.calibration.visit import Moments, Progress, visit_unchanged
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.residual.hessian import Hessian
from srd_modifier.selection.budget import Candidate, spend

CANDIDATES = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0)
CANDIDATES_OF_SHORT_BLOCKS = (GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0)
"""Where rows are not whole blocks of 256."""


def candidate_types(columns: int) -> tuple[GGMLType, ...]:
    """The types that a tensor with rows of so many weights may get, by rising size; empty if it fits none."""
    if columns % GGMLType.Q4_K.block_weights == 0:
        return CANDIDATES
    return CANDIDATES_OF_SHORT_BLOCKS if columns % GGMLType.Q4_0.block_weights == 0 else ()


def measure_candidates(
    model: LayeredModel,
    samples: Sequence[Sequence[int]],
    names: Sequence[str],
    damage: Damage,
    progress: Progress | None = None,
) -> dict[str, dict[GGMLType, float]]:
    """The damage of every candidate type of some tensors, in nats per token.

    Args:
        model: the model.
        samples: token ids.
        names: of the tensors.
        damage: what errors cost.
        progress: called with (layers done, layers in all).

    Raises:
        SRDError: see `visit_unchanged`.
    """
    damages: dict[str, dict[GGMLType, float]] = {}
    prepared: tuple[Moments, Hessian] | None = None

    def add(tensor: GGUFTensor, number: int, weight: Tensor, hessian: Hessian) -> None:
        own = damages.setdefault(tensor.name, {})
        for ggml_type in candidate_types(tensor.shape[-1]):
            error = quantize_calibrated(weight, ggml_type, hessian, QUICK).dequantize().to(weight.device) - weight
            own[ggml_type] = own.get(ggml_type, 0.0) + damage.of(tensor, number, error, hessian)

    def look(tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> None:
        nonlocal prepared
        if tensor.name in names and moments is not None:
            if prepared is None or prepared[0] is not moments:
                prepared = moments, moments.hessian()
            add(tensor, number, weight, prepared[1])

    visit_unchanged(model, samples, look, progress)
    for place in dict.fromkeys((model.embedding, model.head)):  # one place if it serves as both
        for tensor, number, _ in model.places[place]:
            if tensor.name in names:
                weight = tensor.pieces[number].read(model.weights).to(model.device, torch.float32)
                add(tensor, number, weight, Hessian.prepare(damage.moment_outside(place)))
    return damages


def spend_on_types(
    damages: Mapping[str, Mapping[GGMLType, float]],
    sizes: Mapping[str, Mapping[GGMLType, int]],
    max_bytes: int,
    rest: int = 0,
) -> tuple[dict[str, GGMLType], float]:
    """The types with the least damage in all, and that damage.

    Args:
        damages: of every candidate of every tensor.
        sizes: bytes of the same.
        max_bytes: for all tensors of the file together.
        rest: bytes of those that have no candidates.

    Raises:
        ConfigError: even the smallest types take more.
        MissingExtraError: scipy is not installed.
    """
    names = list(damages)
    groups = [[Candidate(sizes[name][own], damages[name][own]) for own in damages[name]] for name in names]
    smallest = sum(min(candidate.bytes for candidate in group) for group in groups)
    if rest + smallest > max_bytes:
        raise ConfigError(f"{max_bytes:,} bytes are too few, the smallest types take {rest + smallest:,}")
    spent = spend(groups, max_bytes=max_bytes - rest)
    chosen = {name: list(damages[name])[choice] for name, choice in zip(names, spent.choices, strict=True)}
    return chosen, spent.damage
