"""Models of real shapes with random weights, written once per run."""

import shutil
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TINY_LLAMA = REPOSITORY / "examples" / "tiny-llama"


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 49152


# W4A16 in groups of 64, which divide 576 as groups of 128 do not
SCHEME = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
        }
    },
    "ignore": ["lm_head"],
}

SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3),
    # widths in whole blocks of the K-quants, as nearly all larger models have them
    "llama-132m": Shape(15, 768, 2048, 12, 4),
    "smollm2-1.7b": Shape(24, 2048, 8192, 32, 32),
}


def write_random(name: str, directory: Path) -> Path:
    """Write a random bf16 model of one of the shapes, with tiny-llama's tokenizer, and return its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    target = directory / name
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / file, target / file)
    return target
