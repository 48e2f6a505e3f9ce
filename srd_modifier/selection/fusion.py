"""Which modules of a checkpoint vLLM runs as one, and which therefore get one format for their residuals.

vLLM fuses the projections that share an input into one Linear. It knows them by name, and so does this file. It also
stacks the experts of a layer, but these it gets dense if one of them has a residual: each may have a format of its own,
or none, as its use by the router deserves.
"""

from collections.abc import Sequence

_FUSED = (
    # (the names of the projections, what vLLM calls the fused one)
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    # Mixtral's names; w2 is its down_proj
    (("w1", "w3"), "gate_up_proj"),
    # DeepSeek's latent attention
    (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    # the linear attention of Qwen3.5
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    (("in_proj_b", "in_proj_a"), "in_proj_ba"),
)
_FUSED_NAME = {part: fused for parts, fused in _FUSED for part in parts}


def fused_groups(names: Sequence[str]) -> list[list[str]]:
    """The modules that vLLM fuses with each other, one group each; most groups of other modules have one member.

    Groups are in the order of their first modules, and modules in their own order. Where only some modules of a
    fused one are named, these are a group.

    >>> fused_groups(["layers.0.mlp.gate_proj", "layers.0.mlp.down_proj", "layers.0.mlp.up_proj"])
    [['layers.0.mlp.gate_proj', 'layers.0.mlp.up_proj'], ['layers.0.mlp.down_proj']]
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_fused_name(name), []).append(name)
    return list(groups.values())


def _fused_name(name: str) -> str:
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{_FUSED_NAME.get(leaf, leaf)}"
