"""`axm.json`: authenticated before it is parsed, and no other spelling of it accepted."""

from typing import Any

import pytest
from containers import (
    FILES,
    OTHER_SECRET,
    SECRET,
    authenticated,
    compact,
    fingerprint,
    key_id,
    record,
    signed_entries,
)
from containers import header as header_bytes

from srd_modifier import __version__
from srd_modifier.axm.header import MAX_BYTES, Header, read_header
from srd_modifier.axm.keys import Key
from srd_modifier.axm.manifest import Manifest
from srd_modifier.errors import CheckpointError

MANIFEST = signed_entries()[1].data
HEADER = signed_entries()[0].data


def test_the_header_of_a_manifest(key: Key) -> None:
    header = Header.of(Manifest.decode(MANIFEST), key)
    assert header.encode() == HEADER
    assert header.tools == {"srd-modifier": __version__}
    assert header.fingerprint == fingerprint(record(name, data) for name, data in FILES.items())
    assert header.manifest_size == len(MANIFEST)
    assert header.key_id == key_id(SECRET)
    assert len(HEADER) < MAX_BYTES / 8


def test_it_is_read_with_the_key_and_without(key: Key) -> None:
    assert read_header(HEADER, key, "x.axm") == read_header(HEADER, None, "x.axm")
    assert read_header(HEADER, key, "x.axm").encode() == HEADER


def test_another_key(key: Key) -> None:
    other = header_bytes(MANIFEST, OTHER_SECRET)
    with pytest.raises(CheckpointError) as error:
        read_header(other, key, "x.axm")
    assert str(error.value) == (
        f"x.axm was packed with another key: its key id is {key_id(OTHER_SECRET)}, that of the given key is "
        f"{key_id(SECRET)}"
    )
    assert read_header(other, None, "x.axm").key_id == key_id(OTHER_SECRET)


@pytest.mark.parametrize("place", [5, 60, 200, 300, -70, -30, -1])
def test_a_change_anywhere(place: int, key: Key) -> None:
    changed = bytearray(HEADER)
    changed[place] ^= 1
    with pytest.raises(CheckpointError, match=r"the container was changed|another key"):
        read_header(bytes(changed), key, "x.axm")


def changed(**fields: Any) -> bytes:
    return header_bytes(MANIFEST, **fields)


FIELDS = "has other fields than this version writes"
MALFORMED: dict[str, tuple[bytes, str]] = {
    "no JSON": (authenticated(b'{"a"'), "is not JSON"),
    "no object": (b"[]", "is not a JSON object"),
    "nested": (b"[" * 4000, "is not JSON"),
    "format": (changed(format="zip"), "does not have the format 'srd-axm'"),
    "no format": (authenticated(b'{"version":1}'), "does not have the format 'srd-axm'"),
    "version 0": (changed(version=0), "has no valid version"),
    "version true": (changed(version=True), "has no valid version"),
    "version 1.0": (changed(version=1.0), "has no valid version"),
    "version '2'": (changed(version="2"), "has no valid version"),
    "no version": (authenticated(b'{"format":"srd-axm"}'), "has no valid version"),
    "alignment": (changed(alignment=512), FIELDS),
    "alignment 4096.0 is another spelling": (changed(alignment=4096.0), "is not in its canonical spelling"),
    "a field more": (changed(more=1), FIELDS),
    "a field less": (authenticated(b'{"format":"srd-axm","version":1}'), FIELDS),
    "tools are a list": (changed(tools=[]), "does not say what wrote it"),
    "a tool is a number": (changed(tools={"srd-modifier": 1}), "does not say what wrote it"),
    "a tool clears the terminal": (changed(tools={"x\x1b[2J": "1"}), "does not say what wrote it"),
    "half a surrogate pair": (changed(tools={"x": "\ud800"}), "is not JSON"),
    "manifest is missing": (changed(manifest=None), "does not say where the manifest is"),
    "manifest of nothing": (changed(manifest={"size": 0, "sha256": "0" * 64}), "does not say where the manifest is"),
    "manifest is huge": (changed(manifest={"size": 1 << 40, "sha256": "0" * 64}), "does not say where the manifest is"),
    "manifest is true": (changed(manifest={"size": True, "sha256": "0" * 64}), "does not say where the manifest is"),
    "manifest has more": (
        changed(manifest={"size": 1, "sha256": "0" * 64, "path": "x"}),
        "does not say where the manifest is",
    ),
    "digest of the manifest": (changed(manifest={"size": 1, "sha256": "0"}), "has a digest that is none"),
    "fingerprint": (changed(fingerprint="A" * 64), "has a digest that is none"),
    "key id": (changed(key_id="0" * 31), "has a digest that is none"),
    "key id is null": (changed(key_id=None), "has a digest that is none"),
    "spaces": (authenticated(HEADER[:-75].replace(b",", b", ", 1) + b"}"), "is not in its canonical spelling"),
    "tool twice": (
        authenticated(HEADER[:-75].replace(b'"tools":{', b'"tools":{"srd-modifier":"0",') + b"}"),
        "is not in its canonical spelling",
    ),
}


@pytest.mark.parametrize(("encoded", "fault"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(encoded: bytes, fault: str, key: Key) -> None:
    """Whether or not its HMAC is right."""
    for known in (key, None):
        with pytest.raises(CheckpointError) as error:
            read_header(encoded, known, "x.axm")
        assert str(error.value) == f"x.axm: axm.json {fault}; the container was changed"


@pytest.mark.parametrize("known", [True, False])
def test_a_version_from_the_future(known: bool, key: Key) -> None:
    for encoded in (changed(version=2), authenticated(compact({"format": "srd-axm", "version": 2, "new": []}))):
        with pytest.raises(CheckpointError) as error:
            read_header(encoded, key if known else None, "x.axm")
        assert str(error.value) == ("x.axm is a container of version 2, this srd-modifier reads version 1; upgrade it")
