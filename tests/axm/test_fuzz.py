"""20,000 containers with random damage: refused, quickly, without a crash and without much memory.

A case is its seed. What a case does wrong is told with the seed, and `mutant(seed)` makes the container again; any
other range of seeds can be searched by `FIRST`. What once went wrong is kept in REGRESSIONS by its bytes, because a
seed means another container as soon as a mutation is changed.
"""

import os
import random
import signal
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import FrameType

import pytest
from containers import (
    FINGERPRINT,
    OTHER_SECRET,
    SECRET,
    ZipEntry,
    compact,
    container,
    header,
    key_id,
    record,
    signed_entries,
    with_manifest,
    write_zip,
)

from srd_modifier.axm.container import Container
from srd_modifier.axm.extract import extract
from srd_modifier.axm.keys import Key
from srd_modifier.axm.verification import verify
from srd_modifier.errors import SRDError

FIRST, CASES, PARTS = 0, 24_000, 8  # some of them are no mutation
SECONDS = 5  # for one case; they take a millisecond

# what is not proportional to the file: a header of 4096 bytes may be parsed into twenty times as much, an error takes
# its sentence, `verify` takes threads; random damage was measured to need 3 KB of it
CONSTANT_BYTES = 1 << 17

_BASE = random.Random(7)
FILES = {
    "met.json": b"{}\n",
    "model.gguf": b"GGUF" + _BASE.randbytes(60_000),
    "notes/about.txt": b"What this is.\n",
    "srd/residual-00001-of-00001.safetensors": _BASE.randbytes(12_345),
    "tokenizer.json": b'{"model":{}}\n',
    "vocabulary.json": b"",
}
OTHERS = FILES | {"model.gguf": b"GGUF" + _BASE.randbytes(60_000), "notes/about.txt": b"What that is.\n"}
VALID, OTHER = container(FILES), container(OTHERS)
KEY = Key(SECRET)

# --- mutations -------------------------------------------------------------------------------------------------------

INTERESTING = (
    *(0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF),
    *((1 << 62) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 4095, 4096, 4097, len(VALID), len(VALID) - 22),
)
# where the structure is: headers of the files, header, manifest, directory
STRUCTURE = [
    *(place + offset for place in range(0, len(VALID)) if VALID.startswith(b"PK", place) for offset in range(46)),
    *range(VALID.index(b'{"format"'), VALID.index(b'{"format"') + 500),
    *range(VALID.index(b'{"files"'), VALID.index(b'{"files"') + 1300),
]
STRUCTURE = [place for place in STRUCTURE if place < len(VALID)]

Mutation = Callable[[random.Random, bytearray], None]


def place(choose: random.Random, content: bytearray) -> int:
    """Anywhere, or where the structure is."""
    return min(choose.choice(STRUCTURE), len(content)) if choose.random() < 0.6 else choose.randrange(len(content) + 1)


def span(choose: random.Random, content: bytearray) -> slice:
    start = place(choose, content)
    return slice(start, start + choose.choice((1, 2, 4, 8, 30, 100, 4096, 20_000)))


def flip_bits(choose: random.Random, content: bytearray) -> None:
    for _ in range(choose.choice((1, 1, 2, 5, 50))):
        if content:
            content[place(choose, content) % len(content)] ^= 1 << choose.randrange(8)


def change_bytes(choose: random.Random, content: bytearray) -> None:
    where = span(choose, content)
    content[where] = choose.randbytes(len(content[where]))


def insert(choose: random.Random, content: bytearray) -> None:
    start = place(choose, content)
    content[start:start] = choose.randbytes(choose.choice((1, 2, 4, 100, 4096)))


def delete(choose: random.Random, content: bytearray) -> None:
    del content[span(choose, content)]


def truncate(choose: random.Random, content: bytearray) -> None:
    del content[place(choose, content) :]


def copy_block(choose: random.Random, content: bytearray) -> None:
    where = span(choose, content)
    block = content[where]
    start = place(choose, content)
    content[start : start + len(block)] = block


def duplicate_region(choose: random.Random, content: bytearray) -> None:
    where = span(choose, content)
    start = place(choose, content)
    content[start:start] = content[where]


