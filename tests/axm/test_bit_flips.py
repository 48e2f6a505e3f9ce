"""Every single bit of a container: flipped, it is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import SECRET, container, fingerprint, record

from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import Key
from srd_modifier.axm.verification import verify
from srd_modifier.errors import SRDError

FILES = {"met.json": b"{}\n", "model.gguf": b"GGUF" + bytes(range(60)), "tokenizer.json": b'{"model":{}}\n'}
CONTENT = container(FILES)
PARTS = 8


@pytest.fixture(scope="module")
def file() -> Iterator[tuple[Path, int]]:
    """The container in memory, by path and descriptor: a flip writes one byte of it."""
    descriptor = os.memfd_create("container")
    os.write(descriptor, CONTENT)
    yield Path(f"/proc/self/fd/{descriptor}"), descriptor
    os.close(descriptor)


def flips(descriptor: int, places: range) -> Iterator[tuple[int, int]]:
    """Flips each bit at these places in turn, and gives place and bit while it is flipped."""
    for place in places:
        for bit in range(8):
            os.pwrite(descriptor, bytes([CONTENT[place] ^ 1 << bit]), place)
            yield place, bit
        os.pwrite(descriptor, CONTENT[place : place + 1], place)


def test_the_parts_are_the_whole_container(file: tuple[Path, int]) -> None:
    covered = [place for part in range(PARTS) for place in places(part)]
    assert covered == list(range(len(CONTENT)))
    verify(file[0], key=Key(SECRET))


def places(part: int) -> range:
    return range(len(CONTENT) * part // PARTS, len(CONTENT) * (part + 1) // PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_flip_is_refused_with_the_key(file: tuple[Path, int], part: int) -> None:
    path, descriptor = file
    key = Key(SECRET)
    accepted, refused = [], 0
    for flip in flips(descriptor, places(part)):
        try:
            with Container(path, key=key) as opened:
                opened.verify()
        except SRDError:
            refused += 1
        else:
            accepted.append(flip)
    assert accepted == []
    assert refused == 8 * len(places(part))
    verify(path, key=key)  # all of them were undone


def test_every_flip_in_a_file_is_refused_with_the_fingerprint(file: tuple[Path, int]) -> None:
    """Without a key, and in the manifest's digests as well."""
    path, descriptor = file
    known = fingerprint(record(name, data) for name, data in FILES.items())
    spans = [range(start := CONTENT.index(data, 3 * 4096), start + len(data)) for data in FILES.values()]
    for span in spans:
        for _ in flips(descriptor, span):
            with pytest.raises(SRDError, match="was changed after it was packed, its SHA-256 is not the manifest's"):
                verify(path, fingerprint=known)
    assert verify(path, fingerprint=known).files == len(FILES)
    manifest = CONTENT.index(b'{"files":')
    for _ in flips(descriptor, range(manifest, CONTENT.index(b"]}", manifest) + 2)):
        with pytest.raises(SRDError, match=r"manifest\.json is not the one that axm\.json was packed with"):
            verify(path, fingerprint=known)
