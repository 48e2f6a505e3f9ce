import os
import subprocess
import sys
from pathlib import Path

import pytest

from srd_modifier import autoload
from srd_modifier.errors import SRDError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages that is not the one of this environment."""
    directory = tmp_path / "site-packages"
    directory.mkdir()
    monkeypatch.setattr(autoload.sysconfig, "get_paths", lambda: {"purelib": str(directory)})
    return directory


def run(site: Path, code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A Python process that starts as if `site` were its site-packages; a .pth file there is read first."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    code = f"import site, sys; site.addsitedir({str(site)!r}); {code}"
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site)


def test_it_is_off_until_it_is_turned_on(site):
    assert not autoload.is_on()
    assert list(site.iterdir()) == []
    assert autoload.turn_on() == autoload.pth_file() == site / "srd_modifier_autoload.pth"
    assert autoload.is_on()
    assert [path.name for path in site.iterdir()] == ["srd_modifier_autoload.pth"]


def test_on_twice_is_on(site):
    autoload.turn_on()
    before = autoload.pth_file().read_text()
    autoload.turn_on()
    assert autoload.is_on()
    assert autoload.pth_file().read_text() == before
    assert len(list(site.iterdir())) == 1


def test_off_removes_the_file_and_nothing_else(site):
    (site / "other.pth").write_text("# somebody else's\n")
    autoload.turn_on()
    assert autoload.turn_off() is True
    assert not autoload.is_on()
    assert [path.name for path in site.iterdir()] == ["other.pth"]


def test_off_without_on_says_so():
    assert autoload.turn_off() is False


def test_a_site_packages_that_cannot_be_written_is_a_sentence(site):
    site.rmdir()
    with pytest.raises(
        SRDError, match=r"cannot write .*autoload\.pth: No such file or directory; autoload needs a virt"
    ):
        autoload.turn_on()
    assert not autoload.is_on()


def test_a_file_that_cannot_be_removed_is_a_sentence():
    autoload.pth_file().mkdir()
    with pytest.raises(SRDError, match=r"cannot remove .*srd_modifier_autoload\.pth: Is a directory"):
        autoload.turn_off()


def test_the_default_place_is_the_site_packages_of_this_environment(monkeypatch):
    monkeypatch.undo()
    assert autoload.pth_file() == Path(pytest.__file__).parents[1] / "srd_modifier_autoload.pth"


def test_one_line_is_written():
    """`site` runs a line that begins with `import`, and takes any other for a directory."""
    (line,) = autoload.turn_on().read_text().splitlines()
    assert line.startswith("import ")


# what the line does


def test_the_line_registers_the_package_and_imports_nothing_heavy(site):
    autoload.turn_on()
    done = run(
        site,
        "print(sorted({'srd_modifier', 'torch', 'transformers', 'llmcompressor'} & set(sys.modules)))",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "['srd_modifier']\n", "")


@pytest.mark.slow
def test_transformers_and_llm_compressor_find_the_plugin_without_an_import(site):
    autoload.turn_on()
    done = run(
        site,
        "import llmcompressor; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m;"
        "from llmcompressor.modifiers.factory import ModifierFactory as f;"
        "print(m['compressed-tensors'].__name__, f._registered_registry['SRDModifier'].__name__)",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "SRDQuantizer SRDModifier"


def test_without_the_line_they_do_not(site):
    done = run(site, "print('srd_modifier' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_the_line_is_harmless_where_the_package_is_gone(site):
    autoload.turn_on()
    done = run(site, "print('srd_modifier' in sys.modules)", "-I", "-S")  # no environment, no site-packages
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
