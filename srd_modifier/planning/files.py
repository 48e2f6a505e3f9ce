"""The files of a checkpoint that is not written yet, to the byte where they hold tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from srd_modifier.checkpoint.base_writer import BaseLayout, Layout, SafetensorsLayout
from srd_modifier.checkpoint.config import CONFIG_KEY, VERSION, SRDConfig, read_model_config
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity, sensitivity_file
from srd_modifier.checkpoint.writer import MAX_SHARD_BYTES, ResidualEntry, header_bytes, shard_groups
from srd_modifier.errors import SRDError
from srd_modifier.planning.modules import ModulePlan
from srd_modifier.planning.source import ModelSource

_DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class PlannedFiles:
    """Bytes of an output directory, by what the files are.

    Attributes:
        base: the safetensors files of the W4A16 model.
        base_index: their index, where there is more than one.
        residual: the safetensors files of the sidecar.
        residual_index: their index.
        importance: the mean squared inputs, where the recipe calibrates.
        sensitivity: the predicted damage, where the recipe measures it; about.
        gguf: the file for llama.cpp, where the recipe writes one.
        text: config.json, recipe, tokenizer: about as large as the model's own, and the settings that are added.
    """

    base: int
    base_index: int
    residual: int
    residual_index: int
    importance: int
    sensitivity: int
    gguf: int
    text: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def planned_files(source: ModelSource, plan: ModulePlan, entries: Mapping[str, ResidualEntry]) -> PlannedFiles:
    """The files of a checkpoint.

    Args:
        source: the model.
        plan: what the recipe does to it.
        entries: the modules that get a residual.
    """
    base = BaseLayout(plan.saved, buffers=plan.buffers)
    importance: Layout = {}
    if plan.calibrates and plan.has_residual:
        importance = {f"{module.name}.importance": (torch.float32, (module.shape[1],)) for module in plan.modules}
    return PlannedFiles(
        base=sum(file.size for file in base.files.values()),
        base_index=len(base.index or ""),
        residual=residual_file_bytes(entries),
        residual_index=len(_residual_index(plan, entries)) if plan.has_residual else 0,
        importance=SafetensorsLayout(importance, metadata=None).size if importance else 0,
        sensitivity=_sensitivity_bytes(plan, entries) if plan.sensitivity else 0,
        gguf=_companion_bytes(source, plan),
        text=source.other_bytes + _config_bytes(source, plan, entries),
    )


def residual_file_bytes(entries: Mapping[str, ResidualEntry]) -> int:
    """Bytes of the sidecar's safetensors files."""
    return sum(
        header_bytes(group) + sum(entry.bytes() for entry in group.values())
        for group in shard_groups(entries, MAX_SHARD_BYTES)
    )


def _residual_index(plan: ModulePlan, entries: Mapping[str, ResidualEntry]) -> str:
    """The sidecar's index as it will be, but for its digests."""
    groups = shard_groups(entries, MAX_SHARD_BYTES)
    weight_map = {
        f"{name}.{suffix}": f"residual-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name, entry in group.items()
        for suffix in entry.layout()
    }
    differing = {name: entry.format.to_dict() for name, entry in entries.items() if entry.format != plan.format}
    metadata = {
        "total_size": sum(entry.bytes() for entry in entries.values()),
        "version": VERSION,
        "residual_digest": _DIGEST,
        "formats": differing,
        "base_digest": _DIGEST,
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def _sensitivity_bytes(plan: ModulePlan, entries: Mapping[str, ResidualEntry]) -> int:
    """sensitivity.json with numbers of full length."""
    number = 1.2345678901234567e-05
    damages = {
        module.name: ModuleSensitivity(w4=number, corrected=number, mixed=number, output=number)
        if module.name in entries
        else ModuleSensitivity(w4=number, output=number)
        for module in plan.modules
    }
    values = sensitivity_file(
        Sensitivity(method="gradient", tokens=8192, modules=damages), base_digest=_DIGEST, residual_digest=_DIGEST
    )
    return len(json.dumps(values, indent=2)) + 1


def _companion_bytes(source: ModelSource, plan: ModulePlan) -> int:
    """The GGUF file that the recipe asks for.

    Raises:
        SRDError: llama.cpp has no such architecture or tokenizer, or the tokenizer is not on this machine.
    """
    from srd_modifier.modifier.companion import CompanionFile

    companion = CompanionFile.parse(plan.gguf)
    if companion is None:
        return 0
    budget = companion.budget
    if budget is not None and budget.bytes is not None:
        return budget.bytes
    if not source.has_weights:
        raise SRDError(f"the recipe's GGUF file has the tokenizer of {source.name} in it, which is not on this machine")
    head, data, weights = gguf_bytes(source, companion.file_type.value, calibrated=True)
    if budget is not None and budget.bits_per_weight is not None:
        data = int(budget.bits_per_weight * weights / 8)
    return head + data


def gguf_bytes(source: ModelSource, file_type: str, *, calibrated: bool) -> tuple[int, int, int]:
    """Bytes of a GGUF file before its tensors, bytes of these, and the number of their weights.

    Raises:
        SRDError: llama.cpp has no such architecture or tokenizer.
    """
    from srd_modifier.gguf.metadata import CalibrationText, Method
    from srd_modifier.gguf.mixture import FileType
    from srd_modifier.gguf.plan import head_bytes_of, plan_export
    from srd_modifier.gguf.writer import padded_bytes

    plan = plan_export(source.directory, file_type=FileType(file_type), use_importance=False, calibrated=calibrated)
    if calibrated:
        text = CalibrationText(name="the recipe's data", sha256="0" * 64, tokens=1000)
        plan = replace(plan, method=Method.OUTPUT_ERROR, calibration=text, importance={"": torch.ones(1)})
    weights = sum(entry.weights for entry in plan.entries)
    return head_bytes_of(plan), sum(padded_bytes(entry) for entry in plan.entries), weights


def _config_bytes(source: ModelSource, plan: ModulePlan, entries: Mapping[str, ResidualEntry]) -> int:
    """config.json, with the settings that quantization adds, generation_config.json and recipe.yaml."""
    config = read_model_config(source.directory)
    if plan.has_residual:
        alpha, layer_alphas = plan.alphas
        config[CONFIG_KEY] = SRDConfig(
            modules=tuple(entries),
            format=plan.format,
            alpha=alpha,
            layer_alphas=dict(layer_alphas),
            base_digest=_DIGEST,
            base_fingerprint=_DIGEST,
        ).to_dict()
    return len(json.dumps(config, indent=2)) + _QUANTIZATION_TEXT


# quantization_config of one group with a short ignore list, generation_config.json and recipe.yaml
_QUANTIZATION_TEXT = 1800
