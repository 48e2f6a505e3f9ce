"""The residual of a loaded model: the dial, and chunks of depth that come and go, in place.

Nothing but the model's own weights is held in memory. Turning the dial reads base and residual from the mapped
files again and computes `W4 + alpha * D8 * S8` into the weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from srd_modifier.checkpoint.config import module_alphas
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import SRDError
from srd_modifier.selection.depth import check_chunks, chunk_of
from srd_modifier.transformers.weights import find_weight

_CORRECTIONS: WeakKeyDictionary[nn.Module, "Correction"] = WeakKeyDictionary()


@dataclass
class Correction:
    """What has been added to a model's weights.

    Attributes:
        sidecar: of the model's checkpoint.
        dial: alpha of every corrected module, as the user last set it.
        applied: alpha that is in the weights now; 0 where a chunk is released.
    """

    sidecar: Sidecar
    dial: dict[str, float]
    applied: dict[str, float]

    @torch.no_grad()
    def apply(self, model: nn.Module, wanted: Mapping[str, float]) -> None:
        """Recompute the weights whose alpha differs from the one that is in them."""
        for module, alpha in wanted.items():
            if self.applied[module] != alpha:
                weight = find_weight(model, module)
                weight.copy_(self.sidecar.correct(module, alpha, weight.device))
                self.applied[module] = alpha


def remember(model: nn.Module, correction: Correction) -> None:
    """Keep the correction of a model for as long as the model lives."""
    _CORRECTIONS[model] = correction


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
    dial = module_alphas(
        correction.sidecar.config, correction.sidecar.base.layers, alpha=alpha, layer_alphas=layer_alphas or {}
    )
    released = {module for module, applied in correction.applied.items() if applied != correction.dial[module]}
    correction.dial = dial
    correction.apply(model, {module: 0.0 if module in released else value for module, value in dial.items()})


def hydrate(model: nn.Module, *, chunks: Iterable[str] | None = None) -> None:
    """Add the residual of chunks of depth to the weights, in place; None is every corrected module.

    Raises:
        ConfigError: a chunk is unknown.
        SRDError: the model has no residual.
        CheckpointError: the files on disk were changed since the model was loaded.
    """
    correction = correction_of(model)
    correction.apply(model, {module: correction.dial[module] for module in _in_chunks(correction, chunks)})


def release(model: nn.Module, *, chunks: Iterable[str] | None = None) -> None:
    """Put chunks of depth back to plain W4, in place; None is every corrected module. Errors as `hydrate`."""
    correction = correction_of(model)
    correction.apply(model, dict.fromkeys(_in_chunks(correction, chunks), 0.0))


def _in_chunks(correction: Correction, chunks: Iterable[str] | None) -> list[str]:
    if chunks is None:
        return list(correction.dial)
    chosen = check_chunks(chunks)
    return [module for module in correction.dial if chunk_of(module, correction.sidecar.base.layers) in chosen]
