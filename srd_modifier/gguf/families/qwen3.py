"""Qwen 3, dense: a norm for each query and each key, and heads whose size is not that of the model."""

from srd_modifier.gguf.families.attention import attention, feed_forward, head_norms, two_norms
from srd_modifier.gguf.families.base import Family

QWEN3 = Family(
    model_types=("qwen3",),
    architecture="qwen3",
    layer=(*two_norms(), *attention(bias="attention_bias"), *head_norms(), *feed_forward()),
)
