"""Gemma 4, text: dense, mixture of experts beside a dense layer (26B-A4B), and embeddings per layer (E2B, E4B).

Layers with a sliding window and layers with full attention have heads of different sizes. The last layers may use
the keys and values of an earlier one, and in the large models the layers with full attention use their keys as values.
"""

import re
from typing import Any

import torch
from torch import Tensor

from srd_modifier.gguf.families.attention import feed_forward
from srd_modifier.gguf.families.base import Experts, Family, Part, norm, projection
from srd_modifier.gguf.families.rope import FACTORS

# ggml divides a frequency by its factor: the entries of a head that are not rotated get a frequency of almost nothing
_NEVER = 1e30

_KEYS_OR_VALUES = re.compile(r"layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")


def _is_full(settings: Any, layer: int) -> bool:
    return settings.layer_types[layer] == "full_attention"


def _own_keys(settings: Any, layer: int) -> bool:
    return layer < settings.num_hidden_layers - settings.num_kv_shared_layers


def _own_values(settings: Any, layer: int) -> bool:
    return _own_keys(settings, layer) and not (settings.attention_k_eq_v and _is_full(settings, layer))


def _has_experts(settings: Any, layer: int) -> bool:
    return settings.enable_moe_block


def _embeds_per_layer(settings: Any, layer: int) -> bool:
    return bool(settings.hidden_size_per_layer_input)


def _sizes(settings: Any, layer: int) -> dict[str, int]:
    own = settings.per_layer_config[layer]
    wide = settings.use_double_wide_mlp and not _own_keys(settings, layer)
    per_layer = settings.hidden_size_per_layer_input or 0
    return {
        "vocabulary": settings.vocab_size,
        "hidden": settings.hidden_size,
        "head": own.head_dim,
        "queries": settings.num_attention_heads * own.head_dim,
        "keys": own.num_key_value_heads * own.head_dim,
        "intermediate": settings.intermediate_size * (2 if wide else 1),
        "experts": (settings.num_experts or 0) if settings.enable_moe_block else 0,
        "expert": settings.moe_intermediate_size or 0,
        "per layer": per_layer,
        "all layers": per_layer * settings.num_hidden_layers,
        "vocabulary per layer": settings.vocab_size_per_layer_input,
        "one": 1,
    }


def _add_own(writer: Any, settings: Any) -> None:
    sliding = [not _is_full(settings, layer) for layer in range(settings.num_hidden_layers)]
    head = _sizes(settings, sliding.index(True) if any(sliding) else 0)["head"]
    writer.add_sliding_window(settings.sliding_window)
    writer.add_sliding_window_pattern(sliding)
    writer.add_key_length_swa(head)
    writer.add_value_length_swa(head)
    writer.add_rope_dimension_count_swa(head)
    writer.add_rope_freq_base_swa(float(settings.rope_parameters["sliding_attention"]["rope_theta"]))
    writer.add_shared_kv_layers(settings.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(settings.hidden_size_per_layer_input or 0)
    if settings.final_logit_softcapping:
        writer.add_final_logit_softcapping(settings.final_logit_softcapping)
    if settings.enable_moe_block:
        writer.add_expert_count(settings.num_experts)
        writer.add_expert_used_count(settings.top_k_experts)
        writer.add_expert_feed_forward_length(settings.moe_intermediate_size)


def _rope_factors(settings: Any) -> dict[str, Tensor]:
    """Which entries of a head the layers with full attention rotate, and how fast."""
    parameters = settings.rope_parameters["full_attention"]
    head = _sizes(settings, settings.num_hidden_layers - 1)["head"]
    factors = torch.full((head // 2,), _NEVER)
    rotated = head // 2
    if parameters["rope_type"] == "proportional":
        rotated = int(parameters.get("partial_rotary_factor", 1.0) * head // 2)
    factors[:rotated] = float(parameters.get("factor", 1.0))
    return {FACTORS: factors}


def _check(settings: Any) -> str | None:
    if not hasattr(settings, "per_layer_config"):
        return "this Transformers does not tell the sizes of gemma4's layers apart; upgrade it to 5.17"
    if not _is_full(settings, settings.num_hidden_layers - 1):
        return "llama.cpp computes gemma4 with full attention in the last layer, layer_types says otherwise"
    if settings.attention_bias:
        return "llama.cpp computes gemma4 without attention_bias"
    if settings.use_bidirectional_attention == "all":
        return "llama.cpp computes gemma4 without use_bidirectional_attention: all"
    if settings.hidden_size_per_layer_input and settings.vocab_size_per_layer_input != settings.vocab_size:
        return (
            f"llama.cpp computes gemma4 with one vocabulary, but vocab_size_per_layer_input is "
            f"{settings.vocab_size_per_layer_input} and vocab_size {settings.vocab_size}"
        )
    return None


def _is_unused(settings: Any, name: str) -> bool:
    """Keys and values of layers that use another's: some checkpoints store them, Transformers does not read them."""
    found = _KEYS_OR_VALUES.match(name)
    return found is not None and not _own_keys(settings, int(found[1]))


GEMMA4 = Family(
    model_types=("gemma4_text",),
    architecture="gemma4",
    outside=(
        Part("embed_tokens.weight", ("vocabulary", "hidden")),
        Part("embed_tokens_per_layer.weight", ("vocabulary per layer", "all layers"), expected=_embeds_per_layer),
        *projection("per_layer_model_projection", ("all layers", "hidden"), expected=_embeds_per_layer),
        *norm("per_layer_projection_norm", "per layer", expected=_embeds_per_layer),
        *norm("norm"),
    ),
    layer=(
        *norm("input_layernorm"),
        *projection("self_attn.q_proj", ("queries", "hidden")),
        *norm("self_attn.q_norm", "head"),
        *projection("self_attn.k_proj", ("keys", "hidden"), expected=_own_keys),
        *norm("self_attn.k_norm", "head", expected=_own_keys),
        *projection("self_attn.v_proj", ("keys", "hidden"), expected=_own_values),
        *projection("self_attn.o_proj", ("hidden", "queries")),
        *norm("post_attention_layernorm"),
        *norm("pre_feedforward_layernorm"),
        *feed_forward(),
        *norm("post_feedforward_layernorm"),
        *projection("router.proj", ("experts", "hidden"), expected=_has_experts),
        Part("router.scale", ("hidden",), "ffn_gate_inp.scale", expected=_has_experts),
        Part("router.per_expert_scale", ("experts",), "ffn_down_exps.scale", expected=_has_experts),
        *norm("pre_feedforward_layernorm_2", expected=_has_experts),
        *norm("post_feedforward_layernorm_1", expected=_has_experts),
        *norm("post_feedforward_layernorm_2", expected=_has_experts),
        *projection("per_layer_input_gate", ("per layer", "hidden"), expected=_embeds_per_layer),
        *projection("per_layer_projection", ("hidden", "per layer"), expected=_embeds_per_layer),
        *norm("post_per_layer_input_norm", expected=_embeds_per_layer),
        Part("layer_scalar", ("one",), "layer_output_scale.weight"),
    ),
    experts=Experts("experts", fused=True, expected=_has_experts),
    activation="gelu_pytorch_tanh",
    rope_types=("default", "proportional"),
    rope=lambda settings: settings.rope_parameters.get("full_attention"),
    sizes=_sizes,
    add_own=_add_own,
    computed=_rope_factors,
    check=_check,
    windows=True,
    unused=_is_unused,
)
