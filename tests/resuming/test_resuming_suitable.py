from pathlib import Path
from typing import Any

import pytest
from llmcompressor.recipe import Recipe
from streamed import scheme, srd, write_recipe

from srd_modifier.distributed import Ranks
from srd_modifier.quantizing import load_recipe
from srd_modifier.resuming.suitable import why_not_resumable

GPTQ = ("GPTQModifier", scheme())
SRD = ("SRDModifier", {})


def recipe(folder: Path, *modifiers: tuple[str, dict[str, Any]]) -> Recipe:
    return load_recipe(write_recipe(folder / "recipe.yaml", *modifiers))


@pytest.mark.parametrize(
    "modifiers", [(SRD, GPTQ), (("SRDModifier", srd()),), (SRD, ("QuantizationModifier", scheme()))]
)
def test_what_is_done_with_a_layer_when_it_is_quantized(
    modifiers: tuple[tuple[str, dict[str, Any]], ...], tiny_llama: Path, tmp_path: Path
) -> None:
    assert why_not_resumable(str(tiny_llama), recipe(tmp_path, *modifiers), Ranks()) is None


@pytest.mark.parametrize(
    ("modifiers", "reason"),
    [
        ((("SRDModifier", {"spool_dir": "/tmp"}), GPTQ), "its spool_dir is emptied when a process starts"),
        ((GPTQ,), "it has no SRDModifier, which keeps what is finished"),
        ((SRD, ("AutoRoundModifier", scheme())), "AutoRoundModifier keeps no layer as it was finished"),
        (
            (SRD, ("SmoothQuantModifier", {}), GPTQ),
            "SmoothQuantModifier keeps no layer as it was finished",
        ),
    ],
)
def test_what_is_not(
    modifiers: tuple[tuple[str, dict[str, Any]], ...], reason: str, tiny_llama: Path, tmp_path: Path
) -> None:
    assert why_not_resumable(str(tiny_llama), recipe(tmp_path, *modifiers), Ranks()) == reason


def test_several_processes(tiny_llama: Path, tmp_path: Path) -> None:
    ranks = Ranks()
    ranks.size = 2
    reason = why_not_resumable(str(tiny_llama), recipe(tmp_path, SRD, GPTQ), ranks)
    assert reason == "several processes divide the work"


def test_a_model_without_safetensors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    reason = why_not_resumable(str(model), recipe(tmp_path, SRD, GPTQ), Ranks())
    assert reason is not None
    assert "safetensors" in reason
