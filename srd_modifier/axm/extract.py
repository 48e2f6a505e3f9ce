"""Unpacking: what appears at the target has been verified, byte by byte, on its way there."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from srd_modifier.axm.container import Container
from srd_modifier.axm.manifest import FileRecord
from srd_modifier.axm.streams import Progress
from srd_modifier.checkpoint.atomic import new_directory, new_file, refuse_existing_file
from srd_modifier.errors import CheckpointError


def extract(
    container: Container, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> list[str]:
    """Unpack all files into a directory, which appears when everything in it is verified.

    Args:
        container: open, its structure verified.
        output: the directory to make.
        overwrite: replace an existing model directory.
        progress: called with (done, of all) in bytes.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: a file was changed, the output is in the way, or the disk is full. The output is untouched.
    """
    records = container.manifest.files
    with new_directory(output, overwrite=overwrite) as staging:
        extract_files(container, records, staging, progress)
    return [record.path for record in records]


def extract_gguf(
    container: Container, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> list[str]:
    """Unpack the GGUF files only: one to a file whose name ends in `.gguf`, otherwise all of them into a directory.

    Arguments and errors as those of `extract`; also an error is a container without a GGUF file, or with several where
    `output` names one.
    """
    records = [record for record in container.manifest.files if record.path.endswith(".gguf")]
    if not records:
        raise CheckpointError(f"{container.path} holds no GGUF file")
    if output.suffix != ".gguf":
        with new_directory(output, overwrite=overwrite) as staging:
            extract_files(container, records, staging, progress)
        return [record.path for record in records]
    if len(records) > 1:
        names = ", ".join(record.path for record in records)
        raise CheckpointError(f"{container.path} holds {len(records)} GGUF files ({names}); name a directory for them")
    refuse_existing_file(output, overwrite=overwrite)
    with new_file(output) as file:
        container.read_files(records, progress=progress, copy_to=lambda record: nullcontext(file))
    return [records[0].path]


def extract_files(
    container: Container, records: Sequence[FileRecord], folder: Path, progress: Progress | None = None
) -> None:
    """Copy files of a container into a folder that nobody else sees yet; when this raises, it must be thrown away.

    Raises:
        CheckpointError: a file was changed.
        OSError: the disk refused a write.
    """
    for record in records:
        (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
    container.read_files(
        records, progress=progress, copy_to=lambda record: (folder / record.path).open("xb", buffering=0)
    )
