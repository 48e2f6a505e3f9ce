"""Reading many files at once, every byte one time: hashed on all cores, and copied where that is asked for."""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.errors import CheckpointError

Progress = Callable[[int, int], None]
Advance = Callable[[int], None]

_BLOCK = 1 << 21


class StreamFault(Exception):  # noqa: N818 - what went wrong, in words that follow the file's name
    """What is wrong with the bytes of a file, in words that follow its name."""


@dataclass(frozen=True)
class Digests:
    """SHA-256, hexadecimal, and CRC-32 of a file."""

    sha256: str
    crc32: int


def digest_stream(source: int, start: int, size: int, *, copy_to: tuple[int, int] | None, advance: Advance) -> Digests:
    """Hash `size` bytes of an open file.

    Args:
        source: descriptor of the file.
        start: where the bytes begin in it.
        size: how many there are.
        copy_to: descriptor and place to copy them to.
        advance: called with the bytes that were read since the last call.

    Raises:
        StreamFault: the file ends before.
        OSError: it cannot be read, or the copy not be written.
    """
    # the GIL is released in all four steps, so that threads do share the cores
    sha256, crc32, done = hashlib.sha256(), 0, 0
    buffer = memoryview(bytearray(min(_BLOCK, size)))
    while done < size:
        count = os.preadv(source, [buffer[: min(_BLOCK, size - done)]], start + done)
        if not count:
            raise StreamFault(f"has only {done} of {size} bytes")
        block = buffer[:count]
        sha256.update(block)
        crc32 = zlib.crc32(block, crc32)
        if copy_to is not None:
            _write(copy_to[0], block, copy_to[1] + done)
        done += count
        advance(count)
    return Digests(sha256.hexdigest(), crc32)


def digest_file(path: Path, size: int, what_for: str, *, copy_to: tuple[int, int] | None, advance: Advance) -> Digests:
    """Hash a file that has been measured before; arguments as of `digest_stream`.

    Args:
        path: the file.
        size: its bytes, as they were measured.
        what_for: what is being done with it, such as `packed`, for errors.
        copy_to: descriptor and place to copy it to.
        advance: called with the bytes that were read since the last call.

    Raises:
        CheckpointError: it has another size by now.
        OSError: it cannot be read, or the copy not be written.
    """
    try:
        with path.open("rb", buffering=0) as file:
            found = digest_stream(file.fileno(), 0, size, copy_to=copy_to, advance=advance)
            if os.fstat(file.fileno()).st_size == size:
                return found
    except StreamFault as fault:
        raise CheckpointError(f"{path} {fault}: it was changed while it was {what_for}") from None
    raise CheckpointError(f"{path} has grown while it was {what_for}")


def in_parallel(work: Callable[[int, Advance], None], sizes: Sequence[int], progress: Progress | None) -> None:
    """Do a piece of work for each file, on all cores, the largest first.

    Args:
        work: called with the number of a file and the `advance` of `digest_stream`.
        sizes: bytes of every file.
        progress: called with (done, of all) in bytes, by one thread at a time.

    Raises:
        Exception: the first that `work` raised, by the order of the files; what has not begun is not done then.
    """
    total, done, lock, stop = sum(sizes), 0, threading.Lock(), threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        if stop.is_set():
            raise StreamFault("was not read to its end")
        if progress is not None:
            with lock:
                done += count
                progress(done, total)

    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            futures = {number: pool.submit(work, number, advance) for number in order}
            ended, _ = wait(futures.values(), return_when="FIRST_EXCEPTION")
            for number in sorted(futures):
                if futures[number] in ended:
                    futures[number].result()
        except BaseException:
            stop.set()  # a keyboard interrupt does not wait for 100 GB
            pool.shutdown(cancel_futures=True)
            raise


def write_at(descriptor: int, data: bytes, start: int) -> None:
    """Write all of `data` at a place in a file."""
    _write(descriptor, memoryview(data), start)


def read_at(descriptor: int, size: int, start: int) -> bytes:
    """Up to `size` bytes from a place in a file; fewer only at its end."""
    parts = []
    while size > 0:
        part = os.pread(descriptor, size, start)
        if not part:
            break
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _write(descriptor: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count
