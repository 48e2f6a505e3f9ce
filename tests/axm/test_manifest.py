"""The manifest: one spelling, one order, one fingerprint."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from containers import FILES, OTHER_SECRET, compact, fingerprint, record

from srd_modifier.axm.keys import Key
from srd_modifier.axm.manifest import (
    FileRecord,
    Manifest,
    ManifestFault,
    fingerprint_of,
    in_order,
    is_digest,
    read_object,
    short_fingerprint,
)

RECORDS = [record(name, data) for name, data in FILES.items()]
GOLDEN = "a372bae6254bbd2e331eaf9d046ca13450b17a2d4f00187219916d46797bc121"


def manifest_of(records: list[dict[str, Any]]) -> Manifest:
    return Manifest(
        tuple(
            FileRecord(entry["path"], entry["size"], entry["sha256"], int(entry["crc32"], 16), entry["hmac"])
            for entry in records
        )
    )


def test_one_spelling() -> None:
    manifest = manifest_of(RECORDS)
    assert manifest.encode() == compact({"files": RECORDS})
    assert Manifest.decode(manifest.encode()) == manifest


def test_a_manifest_of_nothing() -> None:
    assert Manifest.decode(b'{"files":[]}') == Manifest(())


def test_names_in_all_scripts() -> None:
    names = sorted(['a"b.txt', "größe.json", "模型/一.gguf", "🧪.bin", "x" * 255, "/".join(['"' * 127] * 8)])
    manifest = manifest_of([record(name, name.encode()) for name in names])
    assert Manifest.decode(manifest.encode()) == manifest


def test_the_fingerprint_does_not_change() -> None:
    """It is published beside containers."""
    assert manifest_of(RECORDS).fingerprint == fingerprint(RECORDS) == GOLDEN


def test_the_fingerprint_is_that_of_paths_sizes_and_contents_alone() -> None:
    files = [(entry["path"], entry["size"], entry["sha256"]) for entry in RECORDS]
    random.Random(0).shuffle(files)
    assert fingerprint_of(files) == fingerprint(RECORDS)
    others = [record(name, data, OTHER_SECRET) for name, data in FILES.items()]
    assert manifest_of(others).fingerprint == manifest_of(RECORDS).fingerprint
    for place, changed in ((0, "other"), (1, 7), (2, "0" * 64)):
        one = list(files[0])
        one[place] = changed
        assert fingerprint_of([tuple(one), *files[1:]]) != fingerprint(RECORDS)
    assert fingerprint_of(files[1:]) != fingerprint(RECORDS)


def test_the_short_fingerprint_is_the_beginning() -> None:
    assert short_fingerprint("0123456789abcdef" + "f" * 48) == "0123-4567-89ab-cdef"


def test_the_policy_comes_first() -> None:
    assert in_order(["b", "a/b", "met.json", "Z", "a.b"]) == ["met.json", "Z", "a.b", "a/b", "b"]


def test_the_hmac_of_a_file(key: Key) -> None:
    signed = manifest_of(RECORDS).files[1]
    assert signed.is_authentic(key)
    assert FileRecord(signed.path, signed.size, signed.sha256, signed.crc32, "0" * 64).signed(key) == signed
    changed = {
        "path": FileRecord("x", signed.size, signed.sha256, signed.crc32, signed.hmac),
        "size": FileRecord(signed.path, signed.size + 1, signed.sha256, signed.crc32, signed.hmac),
        "sha256": FileRecord(signed.path, signed.size, "0" * 64, signed.crc32, signed.hmac),
    }
    assert not any(other.is_authentic(key) for other in changed.values())
    assert not signed.is_authentic(Key(OTHER_SECRET))


def text(change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
    """A manifest of changed records."""
    records = [dict(entry) for entry in RECORDS]
    change(records)
    return compact({"files": records})


def field(name: str, value: Any) -> bytes:
    return text(lambda records: records[1].update({name: value}))


FIELDS = "has a file whose fields are not path, size, sha256, crc32, hmac"
SPELLING = "is not in its canonical spelling"
PLAIN = compact({"files": RECORDS})
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", SPELLING),
    "no JSON": (b"not JSON", SPELLING),
    "no object": (b"[]", SPELLING),
    "other fields": (b'{"files":[],"more":1}', SPELLING),
    "no list": (b'{"files":{}}', SPELLING),
    "spaces": (PLAIN.replace(b",", b", ", 1), SPELLING),
    "line break at the end": (PLAIN + b"\n", SPELLING),
    "comma at the end": (PLAIN.replace(b"}]}", b"},]}"), SPELLING),
    "semicolon between": (PLAIN.replace(b"},{", b"};{"), SPELLING),
    "escaped letters": (PLAIN.replace(b"model", b"\\u006dodel"), SPELLING),
    "field twice": (PLAIN.replace(b'{"path"', b'{"path":"x","path"', 1), SPELLING),
    "no UTF-8": (
        PLAIN.replace(b"model", b"mod\xffl"),
        "names a file that is refused: 'mod\\udcffl.gguf' is not valid UTF-8",
    ),
    "half a surrogate pair": (
        PLAIN.replace(b"model", b"\\ud800"),
        "names a file that is refused: '\\ud800.gguf' is not valid UTF-8",
    ),
    "no object in the list": (b'{"files":["x"]}', FIELDS),
    "no number that JSON knows": (b'{"files":[NaN]}', SPELLING),
    "cut": (PLAIN[:-40] + b"]}", SPELLING),
    "nested": (b'{"files":[' + b"[" * 100_000 + b"]}", SPELLING),
    "field missing": (text(lambda records: records[1].pop("hmac")), FIELDS),
    "field more": (text(lambda records: records[1].update(mode=0o777)), FIELDS),
    "fields in another order": (text(lambda records: records[1].update(path=records[1].pop("path"))), FIELDS),
    "path is a number": (field("path", 1), FIELDS),
    "size is a fraction": (field("size", 204.0), "gives 'model.gguf' no valid size"),
    "size is true": (field("size", True), "gives 'model.gguf' no valid size"),
    "size is negative": (field("size", -1), "gives 'model.gguf' no valid size"),
    "size is beyond all disks": (field("size", 1 << 62), "gives 'model.gguf' no valid size"),
    "digest is short": (field("sha256", "0" * 63), "gives 'model.gguf' no valid digest"),
    "digest is in capitals": (field("sha256", "A" * 64), "gives 'model.gguf' no valid digest"),
    "digest has other digits": (field("hmac", "\u0660" * 64), "gives 'model.gguf' no valid digest"),
    "digest has a line break": (field("hmac", "0" * 64 + "\n"), "gives 'model.gguf' no valid digest"),
    "digest is null": (field("hmac", None), "gives 'model.gguf' no valid digest"),
    "checksum is short": (field("crc32", "123"), "gives 'model.gguf' no valid checksum"),
    "checksum is a number": (field("crc32", 1), "gives 'model.gguf' no valid checksum"),
    "path leads out": (field("path", "../x"), "names a file that is refused: '../x' leads out of the folder with `..`"),
    "order": (text(list.reverse), "has its files in another order than the container's"),
}


@pytest.mark.parametrize(("encoded", "fault"), FAULTS.values(), ids=FAULTS)
def test_faults(encoded: bytes, fault: str) -> None:
    with pytest.raises(ManifestFault) as error:
        Manifest.decode(encoded)
    assert str(error.value) == fault


def test_sizes_that_no_disk_has_together() -> None:
    records = [record(f"{number}", b"", size=1 << 61) for number in range(2)]
    assert Manifest.decode(compact({"files": records[:1]})).files[0].size == 1 << 61
    with pytest.raises(ManifestFault, match=r"^gives its files more bytes than any disk has$"):
        Manifest.decode(compact({"files": records}))


def test_no_more_files_than_there_can_be() -> None:
    assert len(Manifest.decode(PLAIN, most=4).files) == 4
    with pytest.raises(ManifestFault, match=r"^has more than 3 files$"):
        Manifest.decode(PLAIN, most=3)


def test_objects() -> None:
    assert read_object('{"a": [1, "ü"]}'.encode()) == {"a": [1, "ü"]}
    for data in (b"", b"{", b"\xff", b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b"[" * 100_000):
        with pytest.raises(ManifestFault, match=r"^is not JSON$"):
            read_object(data)
    with pytest.raises(ManifestFault, match=r"^is not a JSON object$"):
        read_object(b"[]")


def test_digests() -> None:
    assert is_digest("0123456789abcdef" * 4)
    assert not any(map(is_digest, ("", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n", None, 0, b"0" * 64)))
