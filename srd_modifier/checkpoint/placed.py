"""A file whose length and whose every part's place are known before the first byte is computed.

Its space is reserved at once, so that a disk which is too small is noticed at the start; parts are then written in any
order, read again to be checked, and flushed, so that a later process can go on where this one stopped.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from srd_modifier.errors import CheckpointError

_CHUNK_BYTES = 2**20


@dataclass
class PlacedFile:
    """One such file.

    Attributes:
        path: of the file.
        size: in bytes.
        holds: what is in it, for errors: "the residual".
    """

    path: Path
    size: int
    holds: str
    _descriptor: int | None = field(init=False, default=None)

    def reserve(self, *, keep: bool = False) -> None:
        """Open the file at its full length, with all its space; `keep` leaves what is written in it already.

        Raises:
            CheckpointError: there is no room, or the file cannot be made.
        """
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o644)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self.size)
            else:  # macOS: the file gets its length, but a full disk is noticed only while writing
                os.ftruncate(self._descriptor, self.size)
        except OSError as error:
            raise CheckpointError(
                f"cannot reserve {self.size} bytes for {self.holds} in {self.path.parent}: {error.strerror or error}"
            ) from error

    def write(self, chunks: Iterable[memoryview | bytes], offset: int) -> str:
        """Write bytes from `offset` on, and return their SHA-256 in hexadecimal.

        Raises:
            CheckpointError: the disk refuses.
        """
        descriptor, position, digest = self._open_descriptor(), offset, hashlib.sha256()
        try:
            for chunk in chunks:
                digest.update(chunk)
                data = memoryview(chunk)
                while data:
                    written = os.pwrite(descriptor, data, position)
                    data = data[written:]
                    position += written
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error
        # Linux then begins to write the pages out, so that the flush at the end has little left to wait for
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, position - offset, os.POSIX_FADV_DONTNEED)
        return digest.hexdigest()

    def digest(self, start: int, end: int) -> str:
        """SHA-256 of the bytes from `start` to before `end`, read from the file."""
        descriptor, digest = self._open_descriptor(), hashlib.sha256()
        for position in range(start, end, _CHUNK_BYTES):
            digest.update(os.pread(descriptor, min(_CHUNK_BYTES, end - position), position))
        return digest.hexdigest()

    def flush(self) -> None:
        """Wait until everything written is on the disk.

        Raises:
            CheckpointError: the disk refuses.
        """
        try:
            os.fsync(self._open_descriptor())
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Give the file back; harmless when done twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise CheckpointError(f"{self.path} is closed")
        return self._descriptor