def swap_blocks(choose: random.Random, content: bytearray) -> None:
    """Pages of the container for those of another one that is valid under the same key."""
    for _ in range(choose.choice((1, 1, 2, 4))):
        page = 4096 * choose.randrange(len(VALID) // 4096 + 1)
        content[page : page + 4096] = OTHER[page : page + 4096]


def take_from_other(choose: random.Random, content: bytearray) -> None:
    where = span(choose, content)
    content[where] = OTHER[where]


def change_number(choose: random.Random, content: bytearray) -> None:
    for _ in range(choose.choice((1, 1, 2, 3))):
        code, bits = choose.choice((("<H", 16), ("<I", 32), ("<Q", 64), (">I", 32)))
        start = place(choose, content)
        number = struct.pack(code, choose.choice(INTERESTING) % (1 << bits))
        content[start : start + len(number)] = number


def add_zip64_end(choose: random.Random, content: bytearray) -> None:
    """End records for large archives, with numbers of their own."""
    at = content.rfind(b"PK\5\6")
    if at < 0:
        return
    numbers = [choose.choice((*INTERESTING, at)) for _ in range(5)]
    end64 = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, numbers[0], numbers[0], numbers[1], numbers[2])
    locator = b"PK\6\7" + struct.pack("<IQI", 0, choose.choice((at, numbers[3])), 1)
    content[at:at] = end64 + locator


def mutate_json(choose: random.Random, content: bytearray) -> None:
    """Header or manifest changed as text, and all digests set right again, but not the HMACs."""
    files = list(FILES.items())
    encoded = bytearray(compact({"files": [record(name, data) for name, data in files]}))
    changed = choose.choice(("header", "manifest", "both"))
    if changed != "header":
        change_text(choose, encoded)
    claimed = choose.choice((SECRET, SECRET, OTHER_SECRET))
    entries = with_manifest(bytes(encoded), files, OTHER_SECRET, key_id=key_id(claimed))
    if changed != "manifest":
        text = bytearray(entries[0].data)
        change_text(choose, text)
        entries[0].data = bytes(text)
    if choose.random() < 0.5:
        entries[2:] = [ZipEntry(name, choose.randbytes(len(data))) for name, data in files]
    content[:] = write_zip(entries)


def change_text(choose: random.Random, text: bytearray) -> None:
    tokens = (
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"\\u0000",
        b"\\ud800",
        b"null",
        b"true",
        b"NaN",
        b"1e999",
        b"-1",
    )
    tokens += (b"[" * 3000, b"9" * 5000, b'{"":' * 2000, b"\xff", b"../", b"\xe2\x80\xae", b"/", b"", b"{},")
    for _ in range(choose.choice((0, 1, 1, 2, 6))):
        start = choose.randrange(len(text) + 1)
        text[start : start + choose.choice((0, 1, 5, 64))] = choose.choice(tokens)


