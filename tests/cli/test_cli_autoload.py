import sysconfig
from pathlib import Path

import pytest


@pytest.fixture
def pth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, in a site-packages that is not the one of this environment."""
    (tmp_path / "site-packages").mkdir()
    path = tmp_path / "site-packages" / "srd_modifier_autoload.pth"
    monkeypatch.setattr("srd_modifier.autoload.pth_file", lambda: path)
    return path


def test_on_status_off(srd, pth):
    def command(name: str) -> str:
        done = srd("autoload", name)
        assert (done.status, done.stderr) == (0, "")
        return done.stdout

    assert command("status") == f"off: {pth}\n"
    assert command("on") == f"on: {pth}\n"
    assert pth.is_file()
    assert command("status") == f"on: {pth}\n"
    assert command("on") == f"on: {pth}\n"
    assert command("off") == "off\n"
    assert not pth.exists()
    assert command("off") == "off already\n"
    assert command("status") == f"off: {pth}\n"


def test_a_place_that_cannot_be_written_is_a_sentence(srd, pth):
    pth.parent.rmdir()
    sentence = srd("autoload", "on").sentence
    assert sentence == (
        f"cannot write {pth}: No such file or directory; autoload needs a virtual environment of your own"
    )


def test_a_file_that_cannot_be_removed_is_a_sentence(srd, pth):
    pth.mkdir()
    assert srd("autoload", "off").sentence == f"cannot remove {pth}: Is a directory"


def test_no_arguments_show_the_commands(srd):
    done = srd("autoload")
    assert done.status == 2
    assert all(name in done.stdout + done.stderr for name in ("on", "off", "status"))


def test_the_installed_command_says_where(srd_process):
    done = srd_process("autoload", "status")
    assert (done.status, done.stderr) == (0, "")
    state, _, path = done.stdout.rstrip("\n").partition(": ")
    assert state in ("on", "off")
    assert path == str(Path(sysconfig.get_paths()["purelib"]) / "srd_modifier_autoload.pth")
