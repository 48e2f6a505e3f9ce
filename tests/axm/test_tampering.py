"""Every way to tamper with a container that we know, each refused with a sentence of its own.

An outsider rearranges the bytes; an insider holds the key, and makes manifest and header valid for what he wants
unpacked. Each container is given to `srd axm verify` and to `srd axm extract`, which must leave nothing anywhere.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from containers import (
    FILES,
    OTHER_FILES,
    OTHER_SECRET,
    SECRET,
    ZipEntry,
    authenticated,
    container,
    fingerprint,
    key_id,
    record,
    same_checksum,
    signed_entries,
    with_manifest,
    write_files,
    write_secret,
    write_zip,
)

from srd_modifier.axm.keys import ENVIRONMENT, Key
from srd_modifier.axm.pack import pack
from srd_modifier.axm.verification import verify

GGUF = "model.gguf"
REPLACED = "model.gguf was changed after it was packed, its SHA-256 is not the manifest's"
EXCHANGED = "manifest.json is not the one that axm.json was packed with; it was changed or exchanged"
HEADER_CHANGED = "axm.json does not match its HMAC; the container was changed after it was packed"
ANOTHER_KEY = (
    f"{{path}} was packed with another key: its key id is {key_id(OTHER_SECRET)}, "
    f"that of the given key is {key_id(SECRET)}"
)
BETWEEN = "bytes between its files or in its zip directory were changed"


@dataclass(frozen=True)
class Attack:
    """What was done to a container, its bytes then, and what must be said of it."""

    name: str
    forge: Callable[[], bytes]
    sentence: str


ATTACKS: list[Attack] = []
# these hold what the fingerprint stands for, and only a key shows that somebody else packed it
SAME_FILES = ("everything_of_somebody_else", "hmac_of_another_file")


def attack(sentence: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def add(forge: Callable[[], bytes]) -> Callable[[], bytes]:
        ATTACKS.append(Attack(forge.__name__, forge, sentence))
        return forge

    return add


def renamed(name: str, to: str) -> bytes:
    """The valid container with an entry of another name, in the directory and at the entry itself."""
    entries = signed_entries()
    entry_of(entries, name).name = to
    return write_zip(entries)


def entry_of(entries: list[ZipEntry], name: str) -> ZipEntry:
    return next(entry for entry in entries if entry.name == name)


def insider(name: str) -> bytes:
    """A container that asks for a name, and has a valid manifest and header."""
    return write_zip(signed_entries({"met.json": FILES["met.json"], name: b"evil"}))


# --- the set of the files, and their order ---------------------------------------------------------------------------


@attack(f"the entry {GGUF!r} is missing")
def missing() -> bytes:
    return write_zip([entry for entry in signed_entries() if entry.name != GGUF])


@attack(f"the entry {GGUF!r} is missing")
def missing_in_the_directory_only() -> bytes:
    entries = signed_entries()
    return write_zip(entries, listed=[entry for entry in entries if entry.name != GGUF])


@attack("axm.json is missing, so it is not an .axm container")
def missing_header() -> bytes:
    return write_zip(signed_entries()[1:])


@attack(EXCHANGED)
def missing_manifest() -> bytes:
    entries = signed_entries()
    return write_zip([entries[0], *entries[2:]])


@attack("the entry 'extra.bin' is extra, the manifest does not have it")
def extra() -> bytes:
    return write_zip([*signed_entries(), ZipEntry("extra.bin", b"more")])


@attack("the entry '.gitattributes' is extra, the manifest does not have it")
def extra_in_the_directory_only() -> bytes:
    entries = signed_entries()
    return write_zip(entries, listed=[*entries, ZipEntry(".gitattributes", b"", start=24_000)])


@attack(f"the entry {GGUF!r} is there twice")
def duplicated() -> bytes:
    return write_zip([*signed_entries(), ZipEntry(GGUF, OTHER_FILES[GGUF])])


@attack(f"the entry {GGUF!r} is there twice")
def duplicated_in_the_directory_only() -> bytes:
    entries = signed_entries()
    return write_zip(entries, listed=[*entries, entry_of(entries, GGUF)])


@attack("the entry 'axm.json' is there twice")
def duplicated_header() -> bytes:
    return write_zip([*signed_entries(), signed_entries(OTHER_FILES, OTHER_SECRET)[0]])


@attack(f"manifest.json names a file that is refused: {GGUF!r} is there twice")
def duplicated_by_an_insider() -> bytes:
    return write_zip(signed_entries([*FILES.items(), (GGUF, b"GGUF")]))


@attack("manifest.json names a file that is refused: 'MODEL.gguf' differs from 'model.gguf' only in spelling")
def the_same_but_for_case_by_an_insider() -> bytes:
    return write_zip(signed_entries([*FILES.items(), ("MODEL.gguf", b"GGUF")]))


@attack("manifest.json names a file that is refused: 'u\u0308.bin' differs from 'ü.bin' only in spelling")
def the_same_but_for_unicode_by_an_insider() -> bytes:
    return write_zip(signed_entries([("ü.bin", b"1"), ("u\u0308.bin", b"2")]))


@attack("manifest.json names a file that is refused: 'notes' is both a file and the folder of 'notes/about.txt'")
def a_file_that_is_a_folder_too_by_an_insider() -> bytes:
    return write_zip(signed_entries([*FILES.items(), ("notes", b"")]))


@attack("the entry 'model.gguf' was renamed to 'model2.gguf'")
def renamed_entry() -> bytes:
    return renamed(GGUF, "model2.gguf")


@attack("the entry 'model.gguf' was renamed to 'Model.gguf'")
def renamed_in_the_directory_only() -> bytes:
    entries = signed_entries()
    entry = entry_of(entries, GGUF)
    entry.name, entry.local_name = "Model.gguf", GGUF
    return write_zip(entries)


@attack(BETWEEN)
def renamed_at_the_entry_only() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).local_name = "../../x.gg"
    return write_zip(entries)


@attack("its entries are in another order than the manifest has them")
def reordered() -> bytes:
    entries = signed_entries()
    return write_zip([*entries[:3], entries[5], entries[4], entries[3]])


@attack("its entries are in another order than the manifest has them")
def reordered_in_the_directory_only() -> bytes:
    entries = signed_entries()
    return write_zip(entries, listed=[*entries[:3], entries[5], entries[4], entries[3]])


@attack("its entries are in another order than the manifest has them")
def names_of_two_entries_exchanged() -> bytes:
    entries = signed_entries()
    entries[3].start, entries[4].start = 12 * 4096, 8 * 4096
    return write_zip(entries)


@attack("manifest.json has its files in another order than the container's")
def reordered_by_an_insider() -> bytes:
    return write_zip(signed_entries(list(reversed(FILES.items()))))


# --- length ----------------------------------------------------------------------------------------------------------


@attack(f"it is truncated: it has {len(container()) - 1} bytes of {len(container())}")
def truncated_by_a_byte() -> bytes:
    return container()[:-1]


@attack(f"it is truncated: it has 20000 bytes of {len(container())}")
def truncated_in_the_files() -> bytes:
    return container()[:20_000]


@attack("it is truncated: it has 8200 bytes, its manifest alone needs more")
def truncated_in_the_manifest() -> bytes:
    return container()[:8200]


@attack("it is truncated: it has no zip directory")
def truncated_in_the_header() -> bytes:
    return container()[:4100]


@attack("it is empty")
def truncated_to_nothing() -> bytes:
    return b""


@attack("1 byte was appended to it")
def appended_byte() -> bytes:
    return container() + b"\n"


@attack(f"{len(container())} bytes were appended to it")
def appended_container() -> bytes:
    """Readers of zips begin at the end, and would unpack the second one."""
    return container() + container(OTHER_FILES)


@attack("1000 bytes were appended to it")
def appended_in_the_comment() -> bytes:
    return write_zip(signed_entries(), comment=bytes(1000))


@attack("the entry 'model.gguf' has 205 bytes, the manifest gives it 204")
def longer_file() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).data += b"\0"
    return write_zip(entries)


@attack("its files are not where an .axm container has them; it was packed again by another tool")
def prepended() -> bytes:
    """As a program that unpacks itself: for a zip reader it is the same zip still."""
    return write_zip(signed_entries(), prefix=b"#!/bin/sh\n".ljust(4096, b"#"))


# --- names that lead elsewhere ---------------------------------------------------------------------------------------


@attack("the entry '/tmp/srd-absolute.gguf' is an absolute path")
def absolute() -> bytes:
    return renamed(GGUF, "/tmp/srd-absolute.gguf")


@attack("the entry '../../x.gguf' leads out of the folder with `..`")
def parent_folder() -> bytes:
    return renamed(GGUF, "../../x.gguf")


@attack("the entry 'C:/x.gguf' names a drive")
def drive() -> bytes:
    return renamed(GGUF, "C:/x.gguf")


@attack(r"the entry '..\\x.gguf' has a backslash")
def backslash() -> bytes:
    return renamed(GGUF, "..\\x.gguf")


@attack(r"the entry 'x\x1b[2J.gguf' has a control character")
def control_character() -> bytes:
    """It would clear the terminal of whoever lists it."""
    return renamed(GGUF, "x\x1b[2J.gguf")


@attack(r"the entry 'model.gguf\x00.txt' has a control character")
def zero_byte() -> bytes:
    return renamed(GGUF, "model.gguf\0.txt")


@attack(r"the entry 'model\udcff.gguf' is not valid UTF-8")
def not_utf8() -> bytes:
    return renamed(GGUF, "model\udcff.gguf")


@attack("the entry '' is empty")
def no_name() -> bytes:
    return renamed(GGUF, "")


@attack("manifest.json names a file that is refused: '/tmp/srd-absolute.gguf' is an absolute path")
def absolute_by_an_insider() -> bytes:
    return insider("/tmp/srd-absolute.gguf")


@attack("manifest.json names a file that is refused: '../x.gguf' leads out of the folder with `..`")
def parent_folder_by_an_insider() -> bytes:
    return insider("../x.gguf")


@attack("manifest.json names a file that is refused: 'a/../../x.gguf' leads out of the folder with `..`")
def parent_folder_within_by_an_insider() -> bytes:
    return insider("a/../../x.gguf")


@attack("manifest.json names a file that is refused: 'c:x.gguf' names a drive")
def drive_by_an_insider() -> bytes:
    return insider("c:x.gguf")


@attack(r"manifest.json names a file that is refused: 'a\\..\\x.gguf' has a backslash")
def backslash_by_an_insider() -> bytes:
    return insider("a\\..\\x.gguf")


@attack(r"manifest.json names a file that is refused: 'x\n.gguf' has a control character")
def control_character_by_an_insider() -> bytes:
    return insider("x\n.gguf")


@attack("manifest.json names a file that is refused: './x.gguf' has an empty part or a `.`")
def this_folder_by_an_insider() -> bytes:
    return insider("./x.gguf")


@attack("manifest.json names a file that is refused: 'axm.json' is a name that the container keeps for itself")
def second_header_by_an_insider() -> bytes:
    return insider("axm.json")


@attack(f"manifest.json names a file that is refused: '{'x' * 256}' is too long")
def long_name_by_an_insider() -> bytes:
    return insider("x" * 256)


# --- entries that are no plain files ---------------------------------------------------------------------------------


@attack(f"the entry {GGUF!r} is a symbolic link")
def symlink() -> bytes:
    """The bytes of an insider's file are a path, and the directory makes a link of it."""
    entries = signed_entries(FILES | {GGUF: b"/etc/passwd"})
    entry_of(entries, GGUF).mode = 0o120777
    return write_zip(entries)


