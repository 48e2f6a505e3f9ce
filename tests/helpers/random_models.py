"""Small language models with random weights, as objects and as directories with tiny-llama's tokenizer.

One seed gives one model, so that numbers which depend on the weights can be repeated.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import (
        Gemma4ForCausalLM,
        Gemma4ForConditionalGeneration,
        LlamaForCausalLM,
        MixtralForCausalLM,
        PreTrainedModel,
        Qwen3MoeForCausalLM,
    )

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,  # that of the tokenizer
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def make_llama(*, seed: int = 0, uneven_norms: bool = False, **changes: Any) -> "LlamaForCausalLM":
    """A Llama of two layers; `changes` are to its config. Biases, if they ask for some, are random too.

    With `uneven_norms` the weights of the norms differ from column to column, as those of a trained model do, so that
    columns are not worth the same.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
        elif uneven_norms and name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.7).data.exp_()
    return model.eval()


def make_mixture(*, num_experts: int, **changes: Any) -> "Qwen3MoeForCausalLM":
    """A Qwen3 mixture of experts of two layers, two experts to a token; `changes` are to its config."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_SIZES, **experts, **changes})).eval()


def make_routed_mixture(*, vocab_size: int = 4096) -> "Qwen3MoeForCausalLM":
    """A mixture of six experts that the router uses unequally: the fifth seldom, the last one never.

    The logits of the first four are those of two vectors and their opposites, so that two of them are above 0: the last
    one's is 0, and the fifth's is a small part of the first one's. Experts answer louder to the tokens that they get,
    as trained ones do.
    """
    model = make_mixture(num_experts=6, vocab_size=vocab_size, initializer_range=0.15)
    with torch.no_grad():
        for layer in model.model.layers:
            router, experts = layer.mlp.gate.weight, layer.mlp.experts
            router[1], router[3], router[4], router[5] = -router[0], -router[2], 0.35 * router[0], 0.0
            for expert in range(5):
                gate = experts.gate_up_proj[expert, : experts.gate_up_proj.shape[1] // 2]
                gate += 0.5 * router[expert] / router[expert].norm()
    return model


_GEMMA4: dict[str, Any] = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}


def make_gemma4_mixture(**changes: Any) -> "Gemma4ForCausalLM":
    """A Gemma 4 with experts beside the MLP of each of its four layers, as the 26B-A4B has them.

    Full attention has its keys for values, sliding attention does not.
    """
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    whole = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return _make_gemma4(**whole, **experts, **changes)


def make_gemma4_e2b(**changes: Any) -> "Gemma4ForCausalLM":
    """A Gemma 4 as the E2B is: embeddings per layer, and two layers with others' keys and values and a wider MLP."""
    embeddings = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 4096}
    return _make_gemma4(**embeddings, num_kv_shared_layers=2, use_double_wide_mlp=True, **changes)


def make_gemma4_with_images() -> "Gemma4ForConditionalGeneration":
    """The mixture as the text part of a model that also takes images."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = make_gemma4_mixture()
    vision = {
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "pooling_kernel_size": 1,
        },
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
        "position_embedding_size": 64,
    }
    tokens = {"image_token_id": 4000, "boi_token_id": 4001, "eoi_token_id": 4002}
    config = Gemma4Config(text_config=text.config.to_dict(), vision_config=vision, audio_config=None, **tokens)
    model = Gemma4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model.eval()


def _make_gemma4(**settings: Any) -> "Gemma4ForCausalLM":
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**_SIZES, **_GEMMA4, "pad_token_id": 0, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the config's own would make all outputs alike
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(1.0 if "embed" in name else 1.5) / parameter.shape[-1] ** 0.5)
    return model.eval()


def make_mixtral() -> "MixtralForCausalLM":
    """A Mixtral of two layers of four experts, two to a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


def save_model(model: "PreTrainedModel", directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a model in a dtype, with the tokenizer."""
    model.to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory
