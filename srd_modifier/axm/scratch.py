"""A private place for the files of a container that another library wants to open by their names."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from srd_modifier.errors import CheckpointError


def private_directory() -> Path:
    """A new directory that only this user can enter, removed when the process ends.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix="srd-axm-"))  # of mode 0700
    except OSError as error:
        raise CheckpointError(
            f"cannot make a directory in {tempfile.gettempdir()}: {error.strerror or error}"
        ) from error
    atexit.register(_remove, directory, os.getpid())
    return directory


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it, which ends before
        shutil.rmtree(directory, ignore_errors=True)
