"""Models and checkpoints whose policy files are tested, made once."""

from pathlib import Path

import pytest
from random_models import make_mixture, save_model
from rtn import write_checkpoint
from small_checkpoint import edit_json
from small_models import write_model

from srd_modifier.residual import ResidualFormat


@pytest.fixture(scope="session")
def dense_checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama, eight layers, as W4A16 with a dense 8-bit residual, all in groups of 64."""
    return write_checkpoint(tiny_llama, tmp_path_factory.mktemp("met") / "dense")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 mixture of ten layers with six experts, two to a token."""
    return write_model("qwen3moe", tmp_path_factory.mktemp("met") / "mixture", num_hidden_layers=10, dtype="float32")


@pytest.fixture(scope="session")
def mixture_checkpoint(mixture: Path) -> Path:
    """The mixture as W4A16 with an 8-bit residual in groups of 16: the experts have 48 columns."""
    return write_checkpoint(mixture, mixture.with_name("quantized"), group_size=16, fmt=ResidualFormat(group_size=16))


@pytest.fixture(scope="session")
def mixture_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 mixture of two layers with four experts that can be exported."""
    directory = save_model(make_mixture(num_experts=4), tmp_path_factory.mktemp("met") / "exported")
    edit_json(directory / "config.json", lambda config: config.update(norm_topk_prob=True))  # as llama.cpp computes it
    return directory
