"""The smoke test of the whole export: llama.cpp generates what the file's weights, dequantized, generate in torch."""

from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA
from torch import Tensor

from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile

PROMPTS = ["The river runs", "In spring the water", "A cell is", "Energy", "She said that", "1 2 3 4 5", "Most of the"]
TOKENS = 24

# How far below the likeliest token another may be and still count as its equal, in nats: llama.cpp rounds what a
# quantized matrix multiplies to 8 bits, which torch does not.
TIE = {FileType.F32: 0.01, FileType.Q8_0: 0.1, FileType.Q4_K_M: 0.1}


def losses(model: Any, prompt: list[int], generated: list[int]) -> Tensor:
    """How far below the likeliest token each generated one is, in nats, given all that came before it."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
    return logits.amax(dim=-1) - logits[torch.arange(len(generated)), torch.tensor(generated)]


@pytest.mark.slow
@pytest.mark.parametrize("file_type", TIE, ids=lambda file_type: file_type.value)
def test_llamacpp_generates_the_tokens_of_the_dequantized_model(file_type, tmp_path):
    path = tmp_path / "tiny-llama.gguf"
    export_gguf(TINY_LLAMA, path, file_type=file_type)
    model = build_model(GGUFFile(path), torch.float32).eval()
    with LlamaCpp(path, context=128) as llama:
        prompts = [llama.tokenize(text, add_special=True) for text in PROMPTS]
        found = torch.cat([losses(model, prompt, llama.complete(prompt, TOKENS)) for prompt in prompts])
    assert len(found) == len(PROMPTS) * TOKENS
    assert found.max() < TIE[file_type]
    assert (found == 0).float().mean() > 0.95
