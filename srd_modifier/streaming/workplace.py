"""Where a streamed quantization lies until it is whole: beside its output, with a journal of what is done."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.errors import CheckpointError
from srd_modifier.streaming.journal import Journal, Record

_JOURNAL = "finished.jsonl"
_LOCK = "lock"
_STAGING = "staging"


@dataclass(frozen=True)
class Workplace:
    """A directory to work in.

    Attributes:
        directory: itself.
        journal: of what is done there.
        done: what was done before.
    """

    directory: Path
    journal: Journal
    done: list[Record]

    def note_staging(self, staging: Path) -> None:
        """Note the directory that will become the output, so that it is found if this process is killed now."""
        (self.directory / _STAGING).write_text(str(staging), encoding="utf-8")


def unfinished(output: Path) -> Path:
    """Where a streamed quantization to `output` waits until it is whole."""
    output = output.absolute()
    return output.parent / f".{output.name}.unfinished.partial"


@contextmanager
def workplace(output: Path, task: Mapping[str, str], *, overwrite: bool, resume: bool) -> Iterator[Workplace]:
    """A workplace for one process; it is removed after success and after an error.

    A process that is killed or interrupted leaves it, to be resumed.

    Args:
        output: what is made.
        task: what is being done, by field.
        overwrite: throw away an unfinished one, unless `resume`.
        resume: go on with an unfinished one.

    Raises:
        CheckpointError: there is one already and nobody said what to do with it, it is another task's, or another
            process works in it.
    """
    from filelock import FileLock, Timeout

    directory = unfinished(output)
    journal = Journal(directory / _JOURNAL, task)
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
        try:
            if not done:
                _clear(directory)
                journal.begin()
            _remove_abandoned(directory / _STAGING, output)
            yield Workplace(directory, journal, done)
        except Exception:
            shutil.rmtree(directory)
            raise
        shutil.rmtree(directory)
    finally:
        lock.release()


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
        staging = note.read_text(encoding="utf-8")
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
        note.unlink()
    target = output.resolve()
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.suffix == ".partial":
            with suppress(OSError):  # it is not empty, or no directory
                path.rmdir()
