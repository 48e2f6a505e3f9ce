"""Hashing and copying: every byte once, in any number of files, and what goes wrong on the way."""

import hashlib
import os
import random
import threading
import time
import zlib
from pathlib import Path

import pytest

from srd_modifier.axm import streams
from srd_modifier.axm.streams import Advance, StreamFault, digest_stream, in_parallel, read_at, write_at

DATA = random.Random(0).randbytes(10_000)


@pytest.fixture
def source(tmp_path: Path) -> int:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=[1 << 21, 4096, 1000, 7])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(streams, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(("start", "size"), [(0, 10_000), (0, 0), (10_000, 0), (1, 9_999), (5000, 1), (4096, 4096)])
def test_digests(start: int, size: int, source: int, block: int) -> None:
    steps: list[int] = []
    found = digest_stream(source, start, size, copy_to=None, advance=steps.append)
    expected = DATA[start : start + size]
    assert (found.sha256, found.crc32) == (hashlib.sha256(expected).hexdigest(), zlib.crc32(expected))
    assert sum(steps) == size
    assert max(steps, default=0) <= block


def test_a_copy(source: int, block: int, tmp_path: Path) -> None:
    with (tmp_path / "copy").open("w+b") as copy:
        copy.write(b"before")
        copy.flush()
        digest_stream(source, 100, 9000, copy_to=(copy.fileno(), 6), advance=lambda count: None)
    assert (tmp_path / "copy").read_bytes() == b"before" + DATA[100:9100]


def test_a_write_that_is_done_in_pieces(source: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than it is given."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, start: write(descriptor, data[:777], start))
    with (tmp_path / "copy").open("w+b") as copy:
        digest_stream(source, 0, 10_000, copy_to=(copy.fileno(), 0), advance=lambda count: None)
        write_at(copy.fileno(), DATA, 20_000)
    assert (tmp_path / "copy").read_bytes() == DATA + bytes(10_000) + DATA


def test_a_read_that_is_done_in_pieces(source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, start: read(descriptor, min(size, 777), start))
    assert read_at(source, 5000, 10) == DATA[10:5010]


def test_reading_ends_with_the_file(source: int) -> None:
    assert read_at(source, 100, 9_990) == DATA[-10:]
    assert read_at(source, 100, 10_000) == read_at(source, 0, 0) == b""


def test_a_file_that_ends_before(source: int, block: int) -> None:
    with pytest.raises(StreamFault, match=r"^has only 9000 of 9001 bytes$"):
        digest_stream(source, 1000, 9001, copy_to=None, advance=lambda count: None)


def test_all_pieces_of_work_are_done_and_counted() -> None:
    sizes, done, shown = [5, 0, 20, 1], [], []

    def work(number: int, advance: Advance) -> None:
        for _ in range(sizes[number]):
            advance(1)
        done.append(number)

    in_parallel(work, sizes, lambda done, total: shown.append((done, total)))
    assert sorted(done) == [0, 1, 2, 3]
    assert shown == [(count, 26) for count in range(1, 27)]


def test_no_work() -> None:
    in_parallel(lambda number, advance: pytest.fail("there is none"), [], None)


def test_the_work_is_shared_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    together = threading.Barrier(4, timeout=20)
    in_parallel(lambda number, advance: together.wait() and None, [1, 1, 1, 1], None)


def test_the_first_file_that_is_wrong_is_named_and_the_rest_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    begun = []

    def work(number: int, advance: Advance) -> None:
        begun.append(number)
        time.sleep(0.005)
        if number >= 1:
            raise StreamFault(f"{number} is wrong")
        advance(10)

    with pytest.raises(StreamFault, match=r"^1 is wrong$"):
        in_parallel(work, [10, 9, 8, *([1] * 100)], None)
    assert begun[:2] == [0, 1]
    assert len(begun) < 50


def test_a_fault_stops_what_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others notice at their next block."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    running = threading.Event()

    def work(number: int, advance: Advance) -> None:
        if number == 0:
            running.wait(20)
            raise OSError("the disk is gone")
        while True:
            running.set()
            advance(1)
            time.sleep(0.001)

    with pytest.raises(OSError, match="the disk is gone"):
        in_parallel(work, [1, 2], None)


def test_an_interrupt_stops_what_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streams, "wait", interrupted)

    def work(number: int, advance: Advance) -> None:
        while True:
            advance(1)
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, [1, 1, 1], None)