@attack(BETWEEN)
def executable() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).mode = 0o104755
    return write_zip(entries)


@attack("the entry 'tokenizer.json' overlaps the one before it")
def overlapping() -> bytes:
    """Two names for the same bytes."""
    entries = signed_entries()
    entry_of(entries, "tokenizer.json").start = 8 * 4096 - 4096 + 204
    entry_of(entries, GGUF).start = 8 * 4096 - 4096 + 204
    return write_zip(entries)


@attack("the entry 'inner.txt' overlaps the one before it")
def overlapping_within_another_file() -> bytes:
    """An entry that lies in the contents of another one, by an insider."""
    inner = write_zip([ZipEntry("inner.txt", b"hidden")], alignment=1)[:-22]
    entries = signed_entries(FILES | {GGUF: inner.ljust(8000, b"\0")})
    start = write_zip(entries).index(inner)
    return write_zip(entries, listed=[*entries, ZipEntry("inner.txt", b"hidden", start=start)])


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


HEADER = signed_entries()[0].data
BOMB_SIZE = 1 << 25
BOMB = deflated(bytes(BOMB_SIZE))


@attack(f"the entry {GGUF!r} is compressed, {len(BOMB)} bytes to {BOMB_SIZE}; a container holds its files as they are")
def zip_bomb() -> bytes:
    entries = signed_entries()
    entry = entry_of(entries, GGUF)
    entry.data, entry.method, entry.size, entry.checksum = BOMB, 8, BOMB_SIZE, zlib.crc32(bytes(BOMB_SIZE))
    return write_zip(entries)


