"""Expected time and memory of a recipe that calibrates, from one run of it on a few layers and a few samples.

llm-compressor then holds the whole model, and of every sample what one decoder layer hands to the next. What more
layers and more samples add is known to the byte; what a layer takes beside them while it is quantized, and what
libraries take, is measured. Each stage of the run (`stages`) has a peak of its own, which grows by what is held in that
stage, and the largest of them is the expected one. Its seconds grow with the samples or not, and with the layers.

The embedding and the head are those of the whole model: the sensitivity reads them, and saving.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier.errors import SRDError
from srd_modifier.loading import room_for_weights
from srd_modifier.planning.estimate import Estimate
from srd_modifier.planning.miniature import write_miniature
from srd_modifier.planning.modules import ModulePlan
from srd_modifier.planning.programs import run_program
from srd_modifier.planning.source import ModelSource
from srd_modifier.planning.stages import CALIBRATING, PASSES, PREPARING, QUANTIZING, SAVING, SENSITIVITY
from srd_modifier.selection.depth import count_layers, layer_of
from srd_modifier.selection.routing import is_expert

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

# about what the run quantizes, and what it calibrates on: some seconds each
_WEIGHTS = 12_000_000
_TOKENS = 2048
# weights of a layer: one of SmolLM2-1.7B has 67 million; factoring a second moment takes the third power of its width
_LAYER = 80_000_000
_TIMEOUT = 180.0

# what they take is known to grow with the weights, and with the samples only in the passes
_KNOWN = ("GPTQModifier", "QuantizationModifier", "SRDModifier")


@dataclass(frozen=True)
class Size:
    """What the cost of a calibrated quantization grows with.

    Attributes:
        weights: that are quantized.
        weight_bytes: of the files with the model's weights.
        base_bytes: of the quantized modules' tensors of W4.
        checkpoint_bytes: of what the backward pass of the sensitivity keeps of one sample, the input of every decoder
            layer; 0 without a sensitivity.
        samples: of calibration.
        sensitivity_tokens: that the sensitivity reads.
    """

    weights: float
    weight_bytes: float
    base_bytes: float
    checkpoint_bytes: float
    samples: int
    sensitivity_tokens: int


def estimate_calibrated(source: ModelSource, plan: ModulePlan, recipe: Path, *, samples: int, length: int) -> Estimate:
    """Measure a short model on few samples, and add what the whole one and all samples take more.

    Args:
        source: the model.
        plan: what the recipe does to it.
        recipe: the file.
        samples: of calibration.
        length: tokens of each.

    Raises:
        SRDError: there is no estimate for this recipe or model; the message says why.
    """
    from srd_modifier.quantizing import load_recipe

    loaded, text = load_recipe(recipe), _text_config(source)
    _refuse_unknown(plan, loaded)
    layers = count_layers(module.name for module in plan.modules)
    inside = sum(module.weights for module in plan.modules if layer_of(module.name) is not None) / layers
    if inside > _LAYER:
        raise SRDError(f"a decoder layer has {inside:,.0f} weights, too many for a probe that calibrates")
    depth = min(layers, max(1, round(_WEIGHTS / inside)))
    few = min(samples, math.ceil(_TOKENS / length))
    with tempfile.TemporaryDirectory(prefix="srd-plan-") as name:
        folder = Path(name)
        model = write_miniature(source, depth, folder / "model", vocabulary=None)
        files = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        order = {
            "recipe": str(recipe.absolute()),
            "model": str(model),
            "output": str(folder / "output"),
            "samples": few,
            "length": length,
            "vocabulary": text.vocab_size,
        }
        run = run_program("srd_modifier.planning.calibrating", order, folder, timeout=_TIMEOUT)
    weights = sum(module.weights for module in plan.modules)
    base = sum(module.base_bytes for module in plan.modules)
    tokens = _sensitivity_tokens(loaded)
    # what one layer hands to the next, in 16 bits as the weights are
    hidden = 2 * length * text.hidden_size
    kept = hidden if plan.sensitivity else 0
    whole = Size(weights, source.weight_bytes, base, layers * kept, samples, min(samples * length, tokens))
    part = run["weights"] / weights
    short = Size(run["weights"], files, part * base, depth * kept, few, min(few * length, tokens))
    why = _why_no_memory(source, plan)
    # a pass puts new activations beside old ones, whose places in the heap are free only at its end
    sample = run["cached_bytes"] / few + hidden
    peak = None if why else peak_at(whole, short, run["peaks"], sample_bytes=sample)
    if peak is None and why is None:
        why = "this system does not tell the peak of a stage"
    return Estimate(
        seconds=seconds_at(whole, short, run["seconds"]),
        layers=(depth,),
        tokens=samples * length,
        peak_bytes=peak,
        why_no_memory=why,
    )


def seconds_at(whole: Size, short: Size, seconds: Mapping[str, float]) -> float:
    """The seconds of the whole model.

    Args:
        whole: what is asked for.
        short: what was measured.
        seconds: of the measured run, by part of it.
    """
    weights = whole.weights / short.weights
    everything = whole.weight_bytes / short.weight_bytes
    return (
        seconds[PREPARING]
        + seconds[SENSITIVITY] * everything * whole.sensitivity_tokens / short.sensitivity_tokens
        + seconds[PASSES] * weights * whole.samples / short.samples
        + seconds[QUANTIZING] * weights
        + seconds[SAVING] * everything
    )


def peak_at(whole: Size, short: Size, peaks: Mapping[str, int | None], *, sample_bytes: float) -> int | None:
    """The most bytes that are resident with the whole model; None where a stage's peak is not known.

    Args:
        whole: what is asked for.
        short: what was measured.
        peaks: bytes, of the measured run's stages.
        sample_bytes: what every sample takes while the layers are calibrated.
    """
    grown = {
        PREPARING: whole.checkpoint_bytes - short.checkpoint_bytes,
        CALIBRATING: sample_bytes * (whole.samples - short.samples),
        # what is packed takes its place beside the weight: the file that it came from stays mapped
        SAVING: whole.base_bytes - short.base_bytes,
    }
    found = [peaks[stage] for stage in grown]
    known = [peak for peak in found if peak is not None]
    if len(known) < len(found):
        return None
    weights = whole.weight_bytes - short.weight_bytes
    return int(max(peak + weights + more for peak, more in zip(known, grown.values(), strict=True)))


def _refuse_unknown(plan: ModulePlan, recipe: "Recipe") -> None:
    for modifier in recipe.modifiers:
        name = type(modifier).__name__
        if name not in _KNOWN:
            raise SRDError(f"{name} calibrates in a way of its own, and what that takes a short run does not show")
    if plan.gguf is not None:
        raise SRDError("the recipe writes a GGUF file too, which needs the model's own tokenizer")
    if any(is_expert(module.name) for module in plan.modules):
        raise SRDError("the model has experts, which are copied as they become modules of their own")


def _why_no_memory(source: ModelSource, plan: ModulePlan) -> str | None:
    """Why what is held beside a layer is not known, or None."""
    if not plan.has_residual:
        return "without an SRDModifier in the recipe the C library keeps more or less of what was freed"
    if source.weight_bytes > room_for_weights():
        return "not all weights fit into the memory that is free, and those that stay on the disk come and go"
    return None


def _sensitivity_tokens(recipe: "Recipe") -> int:
    """Those of the first SRDModifier that measures it, as the model is measured once; 1 without one."""
    found = (m for m in recipe.modifiers if getattr(m, "sensitivity_method", "off") != "off")
    first: Any = next(found, None)
    return 1 if first is None else int(first.sensitivity_tokens)


def _text_config(source: ModelSource) -> Any:
    """The language model's configuration, whose fields have the same names in every architecture."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.directory).get_text_config()
