"""What quantizing is expected to take: the answer of a probe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """What quantizing is expected to take on this machine.

    Attributes:
        seconds: from the first byte read to the last one written, imports not counted; about.
        layers: decoder layers of the runs that it is drawn from.
        tokens: of the calibration data that it is for; None for a recipe without data.
        peak_bytes: the most that will be resident, imports and mapped files counted; None where it is not known.
        why_no_memory: why there is no such figure.
    """

    seconds: float
    layers: tuple[int, ...]
    tokens: int | None = None
    peak_bytes: int | None = None
    why_no_memory: str | None = None
