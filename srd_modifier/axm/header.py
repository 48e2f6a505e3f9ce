"""`axm.json`, the first file of a container: what it is, and what binds the manifest to a key.

Its last field is an HMAC over all bytes before it, so that with a key nothing is parsed that has not been verified.
"""

import hashlib
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

from srd_modifier._version import __version__
from srd_modifier.axm.keys import Key
from srd_modifier.axm.layout import ALIGNMENT
from srd_modifier.axm.manifest import Manifest, ManifestFault, canonical_json, is_digest, read_object
from srd_modifier.errors import CheckpointError

FORMAT, VERSION = "srd-axm", 1
MAX_BYTES = 4096
MAX_MANIFEST_BYTES = 1 << 28
_PURPOSE = "header"
_KEY_ID = re.compile(r"[0-9a-f]{32}")
_FIELDS = ("format", "version", "tools", "alignment", "fingerprint", "manifest", "key_id", "hmac")
_TAG_START = b',"hmac":"'
_TAG_BYTES = len(_TAG_START) + 64 + len(b'"}')


@dataclass(frozen=True)
class Header:
    """The header of a container.

    Attributes:
        tools: versions of what wrote it, by name.
        fingerprint: of the manifest.
        manifest_size: bytes of `manifest.json`.
        manifest_sha256: of `manifest.json`.
        key_id: of the key that it was packed with.
        hmac: over everything else here.
    """

    tools: dict[str, str]
    fingerprint: str
    manifest_size: int
    manifest_sha256: str
    key_id: str
    hmac: str

    @classmethod
    def of(cls, manifest: Manifest, key: Key) -> "Header":
        """The header of a manifest, with its HMAC under a key."""
        encoded = manifest.encode()
        digest = hashlib.sha256(encoded).hexdigest()
        unsigned = cls({"srd-modifier": __version__}, manifest.fingerprint, len(encoded), digest, key.key_id, "0" * 64)
        tag = key.authenticate(_PURPOSE, unsigned.encode()[:-_TAG_BYTES])
        return cls(unsigned.tools, unsigned.fingerprint, len(encoded), digest, key.key_id, tag)

    def encode(self) -> bytes:
        """As it stands in the container."""
        return canonical_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "tools": self.tools,
                "alignment": ALIGNMENT,
                "fingerprint": self.fingerprint,
                "manifest": {"size": self.manifest_size, "sha256": self.manifest_sha256},
                "key_id": self.key_id,
                "hmac": self.hmac,
            }
        )


def read_header(data: bytes, key: Key | None, file: str) -> Header:
    """Read `axm.json`.

    Args:
        data: its bytes.
        key: verifies them before they are parsed; None leaves their origin open.
        file: the container's name, for errors.

    Raises:
        CheckpointError: it was changed, was packed with another key, or is of a version that is not known.
    """
    refused = key is not None and not _is_authentic(data, key)
    try:
        header = _decode(data, file)  # of one that is refused only to say why, as far as unverified bytes can
    except ManifestFault as fault:
        raise CheckpointError(f"{file}: axm.json {fault}; the container was changed") from None
    if key is None or not refused:
        return header
    if header.key_id != key.key_id:
        raise CheckpointError(
            f"{file} was packed with another key: its key id is {header.key_id}, that of the given key is {key.key_id}"
        )
    raise CheckpointError(f"{file}: axm.json does not match its HMAC; the container was changed after it was packed")


def _is_authentic(data: bytes, key: Key) -> bool:
    tag = data[-_TAG_BYTES:]
    whole = tag.startswith(_TAG_START) and tag.endswith(b'"}')
    return whole and key.is_authentic(_PURPOSE, data[:-_TAG_BYTES], tag[len(_TAG_START) : -2].decode("latin-1"))


def _decode(data: bytes, file: str) -> Header:
    values = read_object(data)
    if values.get("format") != FORMAT:
        raise ManifestFault(f"does not have the format {FORMAT!r}")
    version = values.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{file} is a container of version {version}, this srd-modifier reads version {VERSION}; upgrade it"
        )
    if version != VERSION or type(version) is not int:
        raise ManifestFault("has no valid version")
    if tuple(values) != _FIELDS or values["alignment"] != ALIGNMENT:
        raise ManifestFault("has other fields than this version writes")
    tools, manifest = values["tools"], values["manifest"]
    if not isinstance(tools, dict) or not all(map(_is_readable, chain(*tools.items()))):
        raise ManifestFault("does not say what wrote it")
    if not isinstance(manifest, dict) or tuple(manifest) != ("size", "sha256") or not _is_size(manifest["size"]):
        raise ManifestFault("does not say where the manifest is")
    digests = (manifest["sha256"], values["fingerprint"], values["hmac"])
    key_id = values["key_id"]
    if not all(map(is_digest, digests)) or not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise ManifestFault("has a digest that is none")
    header = Header(tools, values["fingerprint"], manifest["size"], manifest["sha256"], key_id, values["hmac"])
    try:
        spelled = header.encode()
    except UnicodeEncodeError:
        spelled = b""
    if spelled != data:
        raise ManifestFault("is not in its canonical spelling")
    return header


def _is_readable(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_MANIFEST_BYTES
