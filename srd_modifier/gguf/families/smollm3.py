"""SmolLM3: a Llama without positions in every fourth layer."""

from typing import Any

from srd_modifier.gguf.families.attention import attention, feed_forward, two_norms
from srd_modifier.gguf.families.base import Family

_INTERVAL = 4  # fixed in llama.cpp


def _check(settings: Any) -> str | None:
    expected = [int((layer + 1) % _INTERVAL != 0) for layer in range(settings.num_hidden_layers)]
    if list(settings.no_rope_layers)[: len(expected)] != expected:
        return f"llama.cpp leaves positions out of every {_INTERVAL}th layer of smollm3, no_rope_layers says otherwise"
    return None


SMOLLM3 = Family(
    model_types=("smollm3",),
    architecture="smollm3",
    layer=(
        *two_norms(),
        *attention(bias="attention_bias", output_bias="attention_bias", rotated=True),
        *feed_forward(bias="mlp_bias"),
    ),
    check=_check,
)
