"""The files in a container as paths, so that what reads a checkpoint directory reads a container as well.

`F.axm/srd/residual.safetensors.index.json` is such a path. It can be opened, listed and joined like any other, and its
bytes can be mapped into memory from inside the container; only another library, which sees nothing but its name, cannot
open it.

The bytes are those of the open file that was verified, whatever comes to lie under its name later. Who writes into that
very file after it was verified changes what is read; nobody who is not trusted may do that.
"""

import io
import os
import stat
import sys
import threading
from collections.abc import Generator, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import find_key
from srd_modifier.axm.layout import Entry
from srd_modifier.axm.streams import Progress
from srd_modifier.errors import CheckpointError

if sys.platform == "win32":
    from pathlib import WindowsPath as _LocalPath
else:
    from pathlib import PosixPath as _LocalPath

SUFFIX = ".axm"
"""What the name of a container ends in, where it is named in the place of a model directory."""

# by the path of the root, because pathlib makes new paths out of names alone
_MOUNTED: dict[str, Container] = {}

# roots by what tells a file from all others and from itself before a change, and the key it was verified with
_VERIFIED: dict[tuple[int, int, int, int, str | None], "EntryPath"] = {}
_LOCK = threading.RLock()


def is_container(name: Any) -> bool:
    """Whether something names a file whose name ends in `.axm`; reads nothing."""
    if not isinstance(name, str | os.PathLike):
        return False
    text = os.fspath(name)
    return isinstance(text, str) and text.endswith(SUFFIX) and Path(text).is_file()


def open_root(path: Path | str, progress: Progress | None = None) -> "EntryPath":
    """The root of a container, as a directory that can be read at once and for as long as the process lives.

    Every byte is verified when a container is opened first: against its manifest, and that with the key in the
    environment if there is one. The same file is not verified again until it is changed.

    Args:
        path: the container.
        progress: called with (done, of all) in bytes while it is verified.

    Raises:
        CheckpointError: it is missing, was changed, or was packed with another key.
        SRDError: the key in the environment is none.
    """
    path, key = Path(path), find_key(None)
    key_id = None if key is None else key.key_id
    with _LOCK:  # a second thread that wants the same container waits until it is verified
        try:
            known = _VERIFIED.get((*_identity(path.stat()), key_id))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        if known is not None:
            return known
        container = Container(path, key=key)
        try:
            # taken before it is read: what is changed meanwhile is another file
            identity = _identity(os.fstat(container.descriptor))
            container.verify(progress)
        except BaseException:
            container.close()
            raise
        return _VERIFIED.setdefault((*identity, key_id), mount(container))


