"""A model that the tests of planning share."""

from pathlib import Path

import pytest
from random_models import make_llama, save_model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of five layers that groups of 128 divide."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5}
    return save_model(make_llama(**sizes), tmp_path_factory.mktemp("models") / "llama-128")
