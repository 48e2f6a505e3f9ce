"""Containers of model directories, packed by the package."""

import shutil
from pathlib import Path

from srd_modifier.axm.keys import Key
from srd_modifier.axm.pack import pack

KEY = Key(b"the key of these tests, 32 bytes or more")
KEY_HEX = b"the key of these tests, 32 bytes or more".hex()


def pack_copy(directory: Path, container: Path, *, others: tuple[Path, ...] = ()) -> Path:
    """A container of a directory's files, of `others` beside them, and of a policy that says nothing."""
    files = container.with_suffix(".files")
    shutil.copytree(directory, files)
    for other in others:
        shutil.copy(other, files)
    (files / "met.json").write_text("{}\n")
    pack([files], container, KEY)
    shutil.rmtree(files)
    return container


def flip_byte(container: Path, content: bytes) -> None:
    """Change one byte in the middle of these bytes, which the container has once."""
    whole = bytearray(container.read_bytes())
    assert whole.count(content) == 1
    whole[whole.index(content) + len(content) // 2] ^= 1
    container.write_bytes(whole)
