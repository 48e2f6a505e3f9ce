import errno
import hashlib
import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.checkpoint.placed import PlacedFile
from srd_modifier.errors import CheckpointError

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def file(tmp_path: Path) -> PlacedFile:
    return PlacedFile(tmp_path / "file", 5_000_000, "the residual")


def test_its_space_is_taken_at_once(file: PlacedFile) -> None:
    file.reserve()
    assert file.path.stat().st_size == file.size
    assert file.path.stat().st_blocks * 512 >= file.size
    assert not any(file.path.read_bytes())


def test_parts_may_be_written_in_any_order(file: PlacedFile) -> None:
    content = random.Random(0).randbytes(file.size)
    edges = [0, 1, 9, 4096, 1_000_000, 3_500_001, file.size]
    parts = list(itertools.pairwise(edges))
    random.Random(1).shuffle(parts)
    file.reserve()
    for start, end in parts:
        middle = (start + end) // 2
        digest = file.write([content[start:middle], memoryview(content)[middle:end]], start)
        assert digest == hashlib.sha256(content[start:end]).hexdigest()
    file.flush()
    file.close()
    assert file.path.read_bytes() == content


def test_digests_are_read_from_the_file(file: PlacedFile) -> None:
    content = random.Random(0).randbytes(file.size)
    file.reserve()
    file.write([content], 0)
    for start, end in [(0, 0), (0, 1), (7, 2**20 + 7), (5, 3 * 2**20 + 1), (0, file.size)]:
        assert file.digest(start, end) == hashlib.sha256(content[start:end]).hexdigest()
    with file.path.open("r+b") as other:
        other.seek(2**20 + 3)
        other.write(bytes([content[2**20 + 3] ^ 1]))
    assert file.digest(0, 2**20) == hashlib.sha256(content[: 2**20]).hexdigest()
    assert file.digest(0, file.size) != hashlib.sha256(content).hexdigest()


def test_nothing_is_written_of_no_bytes(file: PlacedFile) -> None:
    file.reserve()
    for chunks in ([], [b""], [memoryview(b"")]):
        assert file.write(chunks, 100) == hashlib.sha256(b"").hexdigest()
    assert not any(file.path.read_bytes())


def test_what_is_there_is_kept_if_asked(file: PlacedFile) -> None:
    file.reserve()
    file.write([b"before"], 1000)
    file.close()
    again = PlacedFile(file.path, file.size, "the residual")
    again.reserve(keep=True)
    assert again.digest(1000, 1006) == hashlib.sha256(b"before").hexdigest()
    again.close()
    again.reserve()
    assert not any(file.path.read_bytes())


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_that_is_too_short_gets_its_length(file: PlacedFile, keep: bool) -> None:
    file.path.write_bytes(b"short")
    file.reserve(keep=keep)
    assert file.path.stat().st_size == file.size
    assert file.path.read_bytes().startswith(b"short") == keep


def test_a_write_that_takes_less_than_it_was_given_goes_on(file: PlacedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
    file.reserve()
    digest = file.write([b"0123456789", b"abc", b"defg"], 50)
    assert digest == hashlib.sha256(b"0123456789abcdefg").hexdigest()
    assert file.path.read_bytes()[49:68] == b"\x000123456789abcdefg\x00"


def test_without_posix_calls_it_is_the_same(file: PlacedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "posix_fadvise")
    file.reserve()
    file.write([b"x"], file.size - 1)
    file.close()
    assert file.path.read_bytes() == bytes(file.size - 1) + b"x"


@pytest.mark.parametrize("call", ["posix_fallocate", "open"])
def test_no_room_is_a_sentence(file: PlacedFile, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise NO_SPACE

    monkeypatch.setattr(os, call, full)
    expected = f"cannot reserve 5000000 bytes for the residual in {file.path.parent}: No space left on device"
    with pytest.raises(CheckpointError, match=f"^{expected}$"):
        file.reserve()
    file.close()


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_refuses_is_a_sentence(file: PlacedFile, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise NO_SPACE

    file.reserve()
    monkeypatch.setattr(os, call, full)
    use = file.flush if call == "fsync" else lambda: file.write([b"x"], 0)
    with pytest.raises(CheckpointError, match=f"^cannot write {file.path}: No space left on device$"):
        use()


def test_it_is_closed_for_good(file: PlacedFile) -> None:
    file.close()
    file.reserve()
    before = len(list(Path("/proc/self/fd").iterdir()))
    file.close()
    file.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1
    for use in (file.flush, lambda: file.write([b"x"], 0), lambda: file.digest(0, 1)):
        with pytest.raises(CheckpointError, match=f"^{file.path} is closed$"):
            use()