def random_zip(choose: random.Random, content: bytearray) -> None:
    """As other tools make them."""
    names = ["axm.json", "manifest.json", *FILES, "../up", "/root", "a\\b", "x" * 300, "", "dir/", "ü", "axm.json"]
    known = {"axm.json": header(b"{}"), "manifest.json": b"{}"} | FILES
    mode = choose.choice("wwa")
    stream = BytesIO(VALID if mode == "a" else b"")
    with zipfile.ZipFile(stream, mode, choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
        for name in choose.sample(names, choose.randrange(len(names))):
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = choose.choice((0, 0o100644, 0o120777, 0o040755)) << 16
            new._didModify = True
            if name not in new.NameToInfo:
                new.writestr(info, known.get(name, choose.randbytes(choose.choice((0, 10, 5000)))))
        new.comment = choose.randbytes(choose.choice((0, 0, 10, 60_000)))
    content[:] = stream.getvalue()


def rearrange(choose: random.Random, content: bytearray) -> None:
    """A well-formed zip of the valid entries, some of them gone, twice, moved, renamed or not what they claim."""
    entries = signed_entries(FILES)
    for _ in range(choose.choice((1, 2, 3))):
        entry = choose.choice(entries)
        field = choose.choice(("more", "name", "data", "size", "packed", "start", "mode", "method", "extra", "comment"))
        if field == "more":
            entries.append(ZipEntry("new", b"more"))
        elif field == "name":
            entry.name = choose.choice((*FILES, "../up", "/root", "new", "axm.json"))
        elif field == "data":
            entry.data = choose.randbytes(choose.choice((0, len(entry.data), 100)))
        elif field in ("extra", "comment"):
            setattr(
                entry,
                field,
                choose.choice((b"\1\0\x08\0", b"\1\0", b"x" * 300)) + choose.randbytes(choose.randrange(20)),
            )
        elif field in ("mode", "method"):
            setattr(entry, field, choose.choice((0, 8, 12, 0o120777, 0o040755)))
        else:
            setattr(entry, field, choose.choice(INTERESTING) % (1 << 32))
    listed = choose.choices(entries, k=len(entries)) if choose.random() < 0.3 else None
    if choose.random() < 0.3:
        choose.shuffle(entries)
    content[:] = write_zip(entries, listed=listed, prefix=choose.choice((b"", b"", b"#!", bytes(4096))))


MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bits, change_bytes, insert, delete, truncate, copy_block, duplicate_region, swap_blocks, take_from_other),
    *(change_number, change_number, add_zip64_end, mutate_json, random_zip, rearrange),
)


def mutant(seed: int) -> bytes:
    """The container of a seed."""
    choose = random.Random(seed)
    content = bytearray(VALID)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        choose.choice(MUTATIONS)(choose, content)
    return bytes(content)


_LOCATOR = b"PK\6\7" + struct.pack("<IQI", 0, (1 << 64) - 1, 1)

REGRESSIONS = {
    "the start of an end record and no more": b"PK\5\6" + bytes(9),
    "a zip64 end record beyond 63 bits": VALID[:-22] + _LOCATOR + VALID[-22:],
    "sizes that add up to more than 64 bits": write_zip(
        with_manifest(compact({"files": [record(f"{number}", b"", size=(1 << 62) - 1) for number in range(5)]}), [])
    ),
}


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file() -> Iterator[tuple[Path, int]]:
    """A file in memory, by path and descriptor."""
    descriptor = os.memfd_create("container")
    yield Path(f"/proc/self/fd/{descriptor}"), descriptor
    os.close(descriptor)