@attack(f"the entry {GGUF!r} is compressed, 204 bytes to 4294967294; a container holds its files as they are")
def a_huge_size_is_claimed() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).size = 0xFFFFFFFE
    return write_zip(entries)


@attack(f"the entry {GGUF!r} is compressed, 204 bytes to {1 << 60}; a container holds its files as they are")
def a_huge_size_is_claimed_with_zip64() -> bytes:
    entries = signed_entries()
    entry = entry_of(entries, GGUF)
    entry.size, entry.extra = 0xFFFFFFFF, struct.pack("<HHQ", 1, 8, 1 << 60)
    return write_zip(entries)


@attack(f"the entry {GGUF!r} has 204 bytes, the manifest gives it {1 << 61}")
def a_huge_size_is_claimed_by_an_insider() -> bytes:
    def change(records: list[dict[str, Any]]) -> None:
        records[1] = record(GGUF, FILES[GGUF], size=1 << 61)

    return write_zip(signed_entries(records=change))


@attack("axm.json does not say where the manifest is; the container was changed")
def a_huge_manifest_is_claimed_by_an_insider() -> bytes:
    return write_zip(signed_entries(manifest={"size": 1 << 40, "sha256": "0" * 64}))


@attack(BETWEEN)
def zip64_where_it_is_not_needed() -> bytes:
    entries = signed_entries()
    entry = entry_of(entries, GGUF)
    entry.size = entry.packed = 0xFFFFFFFF
    entry.extra = struct.pack("<HHQQ", 1, 16, 204, 204)
    return write_zip(entries)


