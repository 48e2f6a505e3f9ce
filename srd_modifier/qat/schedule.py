"""How wide weights are at each optimizer step of a training whose bit width falls.

A schedule is a list of milestones, each a share of the training and the width that is reached there. What lies between
two milestones follows from the shape. Progress is computed in exact fractions of the decimal numbers that a user wrote:
0.1 is a tenth here, so that a linear fall from 16 to 4 bits between 0.1 and 0.9 is at exactly 10 bits in the middle.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Real
from typing import Any

from srd_modifier.errors import ConfigError

FULL_PRECISION = 16.0
"""Weights of this width or more are not quantized."""

LEAST_WIDTH = 2.0

SHAPES = ("linear", "cosine", "step")
NAMES = ("linear", "cosine", "step", "constant")
"""The schedules that `QATSchedule.parse` knows by name."""


@dataclass(frozen=True)
class QATSchedule:
    """The width of the weights over a training, which never rises.

    At a milestone the width is exactly its own, after the last it stays. Between two it falls in a straight line
    (`linear`), along half a cosine (`cosine`), or not at all until the next is reached (`step`).

    A milestone of more than 16 bits, as 32 for FP32, means the same as one of 16, no quantization, and is kept as 16: a
    fall to fewer bits begins at 16.

    Attributes:
        milestones: progress, from 0 to 1, and width in bits, at least 2.
        shape: `linear`, `cosine` or `step`.

    Raises:
        ConfigError: there is no milestone, the first is not at progress 0, progress does not increase or leaves 0 to 1,
            a width rises or is below 2, something is no finite number, or the shape is unknown.
    """

    milestones: tuple[tuple[float, float], ...]
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"the shape of a schedule is one of {', '.join(SHAPES)}, not {self.shape!r}")
        given = _checked(self.milestones)
        kept = tuple((progress, min(width, FULL_PRECISION)) for progress, width in given)
        object.__setattr__(self, "milestones", kept)

    @classmethod
    def linear(
        cls, bits: float = 4, warmup: float = 0.1, stabilization: float = 0.1, start: float = 16
    ) -> "QATSchedule":
        """The published schedule: full precision, then a straight fall, then the final width.

        Args:
            bits: the final width.
            warmup: the share of the training, at its beginning, at width `start`.
            stabilization: the share, at its end, at width `bits`.
            start: the first width.

        Raises:
            ConfigError: a share is not from 0 to 1, both leave nothing for the fall, or the widths make no schedule.
        """
        return cls(_ramp(bits, warmup, stabilization, start), "linear")

    @classmethod
    def cosine(
        cls, bits: float = 4, warmup: float = 0.1, stabilization: float = 0.1, start: float = 16
    ) -> "QATSchedule":
        """As `linear`, but the fall is slow at both of its ends: half a cosine."""
        return cls(_ramp(bits, warmup, stabilization, start), "cosine")

    @classmethod
    def steps(
        cls, widths: Sequence[float] = (16, 8, 4), warmup: float = 0.1, stabilization: float = 0.1
    ) -> "QATSchedule":
        """One width after another: the first for the warm-up, the others for equal parts of what follows it.

        The last keeps on through the stabilization. 16, 8 and 4 bits with the default shares are 16 bits for a tenth of
        the training, 8 until its middle, and 4 from there.

        Raises:
            ConfigError: a share is not from 0 to 1, both leave nothing for the fall, there is no warm-up for the first
                of several widths, or the widths make no schedule.
        """
        begin, end = _shares(warmup, stabilization)
        if len(widths) > 1 and begin == 0:
            raise ConfigError("a schedule in steps needs a warm-up above 0, which is the time of its first width")
        parts = max(len(widths) - 1, 1)
        starts = [Fraction(0), *(begin + (end - begin) * part / parts for part in range(parts))]
        # a single width has no need of the second start
        return cls(tuple((float(start), width) for start, width in zip(starts, widths, strict=False)), "step")

    @classmethod
    def constant(cls, bits: float = 4) -> "QATSchedule":
        """One width from the first step to the last."""
        return cls(((0.0, bits),))

    @classmethod
    def parse(cls, text: str, bits: float = 4) -> "QATSchedule":
        """A schedule as the command line takes it.

        It is a name, `linear`, `cosine`, `step` (16, 8 and `bits` bits) or `constant`, with the default shares, or
        milestones, as `0:16,0.1:16,0.9:4`. These are joined by straight lines unless a shape precedes them, as in
        `cosine=0:16,0.9:4` and `step=0:16,0.1:8,0.5:4`.

        Args:
            text: what the user wrote.
            bits: the final width of a schedule that is given by name; milestones have their own.

        Raises:
            ConfigError: the text is neither, or what it describes makes no schedule.

        >>> QATSchedule.parse("linear", bits=3) == QATSchedule.parse("0:16,0.1:16,0.9:3")
        True
        """
        text = text.strip()
        if text == "linear":
            return cls.linear(bits)
        if text == "cosine":
            return cls.cosine(bits)
        if text == "step":
            return cls.steps((*(width for width in (FULL_PRECISION, 8.0) if width > bits), bits))
        if text == "constant":
            return cls.constant(bits)
        shape, equals, milestones = text.rpartition("=")
        if not equals and ":" not in text:
            raise ConfigError(
                f"there is no schedule {text!r}: give {', '.join(NAMES)}, or milestones such as 0:16,0.1:16,0.9:4"
            )
        return cls(
            tuple(_read_milestone(part) for part in milestones.split(",")),
            shape.strip() if equals else "linear",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QATSchedule":
        """The schedule that `as_dict` gave, through JSON too.

        Raises:
            ConfigError: a key is missing or unknown, or the values make no schedule.
        """
        expected = {"milestones", "shape"}
        if set(values) != expected:
            found = ", ".join(sorted(map(str, values))) or "nothing"
            raise ConfigError(f"a stored schedule has milestones and shape, but this one has {found}")
        return cls(values["milestones"], values["shape"])

    def as_dict(self) -> dict[str, Any]:
        """The schedule in values that JSON has."""
        return {"shape": self.shape, "milestones": [list(milestone) for milestone in self.milestones]}

    def __str__(self) -> str:
        """The schedule as `parse` takes it."""
        milestones = ",".join(map(_written, self.milestones))
        return milestones if self.shape == "linear" else f"{self.shape}={milestones}"

    def width(self, step: int, steps: int) -> float:
        """The width in bits at an optimizer step.

        The first step is at progress 0 and the last at exactly 1; the only step of a run is its last.

        Args:
            step: counted from 0.
            steps: how many the training has.

        Raises:
            ValueError: there is no such step.
        """
        if not 0 <= step < steps:
            raise ValueError(f"a training of {steps} steps has no step {step}")
        return self._width(Fraction(step, steps - 1) if steps > 1 else Fraction(1))

    def width_at(self, progress: float) -> float:
        """The width in bits at a share of the training.

        Raises:
            ValueError: `progress` is not from 0 to 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is from 0 to 1, not {progress}")
        return self._width(_exact(progress))

    def check_ends_at(self, bits: float, export: str = "the export") -> None:
        """Refuse a schedule that does not end at the width its weights are exported in.

        Args:
            bits: the export's.
            export: what the message calls it.

        Raises:
            ConfigError: the last width is another.
        """
        last = self.milestones[-1][1]
        if last != min(bits, FULL_PRECISION):
            raise ConfigError(
                f"the schedule {self} ends at {_number(last)} bits, but {export} has {_number(bits)}: give it a last"
                f" milestone of {_number(bits)} bits"
            )

    def _width(self, progress: Fraction) -> float:
        starts = [_exact(start) for start, _ in self.milestones]
        index = bisect_right(starts, progress) - 1
        width = self.milestones[index][1]
        if self.shape == "step" or index + 1 == len(self.milestones):
            return width
        share = (progress - starts[index]) / (starts[index + 1] - starts[index])
        if self.shape == "cosine":
            share = (1 - Fraction(math.cos(math.pi * share))) / 2
        above, below = _exact(width), _exact(self.milestones[index + 1][1])
        # rounded once, at the end, so that the order of exact widths is kept
        return float(above - (above - below) * share)


