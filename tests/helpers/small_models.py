"""Small models with random weights, one for each way in which the families differ.

Sizes are those of real models scaled down. The weights are large enough for every part of the network to change what
comes out, and for outputs that are far from uniform: then a permutation or an offset that is wrong cannot hide.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.vocabulary import Vocabulary
from srd_modifier.gguf.vocabulary.vocabulary import TokenType

VOCABULARY = 160
END = VOCABULARY - 1
PROMPT = torch.randint(0, VOCABULARY - 8, (70,), generator=torch.Generator().manual_seed(3)).tolist()

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
}
_GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
_E2B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}
_MOE = {"moe_intermediate_size": 48, "num_experts": 6, "head_dim": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    # rows that no K-quant divides, as the 576 of SmolLM2-135M
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 72,
        "intermediate_size": 192,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tinyllama": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 1},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 1e4,  # spelled as before Transformers 5
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama-yarn": {"model_type": "llama", "rope_parameters": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "llama-yarn-attention": {"model_type": "llama", "rope_parameters": {**_YARN, "attention_factor": 0.7}},
    "llama-yarn-mscale": {
        "model_type": "llama",
        "rope_parameters": {**_YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
    },
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3moe": {"model_type": "qwen3_moe", **_MOE, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "gemma3": {
        **_GEMMA3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-pattern": {**_GEMMA3, "sliding_window_pattern": 3, "final_logit_softcapping": 10.0},
    "gemma4": {**_GEMMA4, "final_logit_softcapping": 10.0},
    "gemma4-moe": {**_GEMMA4, **_MOE, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4-e2b": _E2B,
}


def write_model(name: str, directory: Path, **changes: Any) -> Path:
    """Make the model and save it as Transformers does; `changes` are to its config.json."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {**COMMON, **CONFIGS[name], **changes}
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(directory)
    # as the model was described here, not as this version of Transformers describes it
    (directory / "config.json").write_text(json.dumps({"architectures": [type(model).__name__], **values}))
    return directory


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give a model weights that make its outputs peaked."""
    generator = torch.Generator().manual_seed(0)
    scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed" in name else 3.0
            parameter.normal_(0, scale / parameter.shape[-1] ** 0.5, generator=generator)
        else:
            scalars.append(parameter)
    for values in scalars:
        values.add_(0.3 * torch.randn(values.shape, generator=generator))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Save the model's tensors anew, changed."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})
    return directory


def numbered_vocabulary(rows: int) -> Vocabulary:
    """A vocabulary whose tokens are numbers, the last of which ends a text: for prompts of token ids."""
    return Vocabulary(
        model="gpt2",
        pre="default",
        tokens=tuple(f"t{number}" for number in range(rows)),
        types=(TokenType.NORMAL,) * rows,
        merges=("t 0",),
        scores=(),
        ids={"eos": rows - 1},
        add_bos=False,
        add_eos=False,
    )


def llama_cpp_log_probabilities(model: LlamaCpp, prompt: list[int]) -> Tensor:
    """What llama.cpp says of the token after the prompt, float32 `[vocabulary]`."""
    body = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "n_probs": VOCABULARY, "temperature": 0}
    answer = model._ask("POST", "/completion", body)
    result = torch.full((VOCABULARY,), torch.nan)
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        result[entry["id"]] = entry["logprob"]
    return result


@torch.no_grad()
def torch_log_probabilities(model: nn.Module, prompt: list[int], **inputs: Tensor) -> Tensor:
    """The same by Transformers."""
    return model(torch.tensor([prompt]), **inputs).logits[0, -1].float().log_softmax(-1)
