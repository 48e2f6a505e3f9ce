"""Models as points in size and quality, and those of them that no other beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A model in a picture of quality against size.

    Attributes:
        label: of the model.
        family: of the model.
        bytes: on disk.
        value: of the metric.
        higher_is_better: which way the metric goes.
        interval: of 95 % confidence around the value, `None` where it is not known.
    """

    label: str
    family: str
    bytes: int
    value: float
    higher_is_better: bool
    interval: tuple[float, float] | None = None

    @property
    def cost(self) -> float:
        """The value, such that less is better."""
        return -self.value if self.higher_is_better else self.value


def pareto(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, from the smallest model to the largest.

    A model is on the front if no other has both fewer or equal bytes and an equal or better score; of models that are
    equal in both, all are.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.cost)):
        best = front[-1] if front else None
        if best is None or point.cost < best.cost or (point.bytes, point.cost) == (best.bytes, best.cost):
            front.append(point)
    return front