def _checked(milestones: Any) -> tuple[tuple[float, float], ...]:
    """The milestones as pairs of floats; widths are as given, above 16 too."""
    if not isinstance(milestones, Sequence):
        raise ConfigError(f"a schedule is a list of milestones, not {milestones!r}")
    pairs = tuple(_pair(milestone) for milestone in milestones)
    if not pairs:
        raise ConfigError("a schedule needs at least one milestone, such as 0:4")
    for progress, width in pairs:
        written = _written((progress, width))
        if not 0 <= progress <= 1:
            raise ConfigError(f"the milestone {written} of the schedule is at a progress that is not from 0 to 1")
        if not LEAST_WIDTH <= width < math.inf:
            raise ConfigError(f"the milestone {written} of the schedule has a width that is not a number of 2 or more")
    if pairs[0][0] != 0:
        raise ConfigError(f"a schedule starts at progress 0, but its first milestone is {_written(pairs[0])}")
    for before, after in pairwise(pairs):
        if after[0] <= before[0]:
            raise ConfigError(
                f"the milestone {_written(after)} of the schedule comes after {_written(before)}, but not at a later"
                " progress"
            )
        if after[1] > before[1]:
            raise ConfigError(
                f"the width of a schedule never rises, but its milestone {_written(after)} comes after"
                f" {_written(before)}"
            )
    return pairs


