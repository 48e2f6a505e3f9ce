import shutil
from pathlib import Path

import pytest
from small_checkpoint import DAMAGES, write_base, write_checkpoint


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


@pytest.fixture(scope="session")
def sensitive_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with a sensitivity: for reading only."""
    folder = tmp_path_factory.mktemp("sensitive")
    return write_checkpoint(folder / "checkpoint", folder / "scratch", sensitivity=DAMAGES)


@pytest.fixture
def sensitive(sensitive_template: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(sensitive_template, tmp_path / "checkpoint"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The small checkpoint as W4A16 alone."""
    write_base(tmp_path / "base")
    return tmp_path / "base"
