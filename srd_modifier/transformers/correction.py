"""The residual of a loaded model: the dial, and chunks of depth that come and go, in place.

Nothing but the model's own weights is held in memory. Turning the dial reads base and residual from the mapped
files again and computes `W4 + alpha * D8 * S8` into the weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from srd_modifier.checkpoint.config import module_alphas
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import SRDError
from srd_modifier.selection.depth import check_chunks, chunk_of

_CORRECTIONS: WeakKeyDictionary[nn.Module, "Correction"] = WeakKeyDictionary()


@dataclass
class Correction:
    """What has been added to a model's weights.

    Attributes:
        sidecar: of the model's checkpoint.
        dial: alpha of every corrected module, as the user last set it.
        hydrated: modules whose residual is in the weights; the others are plain W4.
        applied: alpha that is in the weights now.
    """

    sidecar: Sidecar
    dial: dict[str, float]
    hydrated: set[str]
    applied: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.applied = self.wanted()

    def wanted(self) -> dict[str, float]:
        """Alpha that every corrected module should have."""
        return {module: alpha if module in self.hydrated else 0.0 for module, alpha in self.dial.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Recompute the weights whose alpha is not the one that is in them."""
        # here, because compressed-tensors comes with it, and every import of Transformers would import that
        from srd_modifier.transformers.weights import find_weight, store_weight

        for module, alpha in self.wanted().items():
            if self.applied[module] != alpha:
                weight = find_weight(model, module)
                store_weight(model, module, self.sidecar.correct(module, alpha, weight.dtype, weight.device))
                self.applied[module] = alpha

    def in_chunks(self, chunks: Iterable[str] | None) -> set[str]:
        """The corrected modules in these chunks of depth; None is all of them."""
        if chunks is None:
            return set(self.dial)
        chosen = check_chunks(chunks)
        return {module for module in self.dial if chunk_of(module, self.sidecar.base.layers) in chosen}


def remember(model: nn.Module, correction: Correction) -> None:
    """Keep the correction of a model for as long as the model lives."""
    _CORRECTIONS[model] = correction


def is_corrected(model: nn.Module) -> bool:
    """Whether `correction_of` has an answer."""
    return model in _CORRECTIONS


def correction_of(model: nn.Module) -> Correction:
    """The correction of a loaded model.

    Raises:
        SRDError: the model was not loaded from an SRD checkpoint with the plugin.
    """
    if model not in _CORRECTIONS:
        raise SRDError(
            f"this {type(model).__name__} has no residual: load an SRD checkpoint with from_pretrained after "
            "`import srd_modifier` (a copy of a loaded model has none either)"
        )
    return _CORRECTIONS[model]


def set_alpha(model: nn.Module, alpha: float, *, layer_alphas: Mapping[str, float] | None = None) -> None:
    """Turn the dial of a loaded model, in place.

    Args:
        model: loaded from an SRD checkpoint.
        alpha: 0 gives the plain W4 model bit for bit, 1 the full correction.
        layer_alphas: alpha by module name or `re:` pattern, for modules that shall differ. The checkpoint's own
            layer alphas are not kept.

    Chunks that are released stay so, and have the new alpha when they are hydrated.

    Raises:
        ConfigError: an alpha is outside [0, 1].
        SRDError: the model has no residual.
        CheckpointError: the files on disk were changed since the model was loaded.
    """
    correction = correction_of(model)
    correction.dial = module_alphas(
        correction.sidecar.config, correction.sidecar.base.layers, alpha=alpha, layer_alphas=layer_alphas or {}
    )
    correction.update(model)


def hydrate(model: nn.Module, *, chunks: Iterable[str] | None = None) -> None:
    """Add the residual of chunks of depth to the weights, in place; None is every corrected module.

    Raises:
        ConfigError: a chunk is unknown.
        SRDError: the model has no residual.
        CheckpointError: the files on disk were changed since the model was loaded.
    """
    correction = correction_of(model)
    correction.hydrated |= correction.in_chunks(chunks)
    correction.update(model)


def release(model: nn.Module, *, chunks: Iterable[str] | None = None) -> None:
    """Put chunks of depth back to plain W4, in place; None is every corrected module. Errors as `hydrate`."""
    correction = correction_of(model)
    correction.hydrated -= correction.in_chunks(chunks)
    correction.update(model)
