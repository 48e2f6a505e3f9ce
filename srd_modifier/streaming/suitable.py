"""Which recipes and models can be quantized layer by layer; all others go through llm-compressor's own `oneshot`."""

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from srd_modifier.streaming.originals import Originals

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

_PACKED_BITS = (4, 8)


def why_recipe_unsuitable(recipe: "Recipe") -> str | None:
    """Why a recipe cannot be streamed, or None: it takes data, or has other modifiers than round-to-nearest.

    A reason reads well after "cannot be streamed: ".
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from srd_modifier.modifier import SRDModifier

    for modifier in recipe.modifiers:
        name = type(modifier).__name__
        if type(modifier) not in (QuantizationModifier, SRDModifier):
            return f"{name} is no round-to-nearest"
        if modifier.requires_calibration_data or getattr(modifier, "needs_inputs", False):
            return f"{name} needs calibration data"
        if getattr(modifier, "gguf", None) is not None:
            return "a GGUF file is calibrated on data"
        if getattr(modifier, "quantizes_itself", True) and not _packs_integers(modifier):
            return f"{name} saves other tensors than packed integers and their scales"
    return None


def _packs_integers(modifier: Any) -> bool:
    """Whether all that a quantizer saves is `pack-quantized`, whose tensors are laid out before they are computed."""
    from compressed_tensors.quantization import QuantizationStrategy, QuantizationType

    try:
        config = modifier.resolved_config
    except ValueError:
        return True  # it is refused with a message of its own when it is initialized
    return config.kv_cache_scheme is None and all(
        scheme.weights is not None
        and scheme.weights.type == QuantizationType.INT
        and scheme.weights.num_bits in _PACKED_BITS
        and scheme.weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        and scheme.input_activations is None
        and scheme.output_activations is None
        and scheme.format in (None, "pack-quantized")
        for scheme in config.config_groups.values()
    )


def why_model_unsuitable(model: Any, originals: Originals) -> str | None:
    """Why a model cannot be streamed, or None: llm-compressor would do more than copy and quantize its tensors.

    Args:
        model: on the meta device, before its recipe is applied.
        originals: of its files.
    """
    text_config = model.config.get_text_config()
    if originals.missing:
        return f"its files have no {originals.missing[0]}"
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return "some of its modules stay in float32"
    if getattr(text_config, "num_mtp_layers", 0) or getattr(text_config, "mtp_num_hidden_layers", 0):
        return "its layers for multi-token prediction are copied after saving"
    differing = next((names for names in originals.doubled if not _equal(originals, *names)), None)
    if differing is not None:
        return f"its files have both {differing[0]} and {differing[1]}, with other values, which its config ties"
    if _equal_embeddings(model, originals):
        return "its output head equals its embedding, and is tied to it when it is saved"
    return None


def _equal_embeddings(model: Any, originals: Originals) -> bool:
    """Whether head and embedding are two tensors of the same bytes, which llm-compressor makes one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        embedding is None
        or head is None
        or head.weight is embedding.weight
        or head.weight.shape != embedding.weight.shape
    ):
        return False
    names = {id(module): name for name, module in model.named_modules()}
    return _equal(originals, f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight")


def _equal(originals: Originals, first: str, second: str) -> bool:
    """Whether two tensors have the same bytes."""
    return all(one == other for one, other in zip_longest(originals.chunks(first), originals.chunks(second)))
