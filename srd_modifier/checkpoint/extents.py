"""Where the bytes of a file are: in a file of its own, or inside another one, as those of a container are.

A path with a method `open_extent` stands for a file inside another one. It must begin at a page there, so that it can
be mapped by itself. All else that is asked of it is what `pathlib.Path` offers.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Embedded(Protocol):
    """A path whose file lies inside another one."""

    def open_extent(self) -> tuple[int, int, int]:
        """A descriptor of the outer file, which the caller closes, and where the inner one is: start and size."""


@dataclass(frozen=True)
class Extent:
    """Bytes of an open file.

    Attributes:
        file: open for reading.
        start: where the bytes begin in it.
        size: how many there are.
    """

    file: FileIO
    start: int
    size: int

    def map(self, access: int) -> tuple[mmap.mmap, int]:
        """Map the bytes and no others, but for those that share the first one's page.

        Args:
            access: `mmap.ACCESS_READ` or `mmap.ACCESS_COPY`.

        Returns:
            The map, and where in it the bytes begin: 0 where pages are as small as the file's alignment.

        Raises:
            OSError: the file cannot be mapped.
        """
        before = self.start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.file.fileno(), before + self.size, access=access, offset=self.start - before)
        return mapped, before

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start` on, counted from the first of these."""
        return os.pread(self.file.fileno(), max(0, min(size, self.size - start)), self.start + start)


@contextmanager
def open_extent(path: Path) -> Iterator[Extent]:
    """Open the bytes of a file, wherever they are.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(path, Embedded):
        descriptor, start, size = path.open_extent()
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            yield Extent(file, start, size)
    else:
        with path.open("rb", buffering=0) as file:
            yield Extent(file, 0, file.seek(0, os.SEEK_END))


def as_path(path: Path | str) -> Path:
    """The path of a name; a path stays of the kind it is, which `Path(path)` would make an ordinary one."""
    return path if isinstance(path, Path) else Path(path)
