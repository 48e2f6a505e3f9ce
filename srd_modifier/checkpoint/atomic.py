"""Directories and files that appear whole or not at all.

Everything is written under a temporary name beside the target (inside it where it is a mount point), flushed to the
disk, and renamed. A kill at any point leaves the target as it was, or without config.json, or for a moment of an
overwrite with nothing at its name; what stays behind has a name that ends in `.partial`, or begins with
`.srd-residual-` if residuals were waiting to be saved.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from srd_modifier.errors import CheckpointError


@contextmanager
def new_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` to fill; it becomes `target` when the block ends without an error.

    Args:
        target: the directory to make.
        overwrite: replace an existing model directory; otherwise one with files in it is refused.

    Raises:
        CheckpointError: the target is in the way, or the disk refused a write. The target is untouched.
    """
    refuse_existing(target, overwrite=overwrite)
    with _staging(target) as (staging, target):
        yield staging
        flush_tree(staging)
        if staging.parent == target:
            _merge(staging, target, keep_others=False)
        else:
            _swap(staging, target)


@contextmanager
def merge_directory(target: Path) -> Iterator[Path]:
    """As `new_directory`, but an existing directory keeps its other files, as `save_pretrained` promises.

    The old weights and config.json are removed before the new ones are moved in, config.json last: at no moment does
    the target hold a loadable mixture of old and new.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory")
    with _staging(target) as (staging, target):
        yield staging
        flush_tree(staging)
        if target.is_dir() and any(target.iterdir()):
            _merge(staging, target)
        else:
            _swap(staging, target)


@contextmanager
def _staging(target: Path) -> Iterator[tuple[Path, Path]]:
    """The directory to fill and the one that it becomes: the target, or what it links to."""
    real = target.resolve()
    staging = sibling(real)
    if real.is_dir() and real.stat().st_dev != real.parent.stat().st_dev:
        staging = real / staging.name  # a mount point: nothing can be renamed into it from outside
    try:
        staging.mkdir(parents=True)
        yield staging, real
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:  # the library's own, also for a full disk
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `target` is a file, or a directory with files in it that may not be replaced."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory that does not exist yet")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} already exists; choose another directory or pass --overwrite")
    if not (target / "config.json").is_file():
        raise CheckpointError(f"{target} is not a model directory and is not overwritten; remove it yourself")


def refuse_existing_file(target: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `target` is a directory, or a file that may not be replaced."""
    if target.is_dir():
        raise CheckpointError(f"{target} is a directory, expected the name of a file to make")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} already exists; choose another name or pass --overwrite")


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A temporary sibling of `target`, open for writing; it becomes `target` when the block ends without an error.

    Raises:
        CheckpointError: the disk refused a write. The target is untouched.
    """
    temporary = sibling(target)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        flush(target.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole, as UTF-8; errors as `new_file`."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, indented, keys in their own order."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def link_or_copy(source: Path, destination: Path) -> None:
    """The same file under a second name: a hard link where the file system allows it, else a copy."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def flush_tree(directory: Path) -> None:
    """Flush every file and directory below `directory` to the disk, together: a journal commits them at once."""
    paths = [path for path in directory.rglob("*") if not path.is_symlink()]
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(flush, [*paths, directory]))


def sibling(target: Path) -> Path:
    """A name for a temporary file or directory beside `target`, on the same file system."""
    target = target.absolute()
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    else:
        replaced = sibling(target)
        target.rename(replaced)
        try:
            staging.rename(target)
        except OSError:
            replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    flush(target.absolute().parent)


def _merge(staging: Path, target: Path, *, keep_others: bool = True) -> None:
    config = "config.json"
    (target / config).unlink(missing_ok=True)
    for old in list(target.iterdir()):
        of_the_model = old.name == "srd" or fnmatch(old.name, "model*.safetensors*")
        if old != staging and (of_the_model or not keep_others):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for source in sorted(staging.iterdir(), key=lambda path: path.name == config):
        destination = target / source.name
        if destination.is_dir():
            shutil.rmtree(destination)
        source.replace(destination)
    flush_tree(target)
