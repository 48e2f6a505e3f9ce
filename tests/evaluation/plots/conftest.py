import struct
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def words() -> Callable[[Path], list[str]]:
    """The texts of an SVG picture, which matplotlib repeats in comments beside their outlines."""

    def read(picture: Path) -> list[str]:
        return [part.partition(" -->")[0] for part in picture.read_text(encoding="utf-8").split("<!-- ")[1:]]

    return read


@pytest.fixture
def size_of() -> Callable[[Path], tuple[int, int]]:
    """Width and height of a PNG picture, from its header."""

    def read(picture: Path) -> tuple[int, int]:
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        return struct.unpack(">II", data[16:24])

    return read
