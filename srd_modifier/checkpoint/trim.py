"""A smaller sidecar, cut out of a larger one without the original model: the residuals that earn least are dropped.

Nothing is encoded again. A residual is kept or dropped, whole, and with it those of the modules that inference
engines fuse with its own; what each is worth is read from `srd/sensitivity.json`.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from srd_modifier.checkpoint.atomic import link_or_copy, new_directory, refuse_existing
from srd_modifier.checkpoint.config import IMPORTANCE, SENSITIVITY
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity, read_sensitivity
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import CheckpointSize, measure
from srd_modifier.checkpoint.spending import choose_within, residual_bytes
from srd_modifier.checkpoint.writer import SidecarWriter
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.selection.budget import Budget, Candidate
from srd_modifier.selection.fusion import fused_groups

# the only folder that belongs to a model in Transformers' format: a tokenizer's second and further chat templates
_TEMPLATES = "additional_chat_templates"

_KEEP = 0  # the first of the two candidates of a group; the other drops it


@dataclass(frozen=True)
class Trimmed:
    """What was kept, and what it costs.

    Attributes:
        kept: modules with a residual, in the model's order.
        dropped: modules that lost theirs.
        before: size of the checkpoint that was cut.
        after: size of the new one.
        divergence_before: predicted mean KL divergence of the one that was cut at alpha 1, nats per token.
        divergence_after: that of the new one.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    before: CheckpointSize
    after: CheckpointSize
    divergence_before: float
    divergence_after: float


def trim(directory: Path | str, output: Path | str, budget: Budget, *, overwrite: bool = False) -> Trimmed:
    """Write a copy of a checkpoint without the residuals that earn least, so that it is within a budget.

    A budget of bytes is that of the files with weights, of bits per weight that of the tensors of the quantized
    modules, both as `sizes.measure` counts them; of what fits, the choice with the least predicted divergence is
    taken. For a largest divergence it is the choice with the fewest bytes. Damage is that at alpha 1.

    Args:
        directory: an SRD checkpoint with a sensitivity.
        output: the directory to make; base files are linked where the file system allows it.
        budget: of `selection.budget.parse_budget`.
        overwrite: replace an existing model directory.

    Raises:
        CheckpointError: the checkpoint is damaged or has no sensitivity, or the output is in the way.
        ConfigError: the budget cannot be met, or leaves no residual.
    """
    directory, output = Path(directory), Path(output)
    refuse_existing(output, overwrite=overwrite)
    sidecar = Sidecar.open(directory)
    sensitivity = read_sensitivity(directory)
    if sensitivity is None:
        raise CheckpointError(
            f"{directory / SENSITIVITY} is missing, so it is not known what each residual earns; quantize again with "
            "`sensitivity: gradient` in the SRDModifier recipe"
        )
    before = measure(directory)
    kept = _choose(sidecar, sensitivity, before, budget)
    if not kept:
        raise ConfigError(
            f"a budget of {budget} leaves no residual in {directory}; the plain W4 model is its base itself: "
            "use it with alpha 0"
        )
    remaining_modules = set(kept)
    dropped = tuple(module for module in sidecar.entries if module not in remaining_modules)
    remaining = _without(sensitivity, dropped)
    with new_directory(output, overwrite=overwrite) as staging:
        _copy_model(directory, staging)
        if dropped:
            _write_sidecar(sidecar, staging, kept, remaining)
        else:
            _copy_sidecar(sidecar, staging)
        after = measure(staging)
    return Trimmed(
        kept,
        dropped,
        before,
        after,
        sensitivity.predicted(dict.fromkeys(sidecar.entries, 1.0)),
        remaining.predicted(dict.fromkeys(kept, 1.0)),
    )


def _choose(sidecar: Sidecar, sensitivity: Sensitivity, whole: CheckpointSize, budget: Budget) -> tuple[str, ...]:
    """The modules that keep their residual, in the model's order."""
    entries = sidecar.entries
    # asked of the files as they are: what `residual_bytes` counts is a little more
    if budget.bytes is not None and whole.bytes_on_disk <= budget.bytes:
        return tuple(entries)
    if budget.bits_per_weight is not None and whole.bits_per_weight <= budget.bits_per_weight:
        return tuple(entries)
    in_file = budget.bits_per_weight is None
    sizes = {module: residual_bytes(module, entry, in_file=in_file) for module, entry in entries.items()}
    names = fused_groups(list(entries))
    groups = [_candidates(group, sensitivity.modules, sizes) for group in names]
    # what no choice changes is a group too, so that every total is the model's
    rest = math.fsum(module.w4 for name, module in sensitivity.modules.items() if name not in entries)
    plain = measure(sidecar.directory, corrected=())
    choices = choose_within(budget, [*groups, [Candidate(0, rest)]], plain, str(sidecar.directory)).choices
    chosen = {module for group, choice in zip(names, choices, strict=False) if choice == _KEEP for module in group}
    return tuple(module for module in entries if module in chosen)


def _candidates(
    group: Sequence[str], modules: Mapping[str, ModuleSensitivity], sizes: Mapping[str, int]
) -> list[Candidate]:
    return [
        Candidate(sum(sizes[module] for module in group), math.fsum(modules[module].damage(1.0) for module in group)),
        Candidate(0, math.fsum(modules[module].w4 for module in group)),
    ]


def _without(sensitivity: Sensitivity, dropped: Sequence[str]) -> Sensitivity:
    """The sensitivity of the checkpoint after these modules lost their residual."""
    modules = dict(sensitivity.modules)
    for module in dropped:
        modules[module] = replace(modules[module], corrected=None, mixed=None)
    return replace(sensitivity, modules=modules)


def _copy_model(directory: Path, staging: Path) -> None:
    """Everything but the sidecar, GGUF files and the card, whose figures are not the copy's.

    Weights are linked; what one might edit in place is copied.
    """
    for source in directory.iterdir():
        if source.is_file() and source.suffix == ".safetensors":
            link_or_copy(source.resolve(), staging / source.name)  # a link to a link would be no file of its own
        elif source.is_file() and source.suffix != ".gguf" and source.name != "README.md":
            shutil.copyfile(source, staging / source.name)
    if (directory / _TEMPLATES).is_dir():
        shutil.copytree(directory / _TEMPLATES, staging / _TEMPLATES)


def _copy_sidecar(sidecar: Sidecar, staging: Path) -> None:
    for source in sidecar.files():
        target = staging / source.relative_to(sidecar.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source.resolve(), target)


def _write_sidecar(sidecar: Sidecar, staging: Path, kept: Sequence[str], sensitivity: Sensitivity) -> None:
    scratch = staging / ".residual"
    config = sidecar.config
    writer = SidecarWriter(scratch, {module: sidecar.entries[module] for module in kept})
    try:
        for module in kept:
            writer.write(module, sidecar.encoded(module))
        writer.finish(config.format)
    finally:
        writer.close()
    new = attach_sidecar(
        staging,
        sorted(scratch.iterdir()),
        modules=kept,
        fmt=config.format,
        alpha=config.alpha,
        layer_alphas=config.layer_alphas,
        sensitivity=sensitivity,
    )
    shutil.rmtree(scratch)
    if new.base_digest != config.base_digest:
        # a new digest of a damaged base would declare it sound
        raise CheckpointError(
            f"{sidecar.base.files[0]}: the base weights do not match srd_config.base_digest; "
            "they were changed after the residual was made"
        )
    if (sidecar.directory / IMPORTANCE).is_file():
        # whole: it guides exports of the dropped modules too
        link_or_copy((sidecar.directory / IMPORTANCE).resolve(), staging / IMPORTANCE)