def _pair(milestone: Any) -> tuple[float, float]:
    numbers = tuple(milestone) if isinstance(milestone, Sequence) and not isinstance(milestone, str) else ()
    if len(numbers) != 2 or not all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers):
        raise ConfigError(f"the milestone {milestone!r} of the schedule is not a progress and a width")
    return float(numbers[0]), float(numbers[1])


def _read_milestone(text: str) -> tuple[float, float]:
    progress, _, width = text.partition(":")
    try:
        return float(progress), float(width)
    except ValueError:
        raise ConfigError(f"the milestone {text.strip()!r} of the schedule is not PROGRESS:BITS, as in 0.9:4") from None


def _ramp(bits: float, warmup: float, stabilization: float, start: float) -> tuple[tuple[float, float], ...]:
    begin, end = _shares(warmup, stabilization)
    level = ((0.0, start),) if begin > 0 else ()
    return (*level, (float(begin), start), (float(end), bits))


def _shares(warmup: float, stabilization: float) -> tuple[Fraction, Fraction]:
    """Where the fall begins and where it ends."""
    for name, share in (("warm-up", warmup), ("stabilization", stabilization)):
        if not 0 <= share <= 1:
            raise ConfigError(f"the {name} of a schedule is a share of the training from 0 to 1, not {share}")
    begin, end = _exact(warmup), 1 - _exact(stabilization)
    if begin >= end:
        raise ConfigError(
            f"a warm-up of {_number(warmup)} and a stabilization of {_number(stabilization)} leave nothing of the"
            " training for the fall of the width"
        )
    return begin, end


def _exact(number: float) -> Fraction:
    """The decimal number that a float is written as: 0.1 is a tenth, which no float is."""
    return Fraction(repr(float(number)))


def _written(milestone: tuple[float, float]) -> str:
    return ":".join(map(_number, milestone))


def _number(number: float) -> str:
    """A number as short as reads back the same.

    >>> _number(16.0), _number(0.1)
    ('16', '0.1')
    """
    return repr(float(number)).removesuffix(".0")
