import random

import pytest

from srd_modifier.selection.fusion import fused_groups


def under(parent: str, *leaves: str) -> list[str]:
    return [f"{parent}.{leaf}" for leaf in leaves]


QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")

LLAMA = [
    group
    for layer in ("model.layers.0", "model.layers.1")
    for group in (
        under(f"{layer}.self_attn", *QKV),
        under(f"{layer}.self_attn", "o_proj"),
        under(f"{layer}.mlp", *GATE_UP),
        under(f"{layer}.mlp", "down_proj"),
    )
]
QWEN3_MOE = [
    group
    for layer in ("model.layers.0", "model.layers.1")
    for group in (
        under(f"{layer}.self_attn", *QKV),
        under(f"{layer}.self_attn", "o_proj"),
        *(under(f"{layer}.mlp.experts.{expert}", *GATE_UP) for expert in range(12)),
        *(under(f"{layer}.mlp.experts.{expert}", "down_proj") for expert in range(12)),
    )
]
MIXTRAL = [
    group
    for layer in ("model.layers.0", "model.layers.31")
    for group in (
        under(f"{layer}.self_attn", *QKV),
        *(under(f"{layer}.block_sparse_moe.experts.{expert}", "w1", "w3") for expert in range(8)),
        *(under(f"{layer}.block_sparse_moe.experts.{expert}", "w2") for expert in range(8)),
    )
]
SHARED_EXPERTS = [
    *(under(f"model.layers.3.mlp.experts.{expert}", *GATE_UP) for expert in range(4)),
    *(under(f"model.layers.3.mlp.experts.{expert}", "down_proj") for expert in range(4)),
    under("model.layers.3.mlp.shared_experts", *GATE_UP),
    under("model.layers.3.mlp.shared_experts", "down_proj"),
    under("model.layers.3.mlp.shared_expert", *GATE_UP),
    under("model.layers.3.mlp", *GATE_UP),
]
GEMMA = [
    # the attention and the MLPs of both towers, and what only one of them has
    under("model.language_model.layers.0.self_attn", *QKV),
    under("model.language_model.layers.0.mlp", *GATE_UP),
    under("model.language_model.layers.0.mlp", "down_proj"),
    under("model.language_model.layers.0", "per_layer_input_gate"),
    under("model.vision_tower.encoder.layers.0.self_attn", *QKV),
    under("model.vision_tower.encoder.layers.0.self_attn", "out_proj"),
    under("model.vision_tower.encoder.layers.0.mlp", "fc1"),
    under("model.vision_tower.encoder.layers.0.mlp", "fc2"),
]
OTHERS = [
    under("transformer.h.0.attn", *QKV),
    under("model.layers.0.attention", *QKV),
    under("model.layers.0.feed_forward", "w1", "w3"),
    under("model.layers.0.feed_forward", "w2"),
    under("model.layers.0.self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
    under("model.layers.0.self_attn", "q_b_proj"),
    under("model.layers.0.self_attn", "kv_b_proj"),
    under("model.layers.0.linear_attn", "in_proj_qkv", "in_proj_z"),
    under("model.layers.0.linear_attn", "in_proj_b", "in_proj_a"),
    under("model.layers.0.linear_attn", "out_proj"),
    # fused already, or of no layer
    under("model.layers.2.self_attn", "qkv_proj"),
    under("model.layers.2.mlp", "gate_up_proj"),
    ["lm_head"],
    ["q_proj", "k_proj"],
    ["experts.0.up_proj"],
    ["experts.1.up_proj"],
]
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen3-moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "shared-experts": SHARED_EXPERTS,
    "gemma": GEMMA,
    "others": OTHERS,
}


@pytest.mark.parametrize("groups", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_what_vllm_fuses_is_a_group(groups: list[list[str]]) -> None:
    assert fused_groups([name for group in groups for name in group]) == groups


@pytest.mark.parametrize("groups", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kept", [0.3, 1.0])
def test_in_any_order_and_in_part(groups: list[list[str]], kept: float) -> None:
    names = [name for group in groups for name in group]
    names = random.Random(0).sample(names, round(kept * len(names)))
    found = fused_groups(names)
    # each name once, groups by their first names, and names in the given order
    assert sorted(name for group in found for name in group) == sorted(names)
    assert [group[0] for group in found] == [name for name in names if name in {group[0] for group in found}]
    for group in found:
        assert group == [name for name in names if name in group]
    expected = [sorted(set(group) & set(names)) for group in groups]
    assert sorted(sorted(group) for group in found) == sorted(group for group in expected if group)


def test_only_keys_and_values_are_quantized() -> None:
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.v_proj"]
    assert fused_groups(names) == [[names[0], names[2]], [names[1]]]


def test_a_repeated_name_is_in_its_group_once() -> None:
    assert fused_groups(["a.up_proj", "b", "a.up_proj", "b"]) == [["a.up_proj"], ["b"]]


def test_no_names_are_no_groups() -> None:
    assert fused_groups([]) == []
