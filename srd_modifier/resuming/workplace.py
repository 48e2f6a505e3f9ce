"""Where a quantization lies until it is whole: beside its output, with a journal of what is done."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from srd_modifier.errors import CheckpointError
from srd_modifier.resuming.journal import Journal, RecordT

_JOURNAL = "finished.jsonl"
_LOCK = "lock"
_STAGING = "staging"


@dataclass(frozen=True)
class Workplace(Generic[RecordT]):
    """A directory to work in.

    Attributes:
        directory: itself.
        journal: of what is done there.
        done: what was done before.
        is_moved: whether the output was whole and in its place when the process was killed.
    """

    directory: Path
    journal: Journal[RecordT]
    done: list[RecordT]
    is_moved: bool

    def note_staging(self, staging: Path) -> None:
        """Note the directory that will become the output, so that it is found if this process is killed now."""
        (self.directory / _STAGING).write_text(str(staging), encoding="utf-8")


def unfinished(output: Path) -> Path:
    """Where a quantization to `output` waits until it is whole."""
    output = output.absolute()
    return output.parent / f".{output.name}.unfinished.partial"


def is_moved(output: Path) -> bool:
    """Whether a process was killed between moving the whole output to its place and removing its workplace."""
    note = unfinished(output) / _STAGING
    staging = note.read_text(encoding="utf-8") if note.is_file() else ""
    return bool(staging) and not Path(staging).exists() and (output / "config.json").is_file()


@contextmanager
def workplace(
    output: Path, task: Mapping[str, str], parse: Callable[[Any], RecordT], *, overwrite: bool, resume: bool
) -> Iterator[Workplace[RecordT]]:
    """A workplace for one process; it is removed after success, and after an error if nothing was resumed.

    A process that is killed or interrupted leaves it, to be resumed, and so does one that runs out of memory. One that
    resumes it never takes away what was there: its error may be a wrong name of the data.

    Args:
        output: what is made.
        task: what is being done, by field.
        parse: a step of it, from a line of the journal.
        overwrite: throw away an unfinished one, unless `resume`.
        resume: go on with an unfinished one.

    Raises:
        CheckpointError: there is one already and nobody said what to do with it, it is another task's, another process
            works in it, or memory ran out.
    """
    from filelock import FileLock, Timeout

    directory = unfinished(output)
    journal = Journal(directory / _JOURNAL, task, parse)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {error.strerror or error}") from error
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another process is quantizing to {output}; wait for it, or choose another directory"
        ) from None
    try:
        if journal.path.exists() and not (resume or overwrite):
            raise CheckpointError(
                f"an unfinished quantization to {output} waits in {directory}; pass --resume to go on with it, or "
                "--overwrite to start anew"
            )
        done = journal.read() if resume and journal.path.exists() else []
        moved = bool(done) and is_moved(output)
        try:
            if not done:
                _clear(directory)
                journal.begin()
            for path in directory.glob(".*"):  # what a killed process had for itself
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _remove_abandoned(directory / _STAGING, output)
            yield Workplace(directory, journal, done, moved)
        except Exception as error:
            if _is_out_of_memory(error) and journal.read():
                raise CheckpointError(
                    f"memory ran out, and what is finished waits in {directory}; free some, or lower --max-memory "
                    "where the recipe calibrates, and pass --resume to go on"
                ) from error
            if not done:
                shutil.rmtree(directory)
            raise
        shutil.rmtree(directory)
    finally:
        lock.release()


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # what torch raises for the memory of an accelerator, and, as a plain RuntimeError, for the machine's
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _clear(directory: Path) -> None:
    """Remove what another task left: its files may have names that this one does not use, and would be taken along."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_LOCK, _STAGING):
            path.unlink()


def _remove_abandoned(note: Path, output: Path) -> None:
    """Remove the directory that a killed process was about to move to the output: as it noted, or empty before that."""
    if note.is_file():
        text = note.read_text(encoding="utf-8")
        if text:
            staging = Path(text)
            for path in (staging, *_partial(staging)):  # those of `save_pretrained`, which stages once more
                shutil.rmtree(path, ignore_errors=True)
        note.unlink()
    for path in _partial(output.resolve()):
        with suppress(OSError):  # it is not empty, or no directory
            path.rmdir()


def _partial(target: Path) -> list[Path]:
    """What has a temporary name beside a target."""
    paths = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in paths if path.name.startswith(f".{target.name}.") and path.suffix == ".partial"]