@attack(BETWEEN)
def comment_of_an_entry() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).comment = b"hidden"
    return write_zip(entries)


@attack(
    f"the entry 'axm.json' is compressed, {len(deflated(HEADER))} bytes to {len(HEADER)}; "
    "a container holds its files as they are"
)
def packed_again_with_compression() -> bytes:
    return repacked(zipfile.ZIP_DEFLATED)


@attack("its files are not where an .axm container has them; it was packed again by another tool")
def packed_again_without_compression() -> bytes:
    return repacked(zipfile.ZIP_STORED)


def repacked(compression: int) -> bytes:
    again = BytesIO()
    with zipfile.ZipFile(BytesIO(container())) as old, zipfile.ZipFile(again, "w", compression) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), compression)
    return again.getvalue()


@attack("it is not an .axm container")
def a_gguf_file() -> bytes:
    return FILES[GGUF]


# --- contents, manifest and header -----------------------------------------------------------------------------------


@attack(REPLACED)
def payload_with_the_same_checksum() -> bytes:
    entries = signed_entries()
    entry_of(entries, GGUF).data = same_checksum(OTHER_FILES[GGUF], FILES[GGUF])
    return write_zip(entries)


@attack(BETWEEN)
def payload_with_a_checksum_of_its_own() -> bytes:
    return write_zip([ZipEntry(entry.name, OTHER_FILES.get(entry.name, entry.data)) for entry in signed_entries()])


