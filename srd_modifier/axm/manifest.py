"""What a container holds: path, size and digests of every file, in one canonical spelling.

The fingerprint is a SHA-256 over paths, sizes and SHA-256 alone. It is the same whoever packs the files, under whatever
key, and can be computed from an unpacked directory.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from srd_modifier.axm.keys import Key
from srd_modifier.axm.names import MAX_FILES, POLICY, NameFault, check_names

_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX8 = re.compile(r"[0-9a-f]{8}")
_FIELDS = ("path", "size", "sha256", "crc32", "hmac")
_PURPOSE = "file"
_START, _END = b'{"files":[', b"]}"
_MAX_RECORD_BYTES = 4096  # the longest path, every character of it escaped, and the digests
MAX_FILE_BYTES = 1 << 62


class ManifestFault(ValueError):  # noqa: N818 - what is wrong with it, in words that follow its name
    """What is wrong with a manifest, in words that follow its name."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a container.

    Attributes:
        path: relative, with `/`.
        size: in bytes.
        sha256: of its bytes, hexadecimal.
        crc32: of its bytes, for the zip.
        hmac: HMAC-SHA256 over path, size and SHA-256, hexadecimal. It is as strong as one over the bytes, and costs no
            second pass over them.
    """

    path: str
    size: int
    sha256: str
    crc32: int
    hmac: str

    def signed(self, key: Key) -> "FileRecord":
        """With the HMAC under a key."""
        return replace(self, hmac=key.authenticate(_PURPOSE, self._bound()))

    def is_authentic(self, key: Key) -> bool:
        """Whether the HMAC is the one under this key."""
        return key.is_authentic(_PURPOSE, self._bound(), self.hmac)

    def _bound(self) -> bytes:
        return canonical_json([self.path, self.size, self.sha256])


@dataclass(frozen=True)
class Manifest:
    """All files of a container but `axm.json` and itself, in the container's order."""

    files: tuple[FileRecord, ...]

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for these files."""
        return fingerprint_of((record.path, record.size, record.sha256) for record in self.files)

    def encode(self) -> bytes:
        """As it stands in the container; its length depends on paths and sizes only."""
        return canonical_json(
            {
                "files": [
                    {
                        "path": record.path,
                        "size": record.size,
                        "sha256": record.sha256,
                        "crc32": f"{record.crc32:08x}",
                        "hmac": record.hmac,
                    }
                    for record in self.files
                ]
            }
        )

    @classmethod
    def decode(cls, data: bytes, *, most: int = MAX_FILES) -> "Manifest":
        """Read what `encode` wrote.

        Args:
            data: its bytes.
            most: files that there can be; it is not read beyond them.

        Raises:
            ManifestFault: it is anything that `encode` does not write, a bad or repeated path included.
        """
        manifest = cls(tuple(_records(data, most)))
        if sum(record.size for record in manifest.files) >= MAX_FILE_BYTES:
            raise ManifestFault("gives its files more bytes than any disk has")
        try:
            check_names(record.path for record in manifest.files)
        except NameFault as fault:
            raise ManifestFault(f"names a file that is refused: {fault}") from None
        if manifest.encode() != data:
            raise ManifestFault("is not in its canonical spelling")
        if [record.path for record in manifest.files] != in_order(record.path for record in manifest.files):
            raise ManifestFault("has its files in another order than the container's")
        return manifest


def in_order(paths: Iterable[str]) -> list[str]:
    """The order of the files: the policy, then by path."""
    return sorted(paths, key=lambda path: (path != POLICY, path))


def fingerprint_of(files: Iterable[tuple[str, int, str]]) -> str:
    """The fingerprint of files, given by path, size and SHA-256 in any order."""
    lines = sorted(files)
    return hashlib.sha256(b"srd-axm fingerprint 1\n" + canonical_json(list(map(list, lines)))).hexdigest()


def short_fingerprint(fingerprint: str) -> str:
    """The first 16 digits in groups of four, for reading aloud."""
    return "-".join(fingerprint[start : start + 4] for start in range(0, 16, 4))


def canonical_json(value: Any) -> bytes:
    """JSON without spaces, in UTF-8, keys in the order they are in."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ManifestFault: it is none.
    """
    try:
        values = json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ManifestFault("is not JSON") from None
    if not isinstance(values, dict):
        raise ManifestFault("is not a JSON object")
    return values


def is_digest(value: Any) -> bool:
    """Whether a value is a SHA-256 in lower hexadecimal."""
    return isinstance(value, str) and _HEX64.fullmatch(value) is not None


def _records(data: bytes, most: int) -> Iterator[FileRecord]:
    """The records, parsed one by one: nonsense parsed whole would take many times its size in memory."""
    if not (data.startswith(_START) and data.endswith(_END)):
        raise ManifestFault("is not in its canonical spelling")
    at, count = len(_START), 0
    while at < len(data) - len(_END):
        if count == most:
            raise ManifestFault(f"has more than {most} files")
        # cut in the middle of a character, maybe, but behind this record
        piece = data[at : at + _MAX_RECORD_BYTES].decode(errors="surrogateescape")
        try:
            value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(piece)
        except (ValueError, RecursionError):
            raise ManifestFault("is not in its canonical spelling") from None
        yield _record(value)
        at += len(piece[:end].encode(errors="surrogateescape")) + len(",")
        count += 1


def _record(value: Any) -> FileRecord:
    if not isinstance(value, dict) or tuple(value) != _FIELDS or not isinstance(value["path"], str):
        raise ManifestFault(f"has a file whose fields are not {', '.join(_FIELDS)}")
    size, checksum = value["size"], value["crc32"]
    if type(size) is not int or not 0 <= size < MAX_FILE_BYTES:
        raise ManifestFault(f"gives {value['path']!r} no valid size")
    if not is_digest(value["sha256"]) or not is_digest(value["hmac"]):
        raise ManifestFault(f"gives {value['path']!r} no valid digest")
    if not isinstance(checksum, str) or not _HEX8.fullmatch(checksum):
        raise ManifestFault(f"gives {value['path']!r} no valid checksum")
    return FileRecord(value["path"], size, value["sha256"], int(checksum, 16), value["hmac"])


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
