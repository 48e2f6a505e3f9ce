from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import VOCABULARY
from torch import nn

from srd_modifier.gguf.calibration.layers import LayeredModel
from srd_modifier.gguf.families import family_of
from srd_modifier.gguf.weights import ModelWeights


def open_layered(directory: Path) -> LayeredModel:
    weights = ModelWeights.open(directory)
    return LayeredModel(weights, family_of(weights.config).tensors(weights), "cpu")


@pytest.fixture
def layered(small_model: Callable[[str], Path]) -> Callable[[str | Path], LayeredModel]:
    """A model of `small_models.CONFIGS`, or of a directory, layer by layer."""

    def get(name: str | Path) -> LayeredModel:
        return open_layered(name if isinstance(name, Path) else small_model(name))

    return get


@pytest.fixture
def whole(small_model: Callable[[str], Path]) -> Callable[[str | Path], nn.Module]:
    """The same model as Transformers loads it, the experts one by one."""

    def get(name: str | Path) -> Any:
        from transformers import AutoModelForCausalLM

        directory = name if isinstance(name, Path) else small_model(name)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
        return model.eval()

    return get


@pytest.fixture
def samples() -> list[list[int]]:
    """Token ids of three lengths, two of them longer than the windows of the models that have one."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (40, 7, 40, 23, 7)]
