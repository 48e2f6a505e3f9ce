"""The same model with fewer decoder layers and made-up weights: something to measure the cost of a layer on."""

import json
from pathlib import Path
from typing import Any

import torch

from srd_modifier.checkpoint.config import read_model_config
from srd_modifier.errors import SRDError
from srd_modifier.planning.skeleton import stored_dtype
from srd_modifier.planning.source import ModelSource

SMALL_VOCABULARY = 4096
"""Rows of an embedding that is not what is measured."""

_BLOCK = 2**20


def write_miniature(
    source: ModelSource, layers: int, directory: Path, *, vocabulary: int | None = SMALL_VOCABULARY
) -> Path:
    """Write a model with the first layers of another, of random weights, and a tokenizer that knows two words.

    Args:
        source: the model.
        layers: decoder layers to keep.
        directory: to make.
        vocabulary: at most so many rows of embedding and head, which are not quantized and, where the model is
            streamed, only take space; None keeps all.

    Raises:
        SRDError: Transformers cannot build such a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    config = _shortened(read_model_config(source.directory), layers, vocabulary)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        parsed = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=parsed.dtype or stored_dtype(source))
    except (OSError, ValueError, AssertionError) as error:
        raise SRDError(f"no smaller {source.name} can be made: {' '.join(str(error).split())}") from error
    model = model.to_empty(device="cpu")
    model.tie_weights()  # which the new memory is not
    _fill(model)
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    return directory


def _shortened(config: dict[str, Any], layers: int, vocabulary: int | None) -> dict[str, Any]:
    """A config.json with fewer layers and words; lists with an entry for each layer become as short."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _shortened(config["text_config"], layers, vocabulary)
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int):
        return config
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth:
            config[name] = value[:layers]
    config["num_hidden_layers"] = layers
    if vocabulary is not None:
        config["vocab_size"] = min(vocabulary, config.get("vocab_size", vocabulary))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = None
    return config


def _fill(model: torch.nn.Module) -> None:
    """Weights of the usual size, the same million over and over: drawing them all would take longer than encoding.

    They begin at another place in every tensor: a head that equals the embedding would be tied to it.
    """
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for tensor in [*model.parameters(), *model.buffers()]:
        block = block.roll(1)
        if tensor.is_floating_point():
            flat = tensor.data.view(-1)
            for start in range(0, flat.numel(), _BLOCK):
                part = flat[start : start + _BLOCK]
                part.copy_(block[: part.numel()])
        else:
            tensor.data.zero_()


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(directory)