@attack(EXCHANGED)
def manifest_of_another_container_with_the_same_key() -> bytes:
    ours, theirs = signed_entries(), signed_entries(OTHER_FILES)
    return write_zip([ours[0], theirs[1], *ours[2:]])


@attack(EXCHANGED)
def manifest_and_files_of_another_container_with_the_same_key() -> bytes:
    return write_zip([signed_entries()[0], *signed_entries(OTHER_FILES)[1:]])


@attack(BETWEEN)
def header_and_manifest_of_another_container_with_the_same_key() -> bytes:
    return write_zip([*signed_entries(OTHER_FILES)[:2], *signed_entries()[2:]])


@attack(EXCHANGED)
def header_of_another_container_with_the_same_key() -> bytes:
    return write_zip([signed_entries(OTHER_FILES)[0], *signed_entries()[1:]])


@attack(ANOTHER_KEY)
def everything_of_somebody_else() -> bytes:
    return container(FILES, OTHER_SECRET)


@attack(HEADER_CHANGED)
def everything_of_somebody_else_under_our_key_id() -> bytes:
    return write_zip(signed_entries(OTHER_FILES, OTHER_SECRET, key_id=key_id(SECRET)))


@attack(HEADER_CHANGED)
def header_for_another_manifest_without_the_key() -> bytes:
    """All digests are right, but the HMAC of the old header cannot be."""
    ours, theirs = signed_entries(), signed_entries(OTHER_FILES)
    old_tag = ours[0].data[-66:]
    return write_zip([ZipEntry("axm.json", theirs[0].data[:-66] + old_tag), *theirs[1:]])


@attack("model.gguf does not match its HMAC")
def hmac_of_another_file() -> bytes:
    def change(records: list[dict[str, Any]]) -> None:
        records[1]["hmac"], records[2]["hmac"] = records[2]["hmac"], records[1]["hmac"]

    return write_zip(signed_entries(records=change))


@attack("manifest.json has another fingerprint than axm.json")
def fingerprint_of_other_files_by_an_insider() -> bytes:
    return write_zip(signed_entries(fingerprint="0" * 64))


@attack("manifest.json is not in its canonical spelling")
def manifest_with_spaces_by_an_insider() -> bytes:
    return write_zip(with_manifest(signed_entries()[1].data.replace(b"{", b"{ ", 1)))


@attack("manifest.json is not in its canonical spelling")
def manifest_of_nonsense_by_an_insider() -> bytes:
    return write_zip(with_manifest(b"not JSON"))


@attack("manifest.json gives 'model.gguf' no valid size")
def negative_size_by_an_insider() -> bytes:
    def change(records: list[dict[str, Any]]) -> None:
        records[1] = record(GGUF, FILES[GGUF], size=-1)

    return write_zip(signed_entries(records=change))


# --- versions --------------------------------------------------------------------------------------------------------


@attack("{path} is a container of version 2, this srd-modifier reads version 1; upgrade it")
def version_from_the_future() -> bytes:
    return write_zip(signed_entries(version=2))


@attack("{path} is a container of version 99, this srd-modifier reads version 1; upgrade it")
def version_from_the_future_with_other_fields() -> bytes:
    return write_zip(signed_entries(version=99, format="srd-axm", alignment=65536, compression="zstd"))


@attack("{path} is a container of version 3, this srd-modifier reads version 1; upgrade it")
def version_from_the_future_without_the_key() -> bytes:
    entries = signed_entries()
    entries[0].data = entries[0].data.replace(b'"version":1', b'"version":3')
    return write_zip(entries)


@attack("axm.json has no valid version; the container was changed")
def version_from_the_past() -> bytes:
    return write_zip(signed_entries(version=0))


@attack("axm.json has no valid version; the container was changed")
def version_that_is_true() -> bytes:
    """In Python, true equals 1."""
    return write_zip(signed_entries(version=True))


