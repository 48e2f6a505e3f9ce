"""What of an unfinished quantization is on the disk: one line for every step, written when the step's bytes are.

The first line says what is being done, so that no other model, recipe or version continues it. A line that a kill has
cut off is not counted, and neither is a step whose bytes on the disk are not those of its line.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srd_modifier.errors import CheckpointError


@dataclass(frozen=True)
class Record:
    """One step that is done: SHA-256 of the bytes written.

    Attributes:
        step: its name.
        base: by tensor of the W4 model.
        residual: by module and suffix.
        lost: whether quantizing lost anything in a corrected module.
    """

    step: str
    base: dict[str, str]
    residual: dict[str, dict[str, str]]
    lost: bool


class Journal:
    """The file of a quantization's finished steps; the disk's refusals are CheckpointErrors.

    Args:
        path: of the file.
        task: what is being done, by field: model, recipe, versions.
    """

    def __init__(self, path: Path, task: Mapping[str, str]) -> None:
        self.path = path
        self._task = dict(task)

    def begin(self) -> None:
        """Start a new file."""
        self._write(json.dumps(self._task), "wb")

    def add(self, record: Record) -> None:
        """Note a step as done; its bytes must be on the disk."""
        self._write(json.dumps(asdict(record)), "ab")

    def read(self) -> list[Record]:
        """The steps that are done, in order; what a kill cut off is removed from the file.

        Raises:
            CheckpointError: the file is another task's, and the message says in which field, or it is damaged.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return []
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            task, *records = lines
            done = [_record(record) for record in records]
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{self.path} is damaged, so that the quantization cannot be resumed; pass --overwrite to start anew"
            ) from None
        for field, value in self._task.items():
            if not isinstance(task, dict) or task.get(field) != value:
                raise CheckpointError(
                    f"{self.path.parent} was begun with another {field}, so that it cannot be resumed; pass "
                    "--overwrite to start anew"
                )
        if whole != content:
            os.truncate(self.path, len(whole))
        return done

    def _write(self, line: str, mode: str) -> None:
        try:
            with self.path.open(mode) as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error


def _record(line: Any) -> Record:
    """A line as it was written.

    Raises:
        TypeError: it is something else.
    """
    record = Record(**line)
    named = isinstance(record.base, dict) and isinstance(record.residual, dict) and isinstance(record.step, str)
    if not named or not all(isinstance(digests, dict) for digests in record.residual.values()):
        raise TypeError
    return record
