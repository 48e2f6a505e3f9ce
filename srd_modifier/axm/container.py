"""An `.axm` file, open for reading.

Opening it verifies every byte that is not a file's content: the header (under the key, where there is one) before it is
parsed, the manifest against the header before it is parsed, and then all that is around the files against what the
manifest says must be there. `verify` reads the files.
"""

import hashlib
import hmac
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO

from srd_modifier.axm.faults import explain, explain_without_layout
from srd_modifier.axm.header import MAX_BYTES, Header, read_header
from srd_modifier.axm.keys import Key
from srd_modifier.axm.layout import ALIGNMENT, Entry, Layout
from srd_modifier.axm.manifest import FileRecord, Manifest, ManifestFault
from srd_modifier.axm.names import HEADER, MANIFEST, MAX_FILES
from srd_modifier.axm.streams import Advance, Digests, Progress, StreamFault, digest_stream, in_parallel, read_at
from srd_modifier.errors import CheckpointError

_HEADER_BYTES = 30  # of a local header, before the name
_SIZE_AT = 22  # in it, of the size
_SPARE_FILES = 32


class Container:
    """A container whose structure is verified; the contents of its files are only after `verify`.

    Attributes:
        path: of the file.
        header: as it was packed.
        manifest: its files.
        key: verified header and manifest; None if there was none, and then nothing is known of their origin.
        size: bytes of the file.
        verified: whether every byte has been read and found right.
    """

    def __init__(self, path: Path, *, key: Key | None = None) -> None:
        """Open a container.

        Raises:
            CheckpointError: it is missing, was changed, or was packed with another key.
        """
        self.path = path
        self.key = key
        self.verified = False
        try:
            # without waiting for who would write into a pipe
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a file, expected an .axm container")
            self.size = status.st_size
            self.header, self.manifest, self.layout = self._read_structure()
        except OSError as error:
            os.close(self.descriptor)
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except BaseException:
            os.close(self.descriptor)
            raise
        self._entries = {entry.name: entry for entry in self.layout.entries}

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what is mapped from it stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the files."""
        return self.manifest.fingerprint

    def entry(self, name: str) -> Entry | None:
        """Where a file of the manifest is, None if there is none of this name."""
        return self._entries.get(name) if name not in (HEADER, MANIFEST) else None

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file, None if there is none of this name.

        Raises:
            CheckpointError: it was changed.
        """
        for record in self.manifest.files:
            if record.path == name:
                data = read_at(self.descriptor, record.size, self._entries[name].data)
                self._compare(record, Digests(hashlib.sha256(data).hexdigest(), zlib.crc32(data)))
                return data
        return None

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file and compare it with the manifest, on all cores.

        Args:
            progress: called with (done, of all) in bytes.

        Raises:
            CheckpointError: a file was changed; the message names it.
        """
        self.read_files(self.manifest.files, progress=progress)
        self.verified = True

    def read_files(
        self,
        records: Sequence[FileRecord],
        *,
        progress: Progress | None = None,
        copy_to: Callable[[FileRecord], AbstractContextManager[IO[bytes]]] | None = None,
    ) -> None:
        """Read files and compare each with its record, on all cores.

        Args:
            records: of the files.
            progress: called with (done, of all) in bytes.
            copy_to: gives the file, open for writing, that the bytes of a record are copied to; None copies nothing.

        Raises:
            CheckpointError: a file was changed; what was copied must not be used.
            OSError: a copy could not be written.
        """

        def check(number: int, advance: Advance) -> None:
            record = records[number]
            if copy_to is None:
                self._check(record, None, advance)
            else:
                with copy_to(record) as copy:
                    self._check(record, (copy.fileno(), 0), advance)

        in_parallel(check, [record.size for record in records], progress)

    def _check(self, record: FileRecord, copy_to: tuple[int, int] | None, advance: Advance) -> None:
        start = self._entries[record.path].data
        try:
            found = digest_stream(self.descriptor, start, record.size, copy_to=copy_to, advance=advance)
        except StreamFault as fault:
            raise CheckpointError(f"{self.path}: {record.path} {fault}") from None
        self._compare(record, found)

    def _compare(self, record: FileRecord, found: Digests) -> None:
        if not hmac.compare_digest(found.sha256, record.sha256) or found.crc32 != record.crc32:
            raise CheckpointError(
                f"{self.path}: {record.path} was changed after it was packed, its SHA-256 is not the manifest's"
            )

    def _read_structure(self) -> tuple[Header, Manifest, Layout]:
        encoded = self._read_header()
        header = read_header(encoded, self.key, str(self.path))
        encoded_manifest = self._read_manifest(header, len(encoded))
        try:
            # every file takes a page at least; some more, to be told what one that is truncated lacks
            manifest = Manifest.decode(encoded_manifest, most=min(MAX_FILES, self.size // ALIGNMENT + _SPARE_FILES))
        except ManifestFault as fault:
            raise CheckpointError(f"{self.path}: manifest.json {fault}") from None
        if manifest.fingerprint != header.fingerprint:
            raise CheckpointError(f"{self.path}: manifest.json has another fingerprint than axm.json")
        if self.key is not None:
            for record in manifest.files:
                if not record.is_authentic(self.key):
                    raise CheckpointError(f"{self.path}: {record.path} does not match its HMAC")
        own = [(HEADER, len(encoded)), (MANIFEST, len(encoded_manifest))]
        layout = Layout([*own, *((record.path, record.size) for record in manifest.files)])
        checksums = [zlib.crc32(encoded), zlib.crc32(encoded_manifest), *(record.crc32 for record in manifest.files)]
        if self.size != layout.size or not self._has(layout, checksums):
            raise CheckpointError(f"{self.path}: {explain(self.descriptor, self.size, layout)}")
        return header, manifest, layout

    def _read_header(self) -> bytes:
        start = read_at(self.descriptor, _HEADER_BYTES + len(HEADER), 0)
        size = int.from_bytes(start[_SIZE_AT : _SIZE_AT + 4], "little")
        whole = start.startswith(b"PK\3\4") and start.endswith(HEADER.encode()) and self.size >= ALIGNMENT + size
        if not whole or not 0 < size <= MAX_BYTES:
            raise CheckpointError(f"{self.path}: {explain_without_layout(self.descriptor, self.size)}")
        return read_at(self.descriptor, size, ALIGNMENT)

    def _read_manifest(self, header: Header, header_size: int) -> bytes:
        place = Layout([(HEADER, header_size), (MANIFEST, header.manifest_size)]).entries[1]
        if place.end > self.size:
            raise CheckpointError(
                f"{self.path}: it is truncated: it has {self.size} bytes, its manifest alone needs more"
            )
        encoded = read_at(self.descriptor, place.size, place.data)
        if not hmac.compare_digest(hashlib.sha256(encoded).hexdigest(), header.manifest_sha256):
            raise CheckpointError(
                f"{self.path}: manifest.json is not the one that axm.json was packed with; it was changed or exchanged"
            )
        return encoded

    def _has(self, layout: Layout, checksums: list[int]) -> bool:
        """Whether everything around the files is as it must be."""
        for entry, checksum in zip(layout.entries, checksums, strict=True):
            if read_at(self.descriptor, entry.data - entry.start, entry.start) != layout.local_header(entry, checksum):
                return False
        tail = layout.tail(checksums)
        return read_at(self.descriptor, len(tail), layout.central) == tail
