"""Mistral: to llama.cpp it is a Llama, whose attention has no window.

Mistral 7B 0.1 attends to the last 4096 tokens in every layer. llama.cpp attends to all of them, in every GGUF file of
that model; up to 4096 tokens that is the same.
"""

from srd_modifier.gguf.families.attention import attention, feed_forward, two_norms
from srd_modifier.gguf.families.base import Family
from srd_modifier.gguf.families.llama import ROPE_TYPES, rope_factors

MISTRAL = Family(
    model_types=("mistral",),
    architecture="llama",
    layer=(*two_norms(), *attention(rotated=True), *feed_forward()),
    rope_types=ROPE_TYPES,
    computed=rope_factors,
)