@attack("axm.json does not have the format 'srd-axm'; the container was changed")
def another_format() -> bytes:
    return write_zip(signed_entries(format="zip"))


@attack("axm.json has other fields than this version writes; the container was changed")
def another_alignment() -> bytes:
    return write_zip(signed_entries(alignment=1))


@attack("axm.json is not in its canonical spelling; the container was changed")
def header_with_a_field_twice() -> bytes:
    entries = signed_entries()
    unsigned = entries[0].data[: -len(',"hmac":""}') - 64].replace(b'"version":1', b'"version":7,"version":1')
    entries[0].data = authenticated(unsigned + b"}")
    return write_zip(entries)


# --- what the manifest asks for, by an insider, and no disk has -------------------------------------------------------


@attack("manifest.json gives its files more bytes than any disk has")
def sizes_beyond_64_bits_by_an_insider() -> bytes:
    def change(records: list[dict[str, Any]]) -> None:
        records[:] = [record(f"{number}.bin", b"", size=(1 << 62) - 1) for number in range(5)]

    return write_zip(signed_entries(records=change))


# a container that is whole has a page for each file
CROWDED = write_zip(signed_entries([(f"{number:04}", b"") for number in range(2000)])[:2])


@attack(f"manifest.json has more than {len(CROWDED) // 4096 + 32} files")
def more_files_than_there_is_room_for_by_an_insider() -> bytes:
    return CROWDED


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=attrgetter("name"))
def test_is_refused(attack: Attack, tmp_path: Path, key_file: Path, refused: Callable[..., str]) -> None:
    path, output = tmp_path / "a" / "b" / "forged.axm", tmp_path / "a" / "b" / "out"
    path.parent.mkdir(parents=True)
    path.write_bytes(attack.forge())
    expected = attack.sentence.format(path=path) if "{path}" in attack.sentence else f"{path}: {attack.sentence}"
    before = sorted(tmp_path.rglob("*"))
    assert refused("axm", "verify", path, "--key-file", key_file) == expected
    assert refused("axm", "extract", path, "--output", output, "--key-file", key_file) == expected
    refused("axm", "extract", path, "--output", output, "--gguf", "--key-file", key_file)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/srd-absolute.gguf").exists()