def mount(container: Container) -> "EntryPath":
    """The root of an open container as a directory, for as long as the process lives.

    Its path is that of the container. Where another container was mounted from the same path before, the fingerprint
    follows it, so that neither is taken for the other.

    Raises:
        ValueError: the container is not verified; its contents must not be read.
    """
    if not container.verified:
        raise ValueError(f"{container.path} is not verified")
    place = str(container.path.absolute())
    with _LOCK:
        while _MOUNTED.setdefault(place, container) is not container:
            place = f"{place}@{container.fingerprint[:16]}"
    return EntryPath(place)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class EntryPath(_LocalPath):
    """A file or folder in a mounted container."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal, as it was found when the container was verified."""
        container, entry = self._file()
        return next(record.sha256 for record in container.manifest.files if record.path == entry.name)

    @property
    def container(self) -> Container:
        """The container that it is in."""
        return self._place()[0]

    def open_extent(self) -> tuple[int, int, int]:
        """A descriptor of the container, which the caller closes, and where in it the file is: start and size."""
        container, entry = self._file()
        return os.dup(container.descriptor), entry.data, entry.size

    def open(self, mode: str = "r", buffering: int = -1, *arguments: Any, **more: Any) -> Any:
        """As `Path.open`, for reading only."""
        if mode not in ("r", "rt", "rb"):
            raise PermissionError(1, "a container cannot be written to", str(self))
        raw = _Reader(*self.open_extent())
        if mode == "rb":
            return raw if buffering == 0 else io.BufferedReader(raw)
        return io.TextIOWrapper(io.BufferedReader(raw), *arguments, **more)

    def read_bytes(self) -> bytes:
        """As `Path.read_bytes`."""
        with self.open("rb") as file:
            return bytes(file.read())

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """As `Path.read_text`."""
        with self.open("r", encoding=encoding, errors=errors, newline=newline) as file:
            return str(file.read())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and kind of the file; its times are those of the container."""
        container, entry = self._find()
        outer = os.fstat(container.descriptor)
        own = list(outer)
        own[stat.ST_MODE] = stat.S_IFREG | 0o444 if entry is not None else stat.S_IFDIR | 0o555
        own[stat.ST_SIZE] = entry.size if entry is not None else 0
        if entry is not None:
            own[stat.ST_INO] = -entry.data  # no other file on this device has such a number
        times = ("st_atime", "st_mtime", "st_ctime", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")
        return os.stat_result(own, {name: getattr(outer, name) for name in times})

    def lstat(self) -> os.stat_result:
        """As `stat`: a container holds no links."""
        return self.stat()

    def exists(self, **options: Any) -> bool:
        """Whether there is such a file or folder."""
        try:
            self._find()
        except FileNotFoundError:
            return False
        return True

    def is_file(self, **options: Any) -> bool:
        """Whether it is a file."""
        return self.exists() and stat.S_ISREG(self.stat().st_mode)

    def is_dir(self, **options: Any) -> bool:
        """Whether it is a folder."""
        return self.exists() and stat.S_ISDIR(self.stat().st_mode)

    def is_symlink(self) -> bool:
        """Never: a container holds no links."""
        return False

    def iterdir(self) -> Generator["EntryPath", None, None]:
        """What is in the folder, in the order of the names."""
        container, entry = self._find()
        if entry is not None:
            raise NotADirectoryError(20, "it is a file of the container", str(self))
        prefix = self._place()[1]
        above = f"{prefix}/" if prefix else ""
        names = [
            record.path.removeprefix(above) for record in container.manifest.files if record.path.startswith(above)
        ]
        for name in sorted({name.split("/")[0] for name in names}):
            yield EntryPath(f"{self}/{name}")

    def glob(self, pattern: str, **options: Any) -> Iterator["EntryPath"]:  # type: ignore[override]
        """What is in the folder and has a name that matches; patterns with folders are not known here."""
        if "/" in pattern:
            raise NotImplementedError(f"{pattern!r}: a pattern with folders")
        return (path for path in self._children() if fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str, **options: Any) -> Iterator["EntryPath"]:  # type: ignore[override]
        """As `glob`, in this folder and all below it."""
        for path in self._children():
            if fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)

    def _children(self) -> list["EntryPath"]:
        return list(self.iterdir()) if self.is_dir() else []

    def resolve(self, strict: bool = False) -> "EntryPath":
        """Itself."""
        return self

    def absolute(self) -> "EntryPath":
        """Itself."""
        return self

    def _place(self) -> tuple[Container, str]:
        name = str(self)
        for path in (name, *map(str, self.parents)):
            if path in _MOUNTED:
                return _MOUNTED[path], name[len(path) + 1 :].replace(os.sep, "/")
        raise FileNotFoundError(2, "no container is mounted there", name)

    def _find(self) -> tuple[Container, Entry | None]:
        """Container and entry, None for a folder."""
        container, name = self._place()
        entry = container.entry(name) if name else None
        if (
            name
            and entry is None
            and not any(record.path.startswith(f"{name}/") for record in container.manifest.files)
        ):
            raise FileNotFoundError(2, "the container has no such file", str(self))
        return container, entry

    def _file(self) -> tuple[Container, Entry]:
        container, entry = self._find()
        if entry is None:
            raise IsADirectoryError(21, "it is a folder of the container", str(self))
        return container, entry


class _Reader(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        count = os.preadv(self._descriptor, [wanted], self._start + self._at) if wanted else 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
