"""What of an unfinished quantization is on the disk: one line for every step, written when the step's bytes are.

The first line says what is being done, so that no other model, recipe or version continues it. A line that a kill has
cut off is not counted. Whether the disk still holds the bytes of a line is for who wrote them to check.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from srd_modifier.errors import CheckpointError

RecordT = TypeVar("RecordT")


class Journal(Generic[RecordT]):
    """The file of a quantization's finished steps; the disk's refusals are CheckpointErrors.

    Args:
        path: of the file.
        task: what is being done, by field: model, recipe, versions.
        parse: a step, which is a dataclass of JSON's values, from what JSON gives; TypeError if it is something else.
    """

    def __init__(self, path: Path, task: Mapping[str, str], parse: Callable[[Any], RecordT]) -> None:
        self.path = path
        self._task = dict(task)
        self._parse = parse

    def begin(self) -> None:
        """Start a new file."""
        self._write(json.dumps(self._task), "wb")

    def add(self, record: RecordT) -> None:
        """Note a step as done; its bytes must be on the disk."""
        fields: Any = record
        self._write(json.dumps(asdict(fields)), "ab")

    def read(self) -> list[RecordT]:
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
            task, *lines = [json.loads(line) for line in whole.splitlines()]
            self._check(task)
            done = [self._parse(line) for line in lines]
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{self.path} is damaged, so that the quantization cannot be resumed; pass --overwrite instead of "
                "--resume to start anew"
            ) from None
        if whole != content:
            os.truncate(self.path, len(whole))
        return done

    def _check(self, task: Any) -> None:
        if not isinstance(task, dict):
            raise TypeError
        for field in dict.fromkeys([*self._task, *task]):
            if task.get(field) != self._task.get(field):
                raise another(self.path.parent, field)

    def _write(self, line: str, mode: str) -> None:
        try:
            with self.path.open(mode) as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error


def another(directory: Path, field: str) -> CheckpointError:
    """The error for an unfinished quantization of something else."""
    return CheckpointError(
        f"{directory} was begun with another {field}, so that it cannot be resumed; pass --overwrite instead of "
        "--resume to start anew"
    )