@contextmanager
def bounded() -> Iterator[None]:
    """A case that hangs is an error."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def is_refused(path: Path) -> bool:
    """Whether a holder of the key refuses it, in one line."""
    try:
        with Container(path, key=KEY) as opened:
            opened.verify()
    except SRDError as error:
        return "\n" not in str(error)
    return False


def is_harmless_without_key(path: Path) -> bool:
    """Whether a reader who knows the fingerprint gets the files that it stands for, or an error."""
    try:
        with Container(path) as opened:
            opened.verify()
            if opened.fingerprint == FINGERPRINT:
                return {record.path: opened.read(record.path) for record in opened.manifest.files} == FILES
    except SRDError:
        return True
    with pytest.raises(SRDError, match="these are other files"):
        verify(path, fingerprint=FINGERPRINT)
    return True


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that a piece of work holds at its most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def seeds(part: int) -> range:
    return range(FIRST + CASES * part // PARTS, FIRST + CASES * (part + 1) // PARTS)


def check(seed: int, path: Path, descriptor: int) -> bool:
    """Try one case; False if it is no mutation at all."""
    content = mutant(seed)
    if content in (VALID, OTHER):
        return False
    write(descriptor, content)
    try:
        with bounded():
            assert is_refused(path), "it is accepted"
            assert is_harmless_without_key(path), "it is taken for another container"
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r}") from error
    return True


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_mutation_is_accepted(part: int, file: tuple[Path, int]) -> None:
    tried = sum(check(seed, *file) for seed in seeds(part))
    assert tried >= 20_000 / PARTS


@pytest.mark.parametrize("content", REGRESSIONS.values(), ids=REGRESSIONS)
def test_what_went_wrong_once(content: bytes, file: tuple[Path, int]) -> None:
    write(file[1], content)
    assert is_refused(file[0])
    assert is_harmless_without_key(file[0])


def test_the_mutations_reach_deep(file: tuple[Path, int]) -> None:
    """Every stage of reading must have refused some of them; otherwise they would prove little."""
    stages = (
        *("does not match its HMAC", "was packed with another key", "manifest.json is not the one", "is truncated"),
        *("appended", "between its files", "its zip directory is damaged", "its SHA-256 is not the manifest's"),
        *("is missing", "is extra", "is there twice", "in another order", "is compressed", "is a symbolic link"),
        *("overlaps", "was renamed", "is an absolute path", "`..`", "is not an .axm container", "by another tool"),
    )
    said = set()
    for seed in range(4000):
        write(file[1], mutant(seed))
        try:
            with Container(file[0], key=KEY) as opened:
                opened.verify()
        except SRDError as error:
            said |= {stage for stage in stages if stage in str(error)}
    assert set(stages) - said == set()


@pytest.mark.slow
def test_memory_stays_below_twice_the_file(file: tuple[Path, int]) -> None:
    path, descriptor = file
    for seed in range(FIRST, FIRST + CASES, 20):
        content = mutant(seed)
        write(descriptor, content)
        most = 2 * len(content) + CONSTANT_BYTES
        assert peak_of(lambda: is_refused(path)) < most, f"seed {seed}"
        assert peak_of(lambda: is_harmless_without_key(path)) < most, f"seed {seed}"


def with_header(header: bytes) -> bytes:
    """A container with anything for a header, long enough to be looked at."""
    return write_zip([ZipEntry("axm.json", header), ZipEntry("manifest.json", b"{}")])


def manifest_of(text: bytes) -> bytes:
    return write_zip(with_manifest(text, []))


def directory_of(count: int, *, before: int = 0) -> bytes:
    """A zip directory of the smallest entries there are, behind so many bytes of nothing."""
    entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 45, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    end = struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    end64 = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, count * len(entry), before)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, before + count * len(entry), 1)
    return bytes(before) + entry * count + end64 + locator + b"PK\5\6" + end


DEEP = "/".join("a" * 32)
EXPANDING = {
    "a header of empty lists": with_header(b'{"a":[' + b"[]," * 1300 + b"0]}"),
    "a header that is nested": with_header(b"[" * 4000),
    "a manifest of empty objects": manifest_of(b'{"files":[' + b"{}," * 500_000 + b"{}]}"),
    "a manifest of lists in one record": manifest_of(b'{"files":[' + b"[" + b"[]," * 500_000 + b"0]]}"),
    "a manifest with one wide character": manifest_of(
        b'{"files":["' + b"x" * 1_000_000 + "\U0001f9ea".encode() + b'"]}'
    ),
    "a manifest that is nested": manifest_of(b"[" * 1_000_000),
    "a manifest of more files than the container has room for": manifest_of(
        compact({"files": [record(f"{number:05}", b"") for number in range(10_000)]})
    ),
    "a manifest of deep folders": manifest_of(
        compact({"files": [record(f"{number:03}/{DEEP[:-8]}", b"") for number in range(100)]})
    ),
    "a directory of small entries": directory_of(50_000),
    "a directory of small entries in a larger file": directory_of(10_000, before=1 << 22),
}


@pytest.mark.parametrize("content", EXPANDING.values(), ids=EXPANDING)
def test_what_would_grow_in_memory_does_not(content: bytes, file: tuple[Path, int]) -> None:
    path, descriptor = file
    write(descriptor, content)
    most = 2 * len(content) + CONSTANT_BYTES
    with bounded():
        assert peak_of(lambda: is_refused(path)) < most
        assert peak_of(lambda: is_harmless_without_key(path)) < most


@pytest.mark.slow
def test_a_mutation_is_never_unpacked(file: tuple[Path, int], tmp_path: Path) -> None:
    path, descriptor = file
    for seed in range(FIRST, FIRST + CASES, 20):
        content = mutant(seed)
        if content in (VALID, OTHER):
            continue
        write(descriptor, content)
        with bounded(), pytest.raises(SRDError), Container(path, key=KEY) as opened:
            extract(opened, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [], f"seed {seed}"
