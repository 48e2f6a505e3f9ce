"""The parts of a decoder layer that most families share."""

from srd_modifier.gguf.families.base import Part, norm, projection


def attention(*, bias: bool | str = False, output_bias: bool | str = False, rotated: bool = False) -> tuple[Part, ...]:
    """Query, key, value and output projections; `rotated` for a RoPE that turns neighbouring rows."""
    return (
        *projection("self_attn.q_proj", ("queries", "hidden"), bias=bias, rotated=rotated),
        *projection("self_attn.k_proj", ("keys", "hidden"), bias=bias, rotated=rotated),
        *projection("self_attn.v_proj", ("keys", "hidden"), bias=bias),
        *projection("self_attn.o_proj", ("hidden", "queries"), bias=output_bias),
    )


def feed_forward(*, bias: bool | str = False) -> tuple[Part, ...]:
    """Gate, up and down projections."""
    return (
        *projection("mlp.gate_proj", ("intermediate", "hidden"), bias=bias),
        *projection("mlp.up_proj", ("intermediate", "hidden"), bias=bias),
        *projection("mlp.down_proj", ("hidden", "intermediate"), bias=bias),
    )


def two_norms() -> tuple[Part, ...]:
    """The norms before attention and before the feed-forward layer."""
    return (*norm("input_layernorm"), *norm("post_attention_layernorm"))


def head_norms(offset: float = 0.0) -> tuple[Part, ...]:
    """The norms of each query and each key."""
    return (*norm("self_attn.q_norm", "head", offset=offset), *norm("self_attn.k_norm", "head", offset=offset))
