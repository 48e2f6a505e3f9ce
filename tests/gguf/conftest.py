from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import numbered_vocabulary, write_model

from srd_modifier.gguf import plan


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of `small_models.CONFIGS` by name: for reading only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_model(name, tmp_path_factory.mktemp("small") / name)
        return made[name]

    return get


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take a vocabulary of numbers instead of a tokenizer beside the model."""

    def read(directory: Path, config: dict[str, Any], *, rows: int) -> Any:
        return numbered_vocabulary(rows)

    monkeypatch.setattr(plan, "read_vocabulary", read)
