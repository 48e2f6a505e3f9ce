"""What `srd quantize` would do with a model and a recipe, in one call."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.checkpoint.writer import ResidualEntry
from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.planning.alternatives import Alternative, alternatives, total_weights
from srd_modifier.planning.estimate import Estimate
from srd_modifier.planning.files import PlannedFiles, planned_files
from srd_modifier.planning.modules import ModulePlan, PlannedModule, plan_modules
from srd_modifier.planning.probe import estimate
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import ModelSource, read_source
from srd_modifier.selection.depth import CHUNKS


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of the W4A16 model's tensors by what they are; `unquantized` is everything that stays as it is."""

    codes: int
    scales: int
    zero_points: int
    shapes: int
    unquantized: int


@dataclass(frozen=True)
class ResidualBytes:
    """Bytes of the residual's tensors by what they are."""

    codes: int
    scales: int
    masks: int


@dataclass(frozen=True)
class ChunkPlan:
    """The modules in one chunk of depth.

    Attributes:
        quantized: modules.
        corrected: those with a residual; with a budget, those that may get one.
        residual_bytes: of the residual's tensors; 0 with a budget.
    """

    quantized: int
    corrected: int
    residual_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `srd quantize` would do.

    Attributes:
        model: as it was named.
        recipe: the file.
        quantized: modules by kind, the last part of their names.
        chunks: modules and residual by chunk of depth; `outside` are modules outside the decoder layers.
        skipped: modules that stay as they are, by reason.
        base: bytes of the W4A16 model's tensors.
        residual: bytes of the residual's; None where a budget or a divergence decides.
        files: bytes of the output directory; where a budget decides, `residual` is the most that it allows, and 0 where
            a divergence does.
        budget: as the recipe has it; None without one.
        total_bytes: of the output directory; with a budget, the most that it may become; None where a divergence
            leaves it open.
        bits_per_weight: of the quantized weights; with a budget, the most that it may become; None where a divergence
            leaves it open.
        weights: that are quantized.
        all_weights: of the model.
        alternatives: the same model in other forms.
        estimate: of time and memory; None where there is no estimate.
        not_estimated: why there is none.
    """

    model: str
    recipe: str
    quantized: dict[str, int]
    chunks: dict[str, ChunkPlan]
    skipped: dict[str, int]
    base: BaseBytes
    residual: ResidualBytes | None
    files: PlannedFiles
    budget: str | None
    total_bytes: int | None
    bits_per_weight: float | None
    weights: int
    all_weights: int
    alternatives: tuple[Alternative, ...]
    estimate: Estimate | None
    not_estimated: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def plan(
    model: str, recipe_path: Path, *, probe: bool = True, num_samples: int = 512, max_seq_length: int = 512
) -> Plan:
    """Find out what `srd quantize` would do; config.json and the headers of the weights are all that is read.

    Args:
        model: a directory or hub id.
        recipe_path: a YAML recipe.
        probe: measure on shorter models what time and memory it takes.
        num_samples: of calibration, which a recipe that calibrates takes time and memory for.
        max_seq_length: tokens of each.

    Raises:
        SRDError: what `srd quantize` would refuse before it calibrates; or the hub cannot be asked.
    """
    require("llmcompressor", extra="quantize")
    from srd_modifier.quantizing import load_recipe

    recipe = load_recipe(recipe_path)
    source = read_source(model)
    planned = plan_modules(build_skeleton(source), recipe)
    weights = sum(module.weights for module in planned.modules)
    files, tensors = _files(source, planned, weights)
    bits = None if tensors is None else 8 * tensors / weights
    found, reason = None, None
    if probe:
        try:
            found = estimate(source, planned, recipe_path, samples=num_samples, length=max_seq_length)
        except MissingExtraError:
            raise
        except SRDError as error:
            reason = str(error)
    return Plan(
        model=model,
        recipe=str(recipe_path),
        quantized=dict(Counter(module.kind for module in planned.modules)),
        chunks=_chunks(planned),
        skipped=dict(Counter(planned.skipped.values())),
        base=_base_bytes(planned),
        residual=None if planned.budget is not None else _residual_bytes(planned.modules),
        files=files,
        budget=None if planned.budget is None else str(planned.budget),
        total_bytes=None if tensors is None else files.total,
        bits_per_weight=bits,
        weights=weights,
        all_weights=total_weights(source),
        alternatives=alternatives(source, planned),
        estimate=found,
        not_estimated=reason if probe else "no probe was asked for",
    )


def _files(source: ModelSource, plan: ModulePlan, weights: int) -> tuple[PlannedFiles, int | None]:
    """The files, and the bytes of the quantized modules' tensors, W4 and residual; None where a divergence decides.

    With a budget both are the most that it allows.
    """
    base = sum(module.base_bytes for module in plan.modules)
    budget = plan.budget
    if budget is None:
        entries = {m.name: ResidualEntry(*m.shape, m.residual) for m in plan.modules if m.residual is not None}
        return planned_files(source, plan, entries), base + sum(module.residual_bytes for module in plan.modules)
    # headers and settings are longest where every module is corrected, and each in another format
    formats = zip(plan.modules, cycle(plan.candidates))
    entries = {module.name: ResidualEntry(*module.shape, fmt) for module, fmt in formats}
    files = planned_files(source, plan, entries)
    header = files.residual - sum(entry.bytes() for entry in entries.values())
    if budget.bytes is not None:
        # it counts the files that hold weights
        room = budget.bytes - files.base - header
    elif budget.bits_per_weight is not None:
        room = math.floor(budget.bits_per_weight * weights / 8) - base
    else:
        return replace(files, residual=0), None
    return replace(files, residual=header + room), base + room


def _chunks(plan: ModulePlan) -> dict[str, ChunkPlan]:
    chunks = {}
    for chunk in (*CHUNKS, None):
        members = [module for module in plan.modules if module.chunk == chunk]
        corrected = [module for module in members if module.residual is not None or plan.budget is not None]
        if members:
            size = sum(module.residual_bytes for module in members)
            chunks[chunk or "outside"] = ChunkPlan(len(members), len(corrected), size)
    return chunks


def _base_bytes(plan: ModulePlan) -> BaseBytes:
    sizes: Counter[str] = Counter()
    for module in plan.modules:
        for suffix, (dtype, shape) in module.base.items():
            sizes[suffix] += dtype.itemsize * math.prod(shape)
    everything = sum(dtype.itemsize * math.prod(shape) for dtype, shape in plan.saved.values())
    return BaseBytes(
        codes=sizes["weight_packed"],
        scales=sizes["weight_scale"],
        zero_points=sizes["weight_zero_point"],
        shapes=sizes["weight_shape"],
        unquantized=everything - sum(sizes[suffix] for suffix in _PACKED),
    )


_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def _residual_bytes(modules: tuple[PlannedModule, ...]) -> ResidualBytes:
    sizes: Counter[str] = Counter()
    for module in modules:
        if module.residual is not None:
            for suffix, (dtype, shape) in module.residual.layout(*module.shape).items():
                sizes[suffix] += dtype.itemsize * math.prod(shape)
    return ResidualBytes(sizes["weight_d8"], sizes["weight_d8_scale"], sizes["weight_d8_mask"])
