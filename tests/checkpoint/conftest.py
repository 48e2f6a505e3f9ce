import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for small_checkpoint, in whichever way pytest imports the tests

from small_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint: for reading only."""
    folder = tmp_path_factory.mktemp("small")
    return write_checkpoint(folder / "checkpoint", folder / "scratch")


@pytest.fixture(scope="session")
def other_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another model, with tensors of the same names and shapes: for reading only."""
    folder = tmp_path_factory.mktemp("other")
    return write_checkpoint(folder / "checkpoint", folder / "scratch", seed=1)


@pytest.fixture
def small(small_template: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may damage."""
    return Path(shutil.copytree(small_template, tmp_path / "checkpoint"))
