"""Qwen 2 and 2.5: biases on queries, keys and values."""

from srd_modifier.gguf.families.attention import attention, feed_forward, two_norms
from srd_modifier.gguf.families.base import Family

QWEN2 = Family(
    model_types=("qwen2",),
    architecture="qwen2",
    layer=(*two_norms(), *attention(bias=True), *feed_forward()),
)
