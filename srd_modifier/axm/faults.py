"""What is wrong with a container whose bytes are not the ones that its manifest asks for, in one sentence.

The decision to refuse it has been made, by comparing bytes; here its own zip directory is read, with suspicion, only to
say what happened to it.
"""

import stat
import struct
from collections import Counter
from dataclasses import dataclass

from srd_modifier.axm.layout import Layout
from srd_modifier.axm.names import NameFault, check_name
from srd_modifier.axm.streams import read_at

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
# that of a container takes much less, and what is parsed takes several times as much memory
_SMALL_DIRECTORY, _DIRECTORY_SHARE = 1 << 17, 8
_LONGEST_COMMENT = 0xFFFF


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file as the zip directory has it."""

    name: str
    method: int
    packed: int
    size: int
    mode: int
    start: int


def explain(descriptor: int, size: int, layout: Layout) -> str:
    """What differs from the layout, in words that follow the container's name and a colon."""
    if size > layout.size and read_at(descriptor, 4, layout.size - 22) == b"PK\5\6":
        more = size - layout.size
        return "1 byte was appended to it" if more == 1 else f"{more} bytes were appended to it"
    listed = _directory(descriptor, size)
    if listed is None:
        if size < layout.size:
            return f"it is truncated: it has {size} bytes of {layout.size}"
        return "its zip directory is damaged"
    return _of_one(listed) or _of_all(listed, layout) or "bytes between its files or in its zip directory were changed"


def explain_without_layout(descriptor: int, size: int) -> str:
    """What is wrong with a container whose header is not where it must be; words as those of `explain`."""
    if not size:
        return "it is empty"
    listed = _directory(descriptor, size)
    if listed is None:
        if read_at(descriptor, 4, 0) == b"PK\3\4":
            return "it is truncated: it has no zip directory"
        return "it is not an .axm container"
    names = [entry.name for entry in listed]
    fault = _of_one(listed)
    if fault is None and "axm.json" not in names:
        return "axm.json is missing, so it is not an .axm container"
    return fault or "its files are not where an .axm container has them; it was packed again by another tool"


def _of_one(listed: list[_Listed]) -> str | None:
    """What is wrong with a file by itself."""
    for entry in listed:
        try:
            check_name(entry.name)
        except NameFault as fault:
            return f"the entry {entry.name!r} {fault}"
        if stat.S_ISLNK(entry.mode):
            return f"the entry {entry.name!r} is a symbolic link"
        if entry.method or entry.packed != entry.size:
            return (
                f"the entry {entry.name!r} is compressed, {entry.packed} bytes to {entry.size}; "
                "a container holds its files as they are"
            )
    repeated = next((name for name, count in Counter(entry.name for entry in listed).items() if count > 1), None)
    if repeated is not None:
        return f"the entry {repeated!r} is there twice"
    position = -1
    for entry in sorted(listed, key=lambda entry: entry.start):
        if entry.start < position:
            return f"the entry {entry.name!r} overlaps the one before it"
        position = entry.start + 30 + len(entry.name.encode("utf-8", "surrogateescape")) + entry.size
    return None


def _of_all(listed: list[_Listed], layout: Layout) -> str | None:
    """What is wrong with their set or order."""
    promised = {entry.name: entry for entry in layout.entries}
    found = {entry.name: entry for entry in listed}
    missing = [name for name in promised if name not in found]
    extra = [name for name in found if name not in promised]
    if len(missing) == len(extra) == 1 and found[extra[0]].size == promised[missing[0]].size:
        return f"the entry {missing[0]!r} was renamed to {extra[0]!r}"
    if missing:
        return f"the entry {missing[0]!r} is missing"
    if extra:
        return f"the entry {extra[0]!r} is extra, the manifest does not have it"
    names = [entry.name for entry in sorted(listed, key=lambda entry: entry.start)]
    if names != [*promised] or [entry.name for entry in listed] != [*promised]:
        return "its entries are in another order than the manifest has them"
    for entry in listed:
        if entry.size != promised[entry.name].size:
            return f"the entry {entry.name!r} has {entry.size} bytes, the manifest gives it {promised[entry.name].size}"
    return None


def _directory(descriptor: int, size: int) -> list[_Listed] | None:
    """The zip directory, None where there is no whole one."""
    tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
    tail = read_at(descriptor, size - tail_start, tail_start)
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
    if at < 0:
        return None
    *_, count, length, start, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR64.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        end64 = read_at(descriptor, _END64.size, min(size, _LOCATOR64.unpack_from(tail, locator)[2]))
        if len(end64) < _END64.size or end64[:4] != b"PK\6\6":
            return None
        *_, count, length, start = _END64.unpack(end64)
    if length > max(_SMALL_DIRECTORY, size // _DIRECTORY_SHARE) or start + length > size:
        return None
    return _parse(read_at(descriptor, length, start), count)


def _parse(directory: bytes, count: int) -> list[_Listed] | None:
    listed: list[_Listed] = []
    at = 0
    while at < len(directory):
        if len(directory) - at < _CENTRAL.size or directory[at : at + 4] != b"PK\1\2":
            return None
        values = _CENTRAL.unpack_from(directory, at)
        method, packed, size, name_length, extra_length, comment = (*values[4:5], *values[8:10], *values[10:13])
        attributes, start = values[-2:]
        at += _CENTRAL.size
        if at + name_length + extra_length + comment > len(directory):
            return None
        name = directory[at : at + name_length].decode("utf-8", "surrogateescape")
        extra = directory[at + name_length : at + name_length + extra_length]
        size, packed, start = _full_sizes(extra, size, packed, start)
        listed.append(_Listed(name, method, packed, size, attributes >> 16, start))
        at += name_length + extra_length + comment
    return listed if len(listed) == count else None


def _full_sizes(extra: bytes, *short: int) -> list[int]:
    """Size, packed size and start, those from the zip64 field that do not fit into 32 bits."""
    numbers = list(short)
    if extra[:2] == b"\1\0":
        at = 4
        for place, number in enumerate(numbers):
            if number == 0xFFFFFFFF and at + 8 <= len(extra):
                numbers[place] = int.from_bytes(extra[at : at + 8], "little")
                at += 8
    return numbers
