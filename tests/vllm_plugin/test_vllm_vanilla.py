"""The same directory as ordinary W4A16: without the plugin, by request, and at alpha 0."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rtn import write_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = [[(37 * i * i + 11 * k + 5) % 4000 + 3 for i in range(48)] for k in range(4)]


@pytest.fixture(scope="module")
def engines(tiny_llama: Path, run_engine: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = write_checkpoint(tiny_llama, tmp_path_factory.mktemp("vanilla") / "checkpoint")
    starts = {
        "no plugin": {"plugin": False},
        "by request": {"quantization": "compressed-tensors"},
        "alpha 0": {"hf_overrides": {"srd_config": {"alpha": 0}}},
        "corrected": {"quantization": "srd"},
    }
    return {name: run_engine(directory, PROMPTS, tokens=8, **start) for name, start in starts.items()}


@pytest.mark.parametrize("name", ["no plugin", "by request", "alpha 0", "corrected"])
def test_every_way_serves(engines, name):
    assert engines[name].status == 0, engines[name].log[-8000:]


@pytest.mark.parametrize("name", ["by request", "alpha 0"])
def test_plain_w4_is_the_same_by_every_way(engines, name):
    """The same kernels compute it, so nothing may differ."""
    plain, found = engines["no plugin"].answers[0], engines[name].answers[0]
    assert torch.equal(found.logprobs, plain.logprobs)
    assert found.generated == plain.generated


def test_the_corrected_model_is_another(engines):
    plain, corrected = engines["no plugin"].answers[0], engines["corrected"].answers[0]
    assert (corrected.logprobs - plain.logprobs).abs().mean() > 1e-2


def test_the_plugin_is_silent_unless_it_is_asked(engines):
    assert "srd-modifier" not in engines["no plugin"].log
    assert "srd-modifier" not in engines["by request"].log
    assert "srd-modifier: no layers corrected" in engines["alpha 0"].log
    assert "srd-modifier: merge 32 layers" in engines["corrected"].log
