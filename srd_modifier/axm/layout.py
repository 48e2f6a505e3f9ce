"""The exact bytes of a container around its files: a stored zip, aligned, with nothing left to choose.

Names, sizes and checksums decide every other byte. A reader therefore does not trust what the zip says about itself: it
builds what must be there and compares. The format is PKWARE's APPNOTE 6.3.9, of which only this is used: no
compression, no comments, no times, UTF-8 names, zip64 where a number does not fit.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

# pages of most machines: what starts here can be mapped into memory by itself
ALIGNMENT = 4096

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_UTF8 = 0x800
_FIRST_OF_1980 = 0x21
_MADE_BY_UNIX = 3 << 8 | 45
_REGULAR_FILE = 0o100644 << 16
_ZIP64_ID = 0x0001
_PADDING_ID = 0x5253  # "SR", not one of the registered
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """Where a file is.

    Attributes:
        name: its path in the container.
        size: in bytes.
        start: where its local header begins.
        data: where its bytes begin, a multiple of `ALIGNMENT`.
    """

    name: str
    size: int
    start: int
    data: int

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.data + self.size


class Layout:
    """Places and headers of the files of a container.

    Attributes:
        entries: in the order of the container.
        central: where the central directory begins.
        size: bytes of the whole container.
    """

    def __init__(self, files: Iterable[tuple[str, int]]) -> None:
        """Lay files out, given by name and size."""
        self.entries: list[Entry] = []
        position = 0
        for name, size in files:
            least = position + _LOCAL.size + len(name.encode()) + len(_sizes64(size, size)) + 4
            data = -(-least // ALIGNMENT) * ALIGNMENT
            self.entries.append(Entry(name, size, position, data))
            position = data + size
        self.central = position
        self.size = position + len(self.tail([0] * len(self.entries)))

    def local_header(self, entry: Entry, checksum: int) -> bytes:
        """All bytes from `entry.start` to `entry.data`; `checksum` is the CRC-32 of the file."""
        name, extra = entry.name.encode(), _sizes64(entry.size, entry.size)
        padding = entry.data - entry.start - _LOCAL.size - len(name) - len(extra) - 4
        extra += struct.pack("<2H", _PADDING_ID, padding) + bytes(padding)
        size = min(entry.size, _FULL32)
        fixed = _LOCAL.pack(
            b"PK\3\4", _version(extra), _UTF8, 0, 0, _FIRST_OF_1980, checksum, size, size, len(name), len(extra)
        )
        return fixed + name + extra

    def tail(self, checksums: Sequence[int]) -> bytes:
        """All bytes after the last file: central directory and end records."""
        pairs = zip(self.entries, checksums, strict=True)
        directory = b"".join(chain.from_iterable(_central_header(entry, checksum) for entry, checksum in pairs))
        count, size = len(self.entries), len(directory)
        end = b""
        if count >= _FULL16 or size >= _FULL32 or self.central >= _FULL32:
            rest = _END64.size - 12
            end += _END64.pack(b"PK\6\6", rest, _MADE_BY_UNIX, 45, 0, 0, count, count, size, self.central)
            end += _LOCATOR64.pack(b"PK\6\7", 0, self.central + size, 1)
        count, size, start = min(count, _FULL16), min(size, _FULL32), min(self.central, _FULL32)
        return directory + end + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)


def _central_header(entry: Entry, checksum: int) -> tuple[bytes, bytes, bytes]:
    name, extra = entry.name.encode(), _sizes64(entry.size, entry.size, entry.start)
    size, start = min(entry.size, _FULL32), min(entry.start, _FULL32)
    fixed = _CENTRAL.pack(
        *(b"PK\1\2", _MADE_BY_UNIX, _version(extra), _UTF8, 0, 0, _FIRST_OF_1980, checksum, size, size),
        *(len(name), len(extra), 0, 0, 0, _REGULAR_FILE, start),
    )
    return fixed, name, extra


def _sizes64(*numbers: int) -> bytes:
    """The zip64 field with those of the numbers that do not fit into 32 bits."""
    large = [number for number in numbers if number >= _FULL32]
    return struct.pack(f"<2H{len(large)}Q", _ZIP64_ID, 8 * len(large), *large) if large else b""


def _version(extra: bytes) -> int:
    return 45 if extra[:2] == _ZIP64_ID.to_bytes(2, "little") else 20
