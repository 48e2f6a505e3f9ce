"""The residual of a loaded model: the dial, and chunks of depth that come and go, in place.

Nothing but the model's own weights is held in memory. Turning the dial reads base and residual from the mapped
files again, computes `W4 + alpha * D8 * S8` into the weight, and gives the memory of the maps back.

Every change is one step for those who use the model: calls in other threads see all of it or nothing (see `locking`),
and a change that fails is undone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from srd_modifier.checkpoint.config import module_alphas
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.selection.depth import check_chunks, chunk_of
from srd_modifier.transformers.locking import changing_weights, guard

if TYPE_CHECKING:
    from srd_modifier.met.policy import Policy

_CORRECTIONS: WeakKeyDictionary[nn.Module, "Correction"] = WeakKeyDictionary()

_RELEASE_BYTES = 2**28  # of residual read, after which the maps' memory is given back in the middle of a change
_UNKNOWN = math.nan  # no alpha equals it: a weight in which nobody knows what is, and which is computed anew


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

    def update(
        self, model: nn.Module, *, dial: dict[str, float] | None = None, hydrated: set[str] | None = None
    ) -> None:
        """Change the dial or the hydrated modules, and recompute the weights whose alpha is not the one in them.

        Raises:
            SRDError: a weight cannot be computed, or is not in the model. Everything is as it was before, unless the
                message says that this was not possible either.
        """
        before = self.dial, self.hydrated
        self.dial = self.dial if dial is None else dial
        self.hydrated = self.hydrated if hydrated is None else hydrated
        try:
            self._apply(model)
        except BaseException as error:
            self.dial, self.hydrated = before
            try:
                self._apply(model)
            except Exception as again:
                raise SRDError(
                    f"{error}; the model now has some weights of each setting, because the former ones could not be "
                    f"computed again ({again}): load it anew"
                ) from error
            raise
        finally:
            self.sidecar.release()

    @torch.no_grad()
    def _apply(self, model: nn.Module) -> None:
        # here, because compressed-tensors comes with it, and every import of Transformers would import that
        from srd_modifier.transformers.weights import find_weight, store_weight

        read = 0
        for module, alpha in self.wanted().items():
            if self.applied[module] == alpha:
                continue
            weight = find_weight(model, module)
            corrected = self.sidecar.correct(module, alpha, weight.dtype, weight.device)
            self.applied[module] = _UNKNOWN  # until the copy is whole
            store_weight(model, module, corrected)
            self.applied[module] = alpha
            read += self.sidecar.entries[module].bytes()
            if read >= _RELEASE_BYTES:
                self.sidecar.release()
                read = 0

    def in_chunks(self, chunks: Iterable[str] | None) -> set[str]:
        """The corrected modules in these chunks of depth; None is all of them."""
        if chunks is None:
            return set(self.dial)
        chosen = check_chunks(chunks)
        return {module for module in self.dial if chunk_of(module, self.sidecar.base.layers) in chosen}


def remember(model: nn.Module, correction: Correction) -> None:
    """Keep the correction of a model for as long as the model lives, and let no call of it meet half a change."""
    _CORRECTIONS[model] = correction
    guard(model)


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
    """Turn the dial of a loaded model, in place and in one step, as `hydrate` describes it.

    Args:
        model: loaded from an SRD checkpoint.
        alpha: 0 gives the plain W4 model bit for bit, 1 the full correction.
        layer_alphas: alpha by module name or `re:` pattern, for modules that shall differ. The checkpoint's own
            layer alphas are not kept.

    Chunks that are released stay so, and have the new alpha when they are hydrated.

    Raises:
        ConfigError: an alpha is outside [0, 1].
        SRDError: the model has no residual, or this thread is inside its forward or `generate`.
        CheckpointError: the files on disk were changed since the model was loaded.
    """
    correction = correction_of(model)
    dial = module_alphas(
        correction.sidecar.config, correction.sidecar.base.layers, alpha=alpha, layer_alphas=layer_alphas or {}
    )
    with changing_weights(model):
        correction.update(model, dial=dial)


def hydrate(
    model: nn.Module,
    *,
    chunks: Iterable[str] | None = None,
    intent: str | None = None,
    policy: "Policy | Path | str | None" = None,
) -> None:
    """Add the residual of chunks of depth to the weights, in place and in one step.

    The residual is read from the mapped files, and the memory of the maps is given back. Forwards and `generate` of
    the model that run in other threads are waited for, and those that begin meanwhile wait: each has the weights of
    before from its first token to its last, or those of after. If the change fails, the weights are put back to
    those of before, and the error says so if that fails too.

    Args:
        model: loaded from an SRD checkpoint.
        chunks: to add to those that are hydrated already; None is every corrected module.
        intent: instead of `chunks`: have exactly the chunks of this intent hydrated and release the others. That is
            the model of `load_corrected(..., chunks=...)`, bit for bit: corrected modules outside the decoder layers
            are in no chunk, and released.
        policy: the chunks of every intent: a `Policy`, the path of a YAML file, of a `met.json`, or of a directory
            with one; None is the `met.json` of the checkpoint, or the default policy where it has none.

    Raises:
        ConfigError: a chunk or the intent is unknown, or the arguments contradict each other.
        SRDError: the model has no residual, or this thread is inside its forward or `generate`.
        CheckpointError: the files on disk were changed since the model was loaded, or the policy cannot be read.
    """
    correction = correction_of(model)
    if intent is None:
        if policy is not None:
            raise ConfigError("a policy was given without an intent; give hydrate the intent as well")
        chosen = correction.in_chunks(chunks)
        with changing_weights(model):
            correction.update(model, hydrated=correction.hydrated | chosen)
        return
    if chunks is not None:
        raise ConfigError("chunks and an intent were both given; an intent has its chunks from the policy, give one")
    chosen = correction.in_chunks(_policy(policy, correction.sidecar.directory).chunks(intent))
    with changing_weights(model):
        correction.update(model, hydrated=chosen)


def release(model: nn.Module, *, chunks: Iterable[str] | None = None) -> None:
    """Put chunks of depth back to plain W4, in place and in one step; None is every corrected module.

    Errors as `hydrate`.
    """
    correction = correction_of(model)
    chosen = correction.in_chunks(chunks)
    with changing_weights(model):
        correction.update(model, hydrated=correction.hydrated - chosen)


def _policy(given: "Policy | Path | str | None", directory: Path) -> "Policy":
    from srd_modifier.met import Policy, policy_of, read_met

    if isinstance(given, Policy):
        return given
    if given is None:
        if not directory.is_dir():  # it may have had a policy of its own
            raise CheckpointError(f"{directory} is gone, and its met.json with it; give hydrate a policy")
        return policy_of(directory)
    path = Path(given) if isinstance(given, str) else given
    if path.is_dir():
        return policy_of(path)
    if path.suffix == ".json":
        return Policy.from_mapping(read_met(path)["hydration"], f"{path}: hydration")
    return Policy.from_yaml(path)