@pytest.mark.parametrize("attack", ATTACKS, ids=attrgetter("name"))
def test_is_refused_without_a_key_where_the_fingerprint_is_known(
    attack: Attack, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "forged.axm"
    path.write_bytes(attack.forge())
    known = fingerprint(record(name, data) for name, data in FILES.items())
    if attack.name in SAME_FILES:
        assert verify(path, fingerprint=known).fingerprint == known
    else:
        assert str(path) in refused("axm", "verify", path, "--fingerprint", known)


def test_the_container_that_is_attacked_is_valid(tmp_path: Path, model: Path, key: Key) -> None:
    pack([model], tmp_path / "valid.axm", key)
    assert (tmp_path / "valid.axm").read_bytes() == container()


def test_faults_that_differ_have_sentences_that_differ() -> None:
    """One for each that a reader must be able to tell from the others."""
    sentences = {attack.name: attack.sentence for attack in ATTACKS}
    told_apart = (
        *("missing", "extra", "duplicated", "renamed_entry", "reordered", "truncated_by_a_byte", "appended_byte"),
        *("absolute", "parent_folder", "symlink", "overlapping", "zip_bomb", "everything_of_somebody_else"),
        *("manifest_of_another_container_with_the_same_key", "version_from_the_future", "hmac_of_another_file"),
        *("payload_with_the_same_checksum", "header_for_another_manifest_without_the_key"),
    )
    assert len({sentences[name] for name in told_apart}) == len(told_apart)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_wrong_key(packed: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    other = write_secret(tmp_path / "other.key", OTHER_SECRET)
    assert refused("axm", "verify", packed, "--key-file", other) == (
        f"{packed} was packed with another key: its key id is {key_id(SECRET)}, that of the given key is "
        f"{key_id(OTHER_SECRET)}"
    )


def test_wrong_key_in_the_environment(
    packed: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, OTHER_SECRET.hex())
    assert f"{packed} was packed with another key" in refused("axm", "verify", packed)


def test_short_key(packed: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    short = write_secret(tmp_path / "short.key", SECRET[:31])
    assert refused("axm", "verify", packed, "--key-file", short) == (
        f"the key file {short} has 31 bytes, a key needs at least 32; `srd axm keygen FILE` makes one"
    )


def test_empty_key(packed: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    empty = write_secret(tmp_path / "empty.key", b"")
    assert refused("axm", "verify", packed, "--key-file", empty) == (
        f"the key file {empty} is empty; `srd axm keygen FILE` makes a key"
    )


def test_missing_key_file(packed: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "no.key"
    assert refused("axm", "verify", packed, "--key-file", path) == (
        f"the key file {path} is missing; `srd axm keygen {path}` makes one"
    )


def test_no_key_at_all(packed: Path, refused: Callable[..., str]) -> None:
    assert refused("axm", "verify", packed).startswith(f"{packed}: nothing was given to verify it with; ")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (SECRET.decode(), "the environment variable SRD_AXM_KEY is not hexadecimal"),
        ("", "the key in the environment variable SRD_AXM_KEY is empty; `srd axm keygen FILE` makes a key"),
        (
            SECRET[:16].hex(),
            "the key in the environment variable SRD_AXM_KEY has 16 bytes, a key needs at least 32; "
            "`srd axm keygen FILE` makes one",
        ),
    ],
    ids=["no hexadecimal", "empty", "short"],
)
def test_key_in_the_environment(
    value: str, sentence: str, packed: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    assert refused("axm", "verify", packed) == sentence


# --- what is no container at all -------------------------------------------------------------------------------------


def test_missing_container(tmp_path: Path, key_file: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "no.axm"
    assert refused("axm", "verify", path, "--key-file", key_file) == f"{path}: there is no such file"


def test_directory(model: Path, key_file: Path, refused: Callable[..., str]) -> None:
    assert refused("axm", "verify", model, "--key-file", key_file) == (
        f"{model} is a directory: name the --public-key of who signed it, keys are for containers"
    )
    assert refused("axm", "inspect", model) == f"{model} is not a file, expected an .axm container"


def test_pipe(tmp_path: Path, key_file: Path, refused: Callable[..., str]) -> None:
    """Which nobody writes into: it is not waited for."""
    path = tmp_path / "pipe.axm"
    os.mkfifo(path)
    expected = f"{path} is not a file, expected an .axm container"
    assert refused("axm", "verify", path, "--key-file", key_file) == expected


# --- containers of two holders of keys -------------------------------------------------------------------------------


def test_extract_replaces_nothing_when_the_container_is_refused(
    tmp_path: Path, key_file: Path, refused: Callable[..., str]
) -> None:
    path, output = tmp_path / "forged.axm", write_files(tmp_path / "out", {"config.json": b"{}", "mine.txt": b"mine"})
    entries = signed_entries()
    entry_of(entries, GGUF).data = same_checksum(OTHER_FILES[GGUF], FILES[GGUF])
    path.write_bytes(write_zip(entries))
    sentence = refused("axm", "extract", path, "--output", output, "--overwrite", "--key-file", key_file)
    assert sentence == f"{path}: {REPLACED}"
    assert sorted(file.name for file in output.iterdir()) == ["config.json", "mine.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["axm.key", "forged.axm", "out"]


def test_extract_does_not_follow_a_link_at_the_target(
    packed: Path, tmp_path: Path, key_file: Path, refused: Callable[..., str]
) -> None:
    elsewhere = write_files(tmp_path / "elsewhere", {"mine.txt": b"mine"})
    (tmp_path / "out").symlink_to(elsewhere)
    output = tmp_path / "out"
    assert "already exists" in refused("axm", "extract", packed, "--output", output, "--key-file", key_file)
    assert [file.name for file in elsewhere.iterdir()] == ["mine.txt"]
