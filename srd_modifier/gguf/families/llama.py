"""Llama: Llama 2 and 3, TinyLlama, SmolLM 1 and 2, and whatever else says `model_type: llama`."""

from typing import Any

from torch import Tensor

from srd_modifier.gguf.families.attention import attention, feed_forward, two_norms
from srd_modifier.gguf.families.base import Family
from srd_modifier.gguf.families.rope import FACTORS, llama3_factors
from srd_modifier.gguf.families.settings import head_size

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def rope_factors(settings: Any) -> dict[str, Tensor]:
    """The factors of Llama 3's RoPE, where the model has it."""
    if settings.rope_parameters["rope_type"] != "llama3":
        return {}
    return {FACTORS: llama3_factors(settings.rope_parameters, head_size(settings))}


LLAMA = Family(
    model_types=("llama",),
    architecture="llama",
    layer=(
        *two_norms(),
        *attention(bias="attention_bias", output_bias="attention_bias", rotated=True),
        *feed_forward(bias="mlp_bias"),
    ),
    rope_types=ROPE_TYPES,
    computed=rope_factors,
)
