import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from random_models import make_llama, save_model
from streamed import write_recipe

from srd_modifier import quantizing
from srd_modifier.streaming.run import StreamedModel


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with random bfloat16 weights: for reading only."""
    return save_model(make_llama(num_hidden_layers=4), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where that is possible: nothing here depends on a disk, and it may be slow."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def both(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path, str | None]]:
    """Quantize layer by layer and through llm-compressor's `oneshot`: both directories, and why it was not streamed."""
    reasons: list[str | None] = []
    init = StreamedModel.__init__

    def watched(self: StreamedModel, *args: Any) -> None:
        init(self, *args)
        reasons.append(self.unsuitable)

    monkeypatch.setattr(StreamedModel, "__init__", watched)

    def run(model: Path, *modifiers: tuple[str, dict[str, Any]]) -> tuple[Path, Path, str | None]:
        recipe = write_recipe(work / "recipe.yaml", *modifiers)
        quantizing.quantize(str(model), recipe, work / "streamed" / "checkpoint")
        with monkeypatch.context() as patch:
            patch.setattr(quantizing, "_STREAMED_PIPELINES", ())
            quantizing.quantize(str(model), recipe, work / "whole" / "checkpoint")
        assert [path.name for path in (work / "streamed").iterdir()] == ["checkpoint"]
        assert len(reasons) == 1, "only the first of them is to be streamed"
        return work / "streamed" / "checkpoint", work / "whole" / "checkpoint", reasons[0]

    return run
