"""Which names a file in a container may have.

A container is unpacked on other people's machines. A name that leads out of the target, that another system reads as
something else, or that falls together with a second name there, is refused when packing and when reading.
"""

import unicodedata
from collections.abc import Iterable, Iterator

HEADER, MANIFEST, POLICY = "axm.json", "manifest.json", "met.json"
RESERVED = (HEADER, MANIFEST)

MAX_FILES = 100_000
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255
_MAX_PARTS = 32
# they end a line, or let the rest of it be read from right to left
_CONTROL = {"Cc", "Zl", "Zp"}
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class NameFault(ValueError):  # noqa: N818 - what is wrong with a name, in words that follow it
    """Why a name is refused, in words that follow the name."""


def check_name(name: str) -> None:
    """Raise NameFault unless `name` is a plain relative path with `/` between its parts."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise NameFault("is not valid UTF-8") from None
    if not name:
        raise NameFault("is empty")
    if name.startswith("/"):
        raise NameFault("is an absolute path")
    if len(name) > 1 and name[1] == ":":
        raise NameFault("names a drive")
    if ":" in name:
        raise NameFault("has a colon, behind which Windows hides bytes")
    if "\\" in name:
        raise NameFault("has a backslash")
    if any(map(_is_control, name)):
        raise NameFault("has a control character")
    parts = name.split("/")
    if ".." in parts:
        raise NameFault("leads out of the folder with `..`")
    if "" in parts or "." in parts:
        raise NameFault("has an empty part or a `.`")
    if any(part[-1] in ". " for part in parts):
        raise NameFault("has a part that ends in a dot or a space, which Windows leaves out")
    if any(part.split(".")[0].strip().upper() in _DEVICES for part in parts):
        raise NameFault("is a device on Windows")
    if len(encoded) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        raise NameFault("is too long")
    if len(parts) > _MAX_PARTS:
        raise NameFault("is too deep")


def check_names(names: Iterable[str]) -> None:
    """Raise NameFault unless every name is good, and all of them are different files on every file system.

    The message begins with the name that is at fault.
    """
    seen: dict[str, str] = {}
    for count, name in enumerate(names):
        if count >= MAX_FILES:
            raise NameFault(f"{name!r} is one too many: a container holds at most {MAX_FILES} files")
        try:
            check_name(name)
        except NameFault as fault:
            raise NameFault(f"{name!r} {fault}") from None
        if name in RESERVED:
            raise NameFault(f"{name!r} is a name that the container keeps for itself")
        folded = _fold(name)
        if folded in seen:
            same = "is there twice" if seen[folded] == name else f"differs from {seen[folded]!r} only in spelling"
            raise NameFault(f"{name!r} {same}")
        seen[folded] = name
    for folded, name in seen.items():
        for folder in _folders(folded):
            if folder in seen:
                raise NameFault(f"{seen[folder]!r} is both a file and the folder of {name!r}")


def _folders(name: str) -> Iterator[str]:
    end = name.find("/")
    while end >= 0:
        yield name[:end]
        end = name.find("/", end + 1)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _DIRECTIONS


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
