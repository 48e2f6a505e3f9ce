"""Which calibrated quantizations can be resumed."""

from typing import TYPE_CHECKING

from srd_modifier.checkpoint.locate import find_safetensors
from srd_modifier.distributed import Ranks
from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe


def why_not_resumable(model_name: str, recipe: "Recipe", ranks: Ranks) -> str | None:
    """Why a calibrated quantization cannot be resumed, or None if it can.

    A quantizer is known here if what it makes of a layer depends on that layer's weights and inputs alone, and it is
    done with the layer when it has quantized it. AutoRound hands its own inputs on from layer to layer and draws random
    numbers on the way; AWQ changes layers before it quantizes any.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from srd_modifier.modifier import SRDModifier

    if ranks.size > 1:
        return "several processes divide the work"
    other = next(
        (m for m in recipe.modifiers if type(m) not in (SRDModifier, QuantizationModifier, GPTQModifier)), None
    )
    if other is not None:
        return f"{type(other).__name__} keeps no layer as it was finished"
    own = [modifier for modifier in recipe.modifiers if isinstance(modifier, SRDModifier)]
    if not own:
        return "it has no SRDModifier, which keeps what is finished"
    if any(modifier.spool_dir for modifier in own):
        return "its spool_dir is emptied when a process starts"
    try:
        find_safetensors(model_name)
    except SRDError as error:
        return str(error)  # Transformers has a message of its own
    return None
