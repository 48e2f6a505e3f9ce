"""The bytes around the files, against a second writer, Python's zipfile and Info-ZIP's unzip."""

import os
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

import pytest
from containers import FILES, ZipEntry, write_zip

from srd_modifier.axm.layout import ALIGNMENT, Layout


def assembled(files: dict[str, bytes]) -> bytes:
    """A zip by the package's layout."""
    layout = Layout([(name, len(data)) for name, data in files.items()])
    checksums = [zlib.crc32(data) for data in files.values()]
    content = b""
    for entry, data, checksum in zip(layout.entries, files.values(), checksums, strict=True):
        assert len(content) == entry.start
        content += layout.local_header(entry, checksum)
        assert len(content) == entry.data
        content += data
        assert len(content) == entry.end
    assert len(content) == layout.central
    content += layout.tail(checksums)
    assert len(content) == layout.size
    return content


SETS = {
    "none": {},
    "one": {"a": b"x"},
    "some": FILES,
    "empty files": {"a": b"", "b": b"", "c": b"c"},
    "names in all scripts": {"größe.json": b"1", "模型/一.gguf": b"2", "🧪.bin": b"3"},
    "long names": {f"{number}{'x' * 250}/{'y' * 255}/{'z' * 255}/{'w' * 250}": b"x" for number in range(9)},
    "whole pages": {"a": bytes(ALIGNMENT), "b": bytes(2 * ALIGNMENT), "c": bytes(ALIGNMENT - 1)},
    # the local header would end right at a page, and its padding field begin there
    "awkward ends": {f"{number}": bytes(4096 - 64 + number) for number in range(70)},
}


@pytest.mark.parametrize("files", SETS.values(), ids=SETS)
def test_it_is_what_the_second_writer_makes(files: dict[str, bytes]) -> None:
    assert assembled(files) == write_zip([ZipEntry(name, data) for name, data in files.items()])


@pytest.mark.parametrize("files", SETS.values(), ids=SETS)
def test_python_reads_it(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(assembled(files))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == files
        assert archive.comment == b""
        for entry in archive.infolist():
            assert (entry.compress_type, entry.date_time, entry.external_attr >> 16) == (
                0,
                (1980, 1, 1, 0, 0, 0),
                0o100644,
            )


@pytest.mark.parametrize("files", [FILES, SETS["whole pages"], SETS["awkward ends"]], ids=["some", "pages", "awkward"])
def test_unzip_reads_it(files: dict[str, bytes], tmp_path: Path) -> None:
    if shutil.which("unzip") is None:
        pytest.skip("needs Info-ZIP's unzip")
    path = tmp_path / "x.zip"
    path.write_bytes(assembled(files))
    assert subprocess.run(["unzip", "-tqq", path], capture_output=True, text=True).stdout.strip() == ""
    subprocess.run(["unzip", "-q", path, "-d", tmp_path / "out"], check=True)
    assert {
        str(file.relative_to(tmp_path / "out")): file.read_bytes()
        for file in sorted((tmp_path / "out").rglob("*"))
        if file.is_file()
    } == files


@pytest.mark.parametrize("files", SETS.values(), ids=SETS)
def test_every_file_begins_with_a_page(files: dict[str, bytes]) -> None:
    layout = Layout([(name, len(data)) for name, data in files.items()])
    assert all(entry.data % ALIGNMENT == 0 for entry in layout.entries)
    assert all(entry.data - entry.start < ALIGNMENT + 2000 for entry in layout.entries)


@pytest.mark.slow
@pytest.mark.parametrize("count", [65_534, 65_535, 65_536])
def test_many_files(count: int, tmp_path: Path) -> None:
    """From 65,535 on a zip needs zip64 end records."""
    names = [f"{number:05}" for number in range(count)]
    layout = Layout([(name, 0) for name in names])
    tail = layout.tail([0] * count)
    assert (b"PK\6\6" in tail) == (count >= 0xFFFF)
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        for entry in layout.entries:
            file.seek(entry.start)
            file.write(layout.local_header(entry, 0).rstrip(b"\0"))
        file.seek(layout.central)
        file.write(tail)
    assert path.stat().st_size == layout.size
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == names
        assert archive.read(names[-1]) == b""


SIZES_AROUND_4_GIB = [0xFFFFFFFE, 0xFFFFFFFF, 0x100000000, 0x180000001]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES_AROUND_4_GIB)
def test_large_files(size: int, tmp_path: Path) -> None:
    """A sparse one, with some bytes at its end; then a small one behind it."""
    layout = Layout([("large.bin", size), ("small.txt", 5)])
    checksums = [checksum_of_zeros(size - 3, b"end"), zlib.crc32(b"small")]
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        for entry, checksum, data in zip(layout.entries, checksums, (b"end", b"small"), strict=True):
            file.seek(entry.start)
            file.write(layout.local_header(entry, checksum))
            file.seek(entry.end - len(data))
            file.write(data)
        file.seek(layout.central)
        file.write(layout.tail(checksums))
    assert path.stat().st_size == layout.size
    with zipfile.ZipFile(path) as archive:
        large, small = archive.infolist()
        assert (large.filename, large.file_size, large.compress_size, large.CRC) == (
            "large.bin",
            size,
            size,
            checksums[0],
        )
        assert (small.filename, small.file_size, small.header_offset) == ("small.txt", 5, layout.entries[1].start)
        assert archive.read(small) == b"small"
        with archive.open(large) as file:
            file._expected_crc = None  # of zeros, which would take seconds to read
            file.seek(0)
            assert file.read(10) == bytes(10)
        raw = os.open(path, os.O_RDONLY)
        assert os.pread(raw, 3, layout.entries[0].end - 3) == b"end"
        os.close(raw)


@pytest.mark.slow
def test_unzip_reads_a_large_file(tmp_path: Path) -> None:
    if shutil.which("unzip") is None:
        pytest.skip("needs Info-ZIP's unzip")
    size = 0x100000001
    layout = Layout([("large.bin", size), ("small.txt", 5)])
    checksums = [0, zlib.crc32(b"small")]  # the large one is only listed
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        for entry, checksum in zip(layout.entries, checksums, strict=True):
            file.seek(entry.start)
            file.write(layout.local_header(entry, checksum))
        file.seek(layout.entries[1].data)
        file.write(b"small")
        file.write(layout.tail(checksums))
    listed = subprocess.run(["unzip", "-lqq", path], capture_output=True, text=True, check=True).stdout.split()
    assert [*listed[::4], *listed[3::4]] == [str(size), "5", "large.bin", "small.txt"]
    done = subprocess.run(["unzip", "-tq", path, "small.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "No errors detected" in done.stdout


def checksum_of_zeros(count: int, end: bytes) -> int:
    """CRC-32 of many zeros and an end, by blocks."""
    block, checksum = bytes(1 << 24), 0
    for _ in range(count >> 24):
        checksum = zlib.crc32(block, checksum)
    checksum = zlib.crc32(bytes(count & (1 << 24) - 1), checksum)
    return zlib.crc32(end, checksum)


def test_a_layout_of_terabytes() -> None:
    """Nothing of it is on a disk; every number that does not fit into 32 bits is in a zip64 field."""
    layout = Layout([(f"model-{number}.safetensors", 50 << 30) for number in range(40)])
    assert layout.entries[-1].start > 1 << 40
    assert layout.tail([0] * 40).count(b"\1\0\x18\0") == 39  # size twice and place
    assert layout.tail([0] * 40).count(b"\1\0\x10\0") == 1  # the first one begins at 0
