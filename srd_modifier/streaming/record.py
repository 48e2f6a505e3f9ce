"""What a streamed quantization notes of a step that is done."""

from dataclasses import dataclass
from typing import Any


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

    @classmethod
    def parse(cls, line: Any) -> "Record":
        """A line as it was written.

        Raises:
            TypeError: it is something else.
        """
        record = cls(**line)
        named = isinstance(record.base, dict) and isinstance(record.residual, dict) and isinstance(record.step, str)
        if not named or not all(isinstance(digests, dict) for digests in record.residual.values()):
            raise TypeError
        return record
