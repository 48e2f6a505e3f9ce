"""What llama.cpp's architectures are in Transformers: names of tensors, order of rows, meaning of keys.

All of it is taken from what llama.cpp computes; none of it is shared with the export.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.reader import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"

_OUTSIDE = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3MOE = _INSIDE | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_GEMMA3 = _INSIDE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA4 = _GEMMA3 | {
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
# llama.cpp knows this model by its number of layers: its scores are divided by another width than that of its heads
_LAYERS_OF_GEMMA3_27B = 62


class Keys:
    """The keys of a file's architecture; remembers which were asked for, so that none is passed over."""

    def __init__(self, file: GGUFFile) -> None:
        prefix = f"{file.architecture}."
        self.file = file
        self._values = {
            name.removeprefix(prefix): value for name, value in file.metadata.items() if name.startswith(prefix)
        }
        self._unread = set(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default where the file does not have the key."""
        self._unread.discard(key)
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None, *, layer: int | None = None) -> int:
        """A count; of one layer where layers may differ, else they must not.

        Raises:
            CheckpointError: The file does not have it, or it is not a positive integer.
        """
        value = self.get(key, default)
        counts = value if isinstance(value, list) else [value]
        count = counts[0] if layer is None or layer >= len(counts) else counts[layer]
        if not isinstance(count, int) or count < 1 or (layer is None and counts.count(count) < len(counts)):
            raise self.error(key)
        return count

    def error(self, key: str) -> CheckpointError:
        """What to raise where the value of a key is at fault."""
        return CheckpointError(
            f"{self.file.path}: {self.file.architecture}.{key} is {self._values.get(key)!r}, which this reader cannot "
            "make a Transformers model of"
        )

    def check_all_read(self) -> None:
        """Raise CheckpointError if there is a key that nobody asked for."""
        for key in sorted(self._unread):
            raise self.error(key)


@dataclass(frozen=True)
class Family:
    """How Transformers names what llama.cpp calls an architecture, and what llama.cpp changed about its tensors.

    Attributes:
        model_type: Transformers' name.
        fields: The fields of its configuration.
        inside: Names within a layer by those of their tensors, with or without `.weight`; `*` is an expert's number.
        interleaved: Whether the rows of each head of queries and keys alternate between the two halves of RoPE.
        norm_offset: What was added to the weights of norms.
        frequencies: Transformers' buffer of the frequencies that `rope_freqs.weight` divides; None if nothing does.
    """

    model_type: str
    fields: Callable[[Keys], dict[str, Any]]
    inside: Mapping[str, str] = field(default_factory=lambda: _INSIDE)
    interleaved: bool = False
    norm_offset: float = 0.0
    frequencies: str | None = None

    def name(self, tensor: str) -> str | None:
        """The name in a Transformers checkpoint, None for a tensor that it has no place for."""
        block, _, rest = tensor.partition(".")
        if block != "blk":
            return f"lm_head.{rest}" if block == "output" else self._joined("model", tensor, _OUTSIDE)
        layer, _, within = rest.partition(".")
        return self._joined(f"model.layers.{layer}", within, self.inside)

    @staticmethod
    def _joined(place: str, tensor: str, names: Mapping[str, str]) -> str | None:
        if tensor in names:
            return f"{place}.{names[tensor]}"
        module, _, suffix = tensor.rpartition(".")
        return f"{place}.{names[module]}.{suffix}" if module in names else None


def _shared(keys: Keys, *, layer: int | None = None) -> dict[str, Any]:
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise keys.error(key)
    tensors = keys.file.tensors
    keys.get("vocab_size")  # the embedding's rows count
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length", layer=layer),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads, layer=layer),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "pad_token_id": None,
    }


def _rope(keys: Keys) -> dict[str, Any]:
    """RoPE's settings as Transformers has them."""
    base = {"rope_theta": keys.get("rope.freq_base", 10000.0)}
    factor = keys.get("rope.scaling.factor")
    kind = keys.get("rope.scaling.type", "none" if factor is None else "linear")
    keys.get("rope.scaling.finetuned")  # says where the model comes from, not what it computes
    if kind == "none":
        return {"rope_type": "default", **base}
    if kind not in ("linear", "yarn"):
        raise keys.error("rope.scaling.type")
    if not isinstance(factor, int | float) or not factor > 0:
        raise keys.error("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor, **base}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.size("rope.scaling.original_context_length"),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
        # llama.cpp multiplies with a factor of its own
        "attention_factor": keys.get("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1),
        **base,
    }


def _smollm3(keys: Keys) -> dict[str, Any]:
    return _shared(keys) | {"no_rope_layer_interval": 4}  # fixed in llama.cpp


def _experts(keys: Keys) -> dict[str, Any]:
    return {"num_experts": keys.size("expert_count"), "moe_intermediate_size": keys.size("expert_feed_forward_length")}


def _qwen3moe(keys: Keys) -> dict[str, Any]:
    own = {"num_experts_per_tok": keys.size("expert_used_count"), "norm_topk_prob": True}  # llama.cpp always does
    return _shared(keys) | _experts(keys) | own


def _window(keys: Keys) -> dict[str, Any]:
    return {
        "sliding_window": keys.size("attention.sliding_window"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": _rope(keys),
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)},
        },
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    fields = _shared(keys) | _window(keys)
    fields["sliding_window_pattern"] = keys.size("attention.sliding_window_pattern", 6)
    width = fields["head_dim"]
    if fields["num_hidden_layers"] == _LAYERS_OF_GEMMA3_27B:
        width = fields["hidden_size"] // fields["num_attention_heads"]
    return fields | {"query_pre_attn_scalar": width}


def _gemma4(keys: Keys) -> dict[str, Any]:
    """Heads and keys of layers with full attention differ from those of layers with a window."""
    sliding = keys.get("attention.sliding_window_pattern")
    if not isinstance(sliding, list) or sliding[-1:] != [False]:
        raise keys.error("attention.sliding_window_pattern")
    full, windowed = sliding.index(False), sliding.index(True) if True in sliding else 0
    fields = _shared(keys, layer=windowed) | _window(keys)
    head_dim = keys.size("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if keys.get(key, head_dim) != head_dim:
            raise keys.error(key)
    last = fields["num_hidden_layers"] - 1
    fields |= {
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
        "global_head_dim": fields["head_dim"],
        "head_dim": head_dim,
        "num_global_key_value_heads": keys.size("attention.head_count_kv", fields["num_key_value_heads"], layer=full),
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in keys.file.tensors,
        "num_kv_shared_layers": keys.get("attention.shared_kv_layers", 0),
        "intermediate_size": keys.size("feed_forward_length", layer=0),
        "use_double_wide_mlp": keys.size("feed_forward_length", layer=last) > keys.size("feed_forward_length", layer=0),
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": fields["vocab_size"],
    }
    if keys.get("expert_count", 0):
        fields |= _experts(keys) | {"enable_moe_block": True, "top_k_experts": keys.size("expert_used_count")}
    if ROPE_FACTORS not in keys.file.tensors:
        raise CheckpointError(f"{keys.file.path}: {ROPE_FACTORS} is missing, without which gemma4 has no positions")
    return fields


FAMILIES = {
    "llama": Family("llama", _shared, interleaved=True, frequencies="inv_freq"),
    "smollm3": Family("smollm3", _smollm3, interleaved=True),
    "qwen2": Family("qwen2", _shared),
    "qwen3": Family("qwen3", _shared),
    "qwen3moe": Family("qwen3_moe", _qwen3moe, _QWEN3MOE),
    "gemma3": Family("gemma3_text", _gemma3, _GEMMA3, norm_offset=1.0),
    "gemma4": Family("gemma4_text", _gemma4, _GEMMA4, frequencies="full_attention_inv_freq"),
}
