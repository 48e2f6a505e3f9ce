"""Expected time and memory, from quantizing the first layers of the same model with made-up weights.

What a layer takes depends on kernels and on the memory's bandwidth: it is measured with the code that will run. Models
of a few depths give what is paid once and what each weight adds, and the number of weights the rest.

A model that is streamed has one decoder layer in memory at a time, whatever their number: its peak is that of the
first layers. Of one that is held whole without being calibrated the memory is not predicted. A recipe that calibrates
has a probe of its own, `calibrated`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from srd_modifier.errors import SRDError
from srd_modifier.planning.calibrated import estimate_calibrated
from srd_modifier.planning.estimate import Estimate
from srd_modifier.planning.miniature import write_miniature
from srd_modifier.planning.modules import ModulePlan
from srd_modifier.planning.programs import run_program
from srd_modifier.planning.source import ModelSource
from srd_modifier.selection.depth import count_layers, layer_of

SECONDS = 10.0
"""What the measured runs may take together, about."""

# weights of the first run, of a layer for three, two and one run: 50 to 100 million are quantized in a second
_FIRST_RUN = 35_000_000
_THREE_RUNS = 60_000_000
_TWO_RUNS = 140_000_000
_ONE_RUN = 500_000_000
_TIMEOUT = 90.0


def estimate(source: ModelSource, plan: ModulePlan, recipe: Path, *, samples: int, length: int) -> Estimate:
    """Measure short models, and what the whole one takes by them.

    Args:
        source: the model.
        plan: what the recipe does to it.
        recipe: the file.
        samples: of calibration, for a recipe that calibrates.
        length: tokens of each.

    Raises:
        SRDError: there is no estimate for this recipe, model or system; the message says why.
    """
    if plan.has_residual and plan.budget is None and any(module.residual is None for module in plan.modules):
        raise SRDError("the recipe corrects only a part of the modules, which fewer layers do not have in proportion")
    if not count_layers(module.name for module in plan.modules):
        raise SRDError("the model has no decoder layers to measure")
    if plan.calibrates:
        return estimate_calibrated(source, plan, recipe, samples=samples, length=length)
    return _estimate_rounded(source, plan, recipe)


def _estimate_rounded(source: ModelSource, plan: ModulePlan, recipe: Path) -> Estimate:
    """Draw the line through short models to the whole one."""
    if not hasattr(os, "fork"):
        raise SRDError("a process is measured in a fork, which this system does not have")
    layers = count_layers(module.name for module in plan.modules)
    inside = sum(module.weights for module in plan.modules if layer_of(module.name) is not None)
    depths = depths_to_measure(layers, inside / layers)
    with tempfile.TemporaryDirectory(prefix="srd-plan-") as folder:
        measured = _measure(source, Path(folder), depths, recipe)
    runs = measured["runs"]
    total = sum(module.weights for module in plan.modules)
    why_whole = _why_whole(source, recipe)
    return Estimate(
        seconds=seconds_at(total, runs),
        layers=depths[: len(runs)],
        peak_bytes=None if why_whole else measured["peak_bytes"],
        why_no_memory=why_whole,
    )


def depths_to_measure(layers: int, weights: float) -> tuple[int, ...]:
    """Decoder layers of the runs; fewer runs where a layer is large.

    Args:
        layers: of the model.
        weights: of one layer.

    Raises:
        SRDError: a single layer takes too long.
    """
    if weights > _ONE_RUN:
        raise SRDError(f"a decoder layer has {weights:,.0f} weights, too many for a probe of {SECONDS:g} seconds")
    first = max(1, round(_FIRST_RUN / weights))
    count = 3 if weights <= _THREE_RUNS else 2 if weights <= _TWO_RUNS else 1
    # a small model is measured whole, and where that is all there is, once
    return tuple(sorted({min(layers, first * number) for number in range(1, count + 1)}))


def seconds_at(total: int, runs: list[dict[str, Any]]) -> float:
    """The line through the runs, at a number of weights.

    Args:
        total: weights of the whole model.
        runs: `weights` and `seconds` of each, from few to many.
    """
    weights, seconds = ([float(run[name]) for run in runs] for name in ("weights", "seconds"))
    if weights[-1] == total:
        return seconds[-1]  # the model itself
    if len(runs) == 1:
        return seconds[0] * total / weights[0]
    slope, intercept = np.polyfit(weights, seconds, 1)
    return float(intercept + slope * total) if slope > 0 else max(seconds)


def _why_whole(source: ModelSource, recipe: Path) -> str | None:
    """Why the model is held whole, or None if it is streamed; of a model that is not here the recipe decides."""
    from srd_modifier.quantizing import load_recipe
    from srd_modifier.streaming.run import StreamedModel
    from srd_modifier.streaming.suitable import why_recipe_unsuitable

    loaded = load_recipe(recipe)
    if source.has_weights:
        return StreamedModel(source, loaded).unsuitable
    return why_recipe_unsuitable(loaded)


def _measure(source: ModelSource, folder: Path, depths: tuple[int, ...], recipe: Path) -> dict[str, Any]:
    models = [write_miniature(source, depth, folder / f"model-{depth}") for depth in depths]
    jobs = [{"model": str(model), "output": str(folder / f"output-{model.name}")} for model in models]
    order = {"recipe": str(recipe.absolute()), "seconds": SECONDS, "jobs": jobs}
    return run_program("srd_modifier.planning.measuring", order, folder, timeout=_TIMEOUT)
