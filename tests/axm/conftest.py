"""A directory that can be packed, its container, a key file, and the `srd` command in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import SECRET, container, write_files, write_secret

from srd_modifier import cli
from srd_modifier.axm.keys import Key


@pytest.fixture
def key() -> Key:
    return Key(SECRET)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_secret(tmp_path / "axm.key")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Small files that can be packed."""
    return write_files(tmp_path / "model")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A valid container of the same files."""
    path = tmp_path / "packed.axm"
    path.write_bytes(container())
    return path


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `srd`, which must fail with status 1 and one sentence on stderr that does not show the key; the sentence."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["srd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert stop.value.code == 1, printed
        assert printed.out == ""
        assert printed.err.startswith("srd: ")
        assert printed.err.count("\n") == 1, printed.err
        assert SECRET.decode() not in printed.err
        assert SECRET.hex() not in printed.err.lower()
        return printed.err.removeprefix("srd: ").rstrip("\n")

    return run
