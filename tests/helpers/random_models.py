"""Small language models with random weights, as objects and as directories with tiny-llama's tokenizer.

One seed gives one model, so that numbers which depend on the weights can be repeated.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

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


def make_mixture(*, num_experts: int) -> "Qwen3MoeForCausalLM":
    """A Qwen3 mixture of experts of two layers, two experts to a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts)).eval()


def save_model(model: "PreTrainedModel", directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a model in a dtype, with the tokenizer."""
    model.to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory
