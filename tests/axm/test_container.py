"""An open container: where its files are, and that it is closed again."""

import os
import zlib
from pathlib import Path

import pytest
from containers import FILES, SECRET, container, key_id, same_checksum, signed_entries, write_zip

from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import Key
from srd_modifier.errors import CheckpointError


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_it_says(packed: Path, key: Key) -> None:
    with Container(packed, key=key) as opened:
        assert opened.size == packed.stat().st_size
        assert opened.header.key_id == key_id(SECRET)
        assert opened.fingerprint == opened.header.fingerprint
        assert [record.path for record in opened.manifest.files] == list(FILES)
        assert not opened.verified
        opened.verify()
        assert opened.verified


def test_where_the_files_are(packed: Path, key: Key) -> None:
    """At the beginning of a page, so that they can be mapped into memory."""
    content = packed.read_bytes()
    with Container(packed, key=key) as opened:
        for name, data in FILES.items():
            entry = opened.entry(name)
            assert entry is not None
            assert content[entry.data : entry.end] == data
            assert entry.data % 4096 == 0
            assert opened.read(name) == data
        for name in ("axm.json", "manifest.json", "nothing", "notes", ""):
            assert opened.entry(name) is None
            assert opened.read(name) is None


def test_a_file_that_was_changed_is_not_read(tmp_path: Path, key: Key) -> None:
    path, entries = tmp_path / "x.axm", signed_entries()
    entries[3].data = same_checksum(FILES["model.gguf"][:-5] + b"evil!", FILES["model.gguf"])
    path.write_bytes(write_zip(entries))
    with Container(path, key=key) as opened:
        assert opened.read("met.json") == FILES["met.json"]
        with pytest.raises(CheckpointError, match=r"model\.gguf was changed after it was packed"):
            opened.read("model.gguf")
        with pytest.raises(CheckpointError, match=r"model\.gguf was changed after it was packed"):
            opened.verify()
        assert not opened.verified


def test_a_file_that_changes_between_two_reads(packed: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is returned is what was compared: it is read once."""
    reads = []
    read = os.pread

    def counted(descriptor: int, size: int, start: int) -> bytes:
        reads.append(start)
        return read(descriptor, size, start)

    with Container(packed, key=key) as opened:
        monkeypatch.setattr(os, "pread", counted)
        opened.read("model.gguf")
    assert len(reads) == 1


def test_it_is_closed(packed: Path, key: Key) -> None:
    before = descriptors()
    with Container(packed, key=key) as opened:
        assert descriptors() == before + 1
    assert descriptors() == before
    opened.close()
    assert descriptors() == before


def test_it_is_closed_when_it_is_refused(tmp_path: Path, key: Key) -> None:
    before, path = descriptors(), tmp_path / "x.axm"
    for content in (b"", b"nonsense", container()[:-1], container(secret=bytes(32))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            Container(path, key=key)
    with pytest.raises(CheckpointError, match="there is no such file"):
        Container(tmp_path / "nothing", key=key)
    with pytest.raises(CheckpointError, match=r"is not a file, expected an \.axm container"):
        Container(tmp_path, key=key)
    assert descriptors() == before


def test_a_disk_that_fails(packed: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(CheckpointError, match=rf"^cannot read {packed}: Input/output error$"):
        Container(packed, key=key)


def test_a_file_that_may_not_be_read(packed: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **more: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(CheckpointError, match=rf"^cannot read {packed}: Permission denied$"):
        Container(packed, key=key)


def test_checksums_are_compared_as_well(tmp_path: Path, key: Key) -> None:
    """A manifest whose CRC-32 is wrong would be one that other tools for zips reject."""
    path = tmp_path / "x.axm"
    entries = signed_entries(records=lambda records: records[1].update(crc32="00000000"))
    entries[3].checksum = 0
    assert zlib.crc32(FILES["model.gguf"]) != 0
    path.write_bytes(write_zip(entries))
    with Container(path, key=key) as opened, pytest.raises(CheckpointError, match=r"model\.gguf was changed"):
        opened.verify()
