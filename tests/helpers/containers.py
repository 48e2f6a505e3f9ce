"""Containers, valid and forged, by a writer of their own: the format is spelled out here a second time.

The valid one is byte for byte what `pack` makes of the same files. Everything in it can be said otherwise: names,
sizes, checksums, places, the manifest, the header; with the key or without it.
"""

import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_modifier import __version__

# printable, so that it would be seen in whatever is printed
SECRET = b"the secret of these tests, 1 2 3 4 5"
OTHER_SECRET = b"the secret of somebody else, 9 8 7 6"

# a directory that may be packed: a policy and a GGUF file, which packing does not look into
FILES = {
    "met.json": b"{}\n",
    "model.gguf": b"GGUF" + bytes(range(200)),
    "notes/about.txt": b"What this is.\n",
    "tokenizer.json": b'{"model":{}}\n',
}
# the same names and sizes
OTHER_FILES = FILES | {"model.gguf": b"GGUF" + bytes(reversed(range(200)))}

_ALIGNMENT = 4096


def write_files(directory: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """A directory of these files."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def write_secret(path: Path, secret: bytes = SECRET) -> Path:
    """A key file as `keygen` leaves it."""
    path.write_bytes(secret)
    path.chmod(0o600)
    return path


# --- keys ------------------------------------------------------------------------------------------------------------


def derived(secret: bytes, purpose: str) -> bytes:
    """The key of a purpose: RFC 5869, extract and one round of expand."""
    extracted = hmac.new(b"srd-axm", secret, "sha256").digest()
    return hmac.new(extracted, b"srd-axm/1 " + purpose.encode() + b"\x01", "sha256").digest()


def tag(secret: bytes, purpose: str, message: bytes) -> str:
    """HMAC-SHA256 under the key of a purpose."""
    return hmac.new(derived(secret, purpose), message, "sha256").hexdigest()


def key_id(secret: bytes) -> str:
    """What is public of a key."""
    return derived(secret, "key id").hex()[:32]


# --- manifest and header ---------------------------------------------------------------------------------------------


def compact(value: Any) -> bytes:
    """JSON as it stands in a container."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def record(path: str, data: bytes, secret: bytes = SECRET, *, size: int | None = None) -> dict[str, Any]:
    """A file in the manifest; `size` is another one than it has."""
    size, sha256 = len(data) if size is None else size, hashlib.sha256(data).hexdigest()
    return {
        "path": path,
        "size": size,
        "sha256": sha256,
        "crc32": f"{zlib.crc32(data):08x}",
        "hmac": tag(secret, "file", compact([path, size, sha256])),
    }


def fingerprint(records: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over paths, sizes and SHA-256."""
    lines = sorted([record["path"], record["size"], record["sha256"]] for record in records)
    return hashlib.sha256(b"srd-axm fingerprint 1\n" + compact(lines)).hexdigest()


def header(encoded: bytes, secret: bytes = SECRET, **changed: Any) -> bytes:
    """`axm.json` for an encoded manifest, with fields changed before it is authenticated."""
    try:
        known = fingerprint(json.loads(encoded)["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        known = "0" * 64
    fields = {
        "format": "srd-axm",
        "version": 1,
        "tools": {"srd-modifier": __version__},
        "alignment": _ALIGNMENT,
        "fingerprint": known,
        "manifest": {"size": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()},
        "key_id": key_id(secret),
    }
    return authenticated(compact(fields | changed), secret)


def authenticated(unsigned: bytes, secret: bytes = SECRET) -> bytes:
    """A JSON object with the HMAC over everything before it as its last field."""
    start = unsigned.removesuffix(b"}")
    return start + b',"hmac":"' + tag(secret, "header", start).encode() + b'"}'


# --- zip -------------------------------------------------------------------------------------------------------------


@dataclass
class ZipEntry:
    """An entry of a zip; None in a field is the truth.

    `name`, `start`, `extra` and `comment` are what the directory says; the local header says `local_name`, or `name`.
    """

    name: str
    data: bytes
    method: int = 0
    size: int | None = None
    packed: int | None = None
    checksum: int | None = None
    mode: int = 0o100644
    local_name: str | None = None
    start: int | None = None
    extra: bytes = b""
    comment: bytes = b""


def write_zip(
    entries: Sequence[ZipEntry],
    *,
    listed: Sequence[ZipEntry] | None = None,
    prefix: bytes = b"",
    comment: bytes = b"",
    alignment: int = _ALIGNMENT,
) -> bytes:
    """A zip of these entries, laid out as in a container; `listed` are those of its directory, in their order."""
    content = bytearray(prefix)
    starts: dict[int, int] = {}
    for entry in entries:
        starts[id(entry)] = len(content)
        name = (entry.name if entry.local_name is None else entry.local_name).encode(errors="surrogateescape")
        padding = -(len(content) + 34 + len(name)) % alignment
        extra = struct.pack("<HH", 0x5253, padding) + bytes(padding)
        content += b"PK\3\4" + struct.pack("<HHHHH", 20, 0x800, entry.method, 0, 0x21)
        content += struct.pack("<III", *_claims(entry)) + struct.pack("<HH", len(name), len(extra))
        content += name + extra + entry.data
    directory = b""
    listed = entries if listed is None else listed
    for entry in listed:
        name = entry.name.encode(errors="surrogateescape")
        start = starts[id(entry)] if entry.start is None else entry.start
        directory += b"PK\1\2" + struct.pack("<HHHHHH", 0x032D, 20, 0x800, entry.method, 0, 0x21)
        directory += struct.pack("<III", *_claims(entry))
        directory += struct.pack("<HHHHH", len(name), len(entry.extra), len(entry.comment), 0, 0)
        directory += struct.pack("<II", entry.mode << 16, start) + name + entry.extra + entry.comment
    end = struct.pack("<HHHHIIH", 0, 0, len(listed), len(listed), len(directory), len(content), len(comment))
    return bytes(content) + directory + b"PK\5\6" + end + comment


def _claims(entry: ZipEntry) -> tuple[int, int, int]:
    checksum = zlib.crc32(entry.data) if entry.checksum is None else entry.checksum
    packed = len(entry.data) if entry.packed is None else entry.packed
    return checksum, packed, len(entry.data) if entry.size is None else entry.size


# --- containers ------------------------------------------------------------------------------------------------------


def signed_entries(
    files: Mapping[str, bytes] | Sequence[tuple[str, bytes]] = FILES,
    secret: bytes = SECRET,
    *,
    records: Callable[[list[dict[str, Any]]], Any] | None = None,
    **changed: Any,
) -> list[ZipEntry]:
    """The entries of a container, whose manifest and header are those that a holder of the key would make.

    Args:
        files: in the order of the container.
        secret: of the key.
        records: changes the manifest's records before they are authenticated by the header.
        **changed: fields of the header.
    """
    pairs = list(files.items()) if isinstance(files, Mapping) else list(files)
    listed = [record(name, data, secret) for name, data in pairs]
    if records is not None:
        records(listed)
    manifest = compact({"files": listed})
    return with_manifest(manifest, pairs, secret, **changed)


def with_manifest(
    encoded: bytes, files: Iterable[tuple[str, bytes]] = tuple(FILES.items()), secret: bytes = SECRET, **changed: Any
) -> list[ZipEntry]:
    """The entries of a container with any manifest at all, authenticated by its header."""
    own = [ZipEntry("axm.json", header(encoded, secret, **changed)), ZipEntry("manifest.json", encoded)]
    return [*own, *(ZipEntry(name, data) for name, data in files)]


def container(files: Mapping[str, bytes] = FILES, secret: bytes = SECRET) -> bytes:
    """A valid container."""
    return write_zip(signed_entries(files, secret))


def same_checksum(data: bytes, like: bytes) -> bytes:
    """`data` with its last four bytes changed so that its CRC-32 is that of `like`."""
    table = [_shifted(byte) for byte in range(256)]
    tops = {value >> 24: byte for byte, value in enumerate(table)}
    state = zlib.crc32(like) ^ 0xFFFFFFFF
    for _ in range(4):  # the register, run backwards
        byte = tops[state >> 24]
        state = ((state ^ table[byte]) << 8 & 0xFFFFFFFF) | byte
    last = state ^ zlib.crc32(data[:-4]) ^ 0xFFFFFFFF
    return data[:-4] + last.to_bytes(4, "little")


def _shifted(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0xEDB88320 if byte & 1 else 0)
    return byte


# of the container of FILES, under any key
FINGERPRINT = fingerprint(record(name, data) for name, data in FILES.items())
SHORT = "-".join(FINGERPRINT[start : start + 4] for start in (0, 4, 8, 12))
