"""Let every Python process of this environment find the plugin without an import.

A `.pth` file of one line in site-packages, written only when asked for. It looks before it imports, so that an
environment from which the package was removed goes on working.
"""

import sysconfig
from pathlib import Path

from srd_modifier.errors import SRDError

_LINE = 'import importlib.util; importlib.util.find_spec("srd_modifier") and __import__("srd_modifier")\n'


def pth_file() -> Path:
    """Where the line is, or would be."""
    return Path(sysconfig.get_paths()["purelib"]) / "srd_modifier_autoload.pth"


def is_on() -> bool:
    """Whether the file is there."""
    return pth_file().is_file()


def turn_on() -> Path:
    """Write the file and return its path.

    Raises:
        SRDError: site-packages cannot be written to.
    """
    from srd_modifier.checkpoint.atomic import write_text

    try:
        write_text(pth_file(), _LINE)
    except SRDError as error:
        raise SRDError(f"{error}; autoload needs a virtual environment of your own") from error
    return pth_file()


def turn_off() -> bool:
    """Remove the file; False if there was none.

    Raises:
        SRDError: it cannot be removed.
    """
    try:
        pth_file().unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SRDError(f"cannot remove {pth_file()}: {error.strerror}") from error
    return True
