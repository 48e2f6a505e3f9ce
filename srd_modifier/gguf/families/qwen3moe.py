"""Qwen 3, mixture of experts: every feed-forward layer is a router and its experts."""

from typing import Any

from srd_modifier.gguf.families.attention import attention, head_norms, two_norms
from srd_modifier.gguf.families.base import Experts, Family, common_sizes, projection


def _sizes(settings: Any, layer: int) -> dict[str, int]:
    own = {"experts": settings.num_experts, "expert": settings.moe_intermediate_size}
    return common_sizes(settings, layer) | own


def _add_experts(writer: Any, settings: Any) -> None:
    writer.add_expert_count(settings.num_experts)
    writer.add_expert_used_count(settings.num_experts_per_tok)
    writer.add_expert_feed_forward_length(settings.moe_intermediate_size)


def _check(settings: Any) -> str | None:
    if settings.mlp_only_layers or settings.decoder_sparse_step != 1:
        return "llama.cpp computes qwen3moe with experts in every layer, not with mlp_only_layers or a sparse step"
    if not settings.norm_topk_prob:
        return "llama.cpp computes qwen3moe with norm_topk_prob: true only"
    return None


QWEN3MOE = Family(
    model_types=("qwen3_moe",),
    architecture="qwen3moe",
    layer=(
        *two_norms(),
        *attention(bias="attention_bias"),
        *head_norms(),
        *projection("mlp.gate", ("experts", "hidden")),
    ),
    experts=Experts("mlp.experts"),
    sizes=_sizes,
    add_own=_add_experts,
    check=_check,
)
