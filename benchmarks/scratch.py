"""A folder for what a run writes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.models import REPOSITORY


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in `out/`, gone after the run: beside the repository's files, because /tmp may be memory, not a disk."""
    parent = REPOSITORY / "out"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="srd-bench-", dir=parent) as folder:
        yield Path(folder)


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
