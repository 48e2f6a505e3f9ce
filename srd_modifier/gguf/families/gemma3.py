"""Gemma 3, text: norms that multiply with one plus their weight, and most layers with a sliding window."""

from typing import Any

from srd_modifier.gguf.families.attention import attention, feed_forward, head_norms
from srd_modifier.gguf.families.base import Family, Part, norm
from srd_modifier.gguf.families.settings import head_size

_LAYERS_OF_27B = 62


def _period(settings: Any) -> int | None:
    """Every how many layers attention is full; one more than there are if it never is, None for no fixed period."""
    full = [kind == "full_attention" for kind in settings.layer_types]
    period = full.index(True) + 1 if any(full) else len(full) + 1
    return period if full == [(layer + 1) % period == 0 for layer in range(len(full))] else None


def _add_window(writer: Any, settings: Any) -> None:
    writer.add_sliding_window(settings.sliding_window)
    writer.add_sliding_window_pattern(_period(settings))
    writer.add_rope_freq_base_swa(float(settings.rope_parameters["sliding_attention"]["rope_theta"]))
    if settings.final_logit_softcapping:
        writer.add_final_logit_softcapping(settings.final_logit_softcapping)


def _check(settings: Any) -> str | None:
    if not settings.sliding_window:
        return "llama.cpp computes gemma3 with a sliding window, sliding_window gives none"
    if _period(settings) is None:
        return "llama.cpp computes gemma3 with full attention in every n-th layer, layer_types says otherwise"
    if settings.attn_logit_softcapping:
        return "llama.cpp computes gemma3 without attn_logit_softcapping"
    if settings.use_bidirectional_attention:
        return "llama.cpp computes gemma3 without use_bidirectional_attention"
    scale = head_size(settings)
    if settings.num_hidden_layers == _LAYERS_OF_27B:
        scale = settings.hidden_size // settings.num_attention_heads
    if settings.query_pre_attn_scalar != scale:
        return f"llama.cpp computes gemma3 with query_pre_attn_scalar {scale}, not {settings.query_pre_attn_scalar}"
    return None


GEMMA3 = Family(
    model_types=("gemma3_text",),
    architecture="gemma3",
    outside=(Part("embed_tokens.weight", ("vocabulary", "hidden")), *norm("norm", offset=1.0)),
    layer=(
        *norm("input_layernorm", offset=1.0),
        *attention(bias="attention_bias", output_bias="attention_bias"),
        *head_norms(offset=1.0),
        *norm("post_attention_layernorm", offset=1.0),
        *norm("pre_feedforward_layernorm", offset=1.0),
        *feed_forward(),
        *norm("post_feedforward_layernorm", offset=1.0),
    ),
    activation="gelu_pytorch_tanh",
    rope_types=("default", "linear"),
    rope=lambda settings: settings.rope_parameters.get("full_attention"),
    add_own=_add_window,
    check=_check,
    windows=True,
)
