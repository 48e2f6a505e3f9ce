"""What goes into a container: the files of a checkpoint directory, a GGUF file, or both."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from srd_modifier.axm.names import RESERVED, NameFault, check_names
from srd_modifier.errors import CheckpointError

SIGNATURE = "model.sig"


def find_sources(paths: Sequence[Path]) -> dict[str, Path]:
    """The files to pack, by their names in the container.

    Of a directory all files count but hidden ones; a GGUF file stands beside them.

    Args:
        paths: at most one directory, and GGUF files.

    Raises:
        CheckpointError: something is missing, is no regular file, or has a name that a container cannot hold.
    """
    files: dict[str, Path] = {}
    if len([path for path in paths if path.is_dir()]) > 1:
        raise CheckpointError("a container holds one checkpoint directory, more than one was given")
    for path in paths:
        if path.is_dir():
            found = _in_directory(path)
        elif path.is_file():
            if path.suffix != ".gguf":
                raise CheckpointError(f"{path} is neither a directory nor a file whose name ends in .gguf")
            found = {path.name: path}
        else:
            raise CheckpointError(f"{path}: there is no such file or directory")
        for name, file in found.items():
            if name in files and not files[name].samefile(file):
                raise CheckpointError(f"{files[name]} and {file} would have the same name in the container")
            files[name] = file
    if not files:
        raise CheckpointError(f"{paths[0]}: there are no files to pack")
    for name in RESERVED:
        if name in files:
            raise CheckpointError(f"{files[name]}: a container keeps the name {name} for itself; rename the file")
    try:
        check_names(files)
    except NameFault as fault:
        raise CheckpointError(f"{paths[0]}: {fault}, so it cannot be packed") from None
    return files


def _in_directory(directory: Path) -> dict[str, Path]:
    files = {}
    for folder, folders, names in os.walk(directory):
        for name in [name for name in folders if (Path(folder) / name).is_symlink() and not name.startswith(".")]:
            raise CheckpointError(f"{Path(folder) / name} is a symbolic link to a folder, which is not packed")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(folder) / name
                _check_file(directory, path)
                files[path.relative_to(directory).as_posix()] = path
    return files


def _check_file(directory: Path, path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode) and not _is_in_cache(directory, path):
        raise CheckpointError(f"{path} is a symbolic link to {path.readlink()}; copy the file, links are not packed")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file, so it cannot be packed")


def _is_in_cache(directory: Path, link: Path) -> bool:
    """Whether it is a file of a snapshot in the Hugging Face cache, all of which are links to blobs."""
    snapshot = directory.resolve()
    blobs = snapshot.parents[1] / "blobs" if len(snapshot.parents) > 1 else None
    return snapshot.parent.name == "snapshots" and link.resolve().parent == blobs
