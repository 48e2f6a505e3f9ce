import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA, make_llama, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

PROSE = (
    "The river runs north through the old town and turns east below the bridge. In spring the water rises over the "
    "lower road, and the market moves to the square in front of the church. Most of the houses were built after the "
    "fire, when the council gave timber to every family that stayed.\n"
)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """Makes two-layer Llamas whose weights are large enough to disagree with another seed on every token."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return partial(make_llama, **sizes, vocab_size=64, max_position_embeddings=64, initializer_range=0.3)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (150,), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def make_directory(make_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Callable[..., Path]:
    """Writes such a model with the tokenizer of the example, under a name of choice."""

    def make(name: str = "model", *, seed: int = 0) -> Path:
        return save_model(make_model(seed=seed, vocab_size=4096), tmp_path / name, torch.float32)

    return make


@dataclass(frozen=True)
class Compressed:
    """A W4A16 directory with one packed module, and what that module must compute with."""

    directory: Path
    module: str
    original: torch.Tensor
    dequantized: torch.Tensor


@pytest.fixture
def compressed(make_directory: Callable[..., Path], edit_config: Callable[..., None]) -> Compressed:
    """Packed here by hand: value + 8 in the n-th nibble of an int32, low nibble first, a scale per 16 columns."""
    directory = make_directory("compressed")
    module = "model.layers.1.mlp.up_proj"
    weights = load_file(directory / "model.safetensors")
    original = weights.pop(f"{module}.weight")
    rows, columns = original.shape
    scale = original.view(rows, -1, 16).abs().amax(-1) / 7
    codes = (original / scale.repeat_interleave(16, dim=1)).round().long()
    packed = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for column in range(columns):
        packed[:, column // 8] |= (codes[:, column] + 8) << (4 * (column % 8))
    weights[f"{module}.weight_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    weights[f"{module}.weight_scale"] = scale
    weights[f"{module}.weight_shape"] = torch.tensor([rows, columns])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    edit_config(
        directory,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": [f"re:.*{module}$"], "weights": arguments}},
            "ignore": ["lm_head"],
        },
    )
    return Compressed(directory, module, original, codes * scale.repeat_interleave(16, dim=1))


@pytest.fixture
def edit_config() -> Callable[..., None]:
    def edit(directory: Path, **values: object) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 3)
    return path


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The example's, and the same with a BOS before every text."""
    directory, bos = tmp_path_factory.mktemp("tokenizers"), 0  # its only special token, of which it puts none
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text((TINY_LLAMA / name).read_text())
    values = json.loads((directory / "tokenizer.json").read_text())
    token = values["added_tokens"][bos]["content"]
    values["post_processor"]["single"].insert(0, {"SpecialToken": {"id": token, "type_id": 0}})
    values["post_processor"]["special_tokens"] = {token: {"id": token, "ids": [bos], "tokens": [token]}}
    (directory / "tokenizer.json").write_text(json.dumps(values))
    return {name: AutoTokenizer.from_pretrained(path) for name, path in (("none", TINY_LLAMA), ("bos", directory))}
