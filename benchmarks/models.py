"""Models of real shapes with random weights, written once per run."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

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
    "llama-7b": Shape(32, 4096, 11008, 32, 32, vocabulary=32000),
}


def write_sharded(name: str, directory: Path, *, layers: int | None = None) -> Path:
    """Write a model of one of the shapes, or its first layers, a file per layer, and return its directory.

    No more than one tensor is in memory; the weights are normal, in windows of one large random vector.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = _config(SHAPES[name], layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = directory / (name if layers is None else f"{name}-{layers}-layers")
    target.mkdir(parents=True)
    noise = torch.randn(2**27 + 2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: dict[str, dict[str, torch.Size]] = {}
    for tensor, parameter in model.named_parameters():
        part = tensor.split(".")[2] if ".layers." in tensor else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[tensor] = parameter.shape
    for number, (file, shapes) in enumerate(files.items()):
        tensors = {}
        for position, (tensor, shape) in enumerate(shapes.items()):
            start = (7919 * (16 * number + position)) % 2**20
            tensors[tensor] = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) > 1:
                tensors[tensor] = noise[start : start + shape.numel()].reshape(shape).clone()
        save_file(tensors, target / file, metadata={"format": "pt"})
    weight_map = {tensor: file for file, shapes in files.items() for tensor in shapes}
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(target)
    _copy_tokenizer(target)
    return target


def write_random(name: str, directory: Path) -> Path:
    """Write a random bf16 model of one of the shapes, with tiny-llama's tokenizer, and return its directory."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(_config(SHAPES[name]))
    finally:
        torch.set_default_dtype(default)
    target = directory / name
    model.save_pretrained(target)
    _copy_tokenizer(target)
    return target


def _config(shape: Shape, *, layers: int | None = None) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=layers or shape.layers,
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


def _copy_tokenizer(target: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / file, target / file)
