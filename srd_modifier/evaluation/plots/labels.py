"""Names beside their points, where they cover neither one another nor the points.

Matplotlib puts a text where it is told to. Here many places around each point are tried, and the one is taken that
covers least and is nearest; then each label is tried again among all others, until none moves. Nothing is random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from srd_modifier.evaluation.plots.style import INK, QUIET, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_DISTANCES = (6.0, 11.0, 18.0, 26.0, 36.0, 48.0, 62.0, 78.0, 96.0)  # points between a marker and its label
_DIRECTIONS = tuple(math.radians(22.5 * number) for number in range(16))
_LEADER = 9.0  # from here on a thin line leads from the label to its point
_ROUNDS = 20
_PIECE = 4.0  # points: lines are looked at in pieces of this length

# what it costs to be a point farther away, to cover a square point of something, to cover a piece of a line, to lie
# outside of the axes, and to lead through a label or a marker
_FAR, _ON_LABEL, _ON_MARKER, _ON_LINE, _OUTSIDE, _THROUGH = 1.5, 6.0, 6.0, 5.0, 50.0, 60.0


@dataclass(frozen=True)
class Label:
    """A text for the point at `x`, `y` of the data."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class _Places:
    """Where a label may be.

    Attributes:
        boxes: left, bottom, right and top of each place, in points: [places, 4].
        leaders: points along the line from each of them to the label's point: [places, pieces, 2].
        cost: of each, whatever the other labels do: [places].
    """

    boxes: Array
    leaders: Array
    cost: Array


def place_labels(
    axes: "Axes",
    labels: Sequence[Label],
    *,
    points: Sequence[tuple[float, float]],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Put every label near its point.

    The limits of the axes must be final, and the layout done: what counts is where things are at this moment.

    Args:
        axes: where the labels go.
        labels: what they say.
        points: all markers of the picture, in data coordinates.
        lines: all lines of the picture.
    """
    markers = _in_points(axes, points)
    pieces = np.concatenate([np.empty((0, 2)), *(_pieces(_in_points(axes, line)) for line in lines if len(line) > 1)])
    frame = np.concatenate([axes.bbox.min, axes.bbox.max]) * 72 / axes.figure.dpi
    anchors = _in_points(axes, [(label.x, label.y) for label in labels])
    places = [
        _places(anchor, _size(axes, label.text), markers, pieces, frame)
        for anchor, label in zip(anchors, labels, strict=True)
    ]
    for label, anchor, box in zip(labels, anchors, _choose(places), strict=True):
        _draw(axes, label, anchor, box)


def spread(middles: Sequence[float] | Array, sizes: Sequence[float], *, high: float) -> list[float]:
    """Move things in a column apart, so that none covers another and all are between 0 and `high`, as little as can be.

    Args:
        middles: where each wants to be.
        sizes: how much room each takes; together no more than `high`.
        high: the upper end of the column.

    Returns:
        Where the middle of each is, in the order given.
    """
    order = sorted(range(len(sizes)), key=lambda number: middles[number])
    below = np.cumsum([0.0, *(sizes[number] for number in order)])[:-1]
    # measured from the top of all that must lie below it, a thing may only be as high as the next one or lower. That
    # is isotonic regression: neighbours that want to pass one another become a block, at their mean
    blocks: list[tuple[float, int]] = []
    for number, room in zip(order, below, strict=True):
        mean, count = float(middles[number]) - sizes[number] / 2 - room, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    starts = [mean for mean, count in blocks for _ in range(count)]
    highest = max(high - sum(sizes), 0.0)
    found = {
        number: min(max(start, 0.0), highest) + room + sizes[number] / 2
        for number, start, room in zip(order, starts, below, strict=True)
    }
    return [float(found[number]) for number in range(len(sizes))]


def _choose(places: Sequence[_Places]) -> list[Array]:
    """The box of each label: first one after the other, then each again until nothing gets better."""
    chosen: list[int | None] = [None] * len(places)
    for _ in range(_ROUNDS):
        before = list(chosen)
        for number, own in enumerate(places):
            placed = zip(places, chosen, strict=True)
            others = [(place, at) for place, at in placed if place is not own and at is not None]
            chosen[number] = int(np.argmin(own.cost + _among(own, others)))
        if chosen == before:
            break
    return [place.boxes[at or 0] for place, at in zip(places, chosen, strict=True)]


def _among(own: _Places, others: Sequence[tuple[_Places, int]]) -> Array:
    """What each place of a label costs beside the other labels where they are: [places]."""
    boxes = np.array([place.boxes[at] for place, at in others]).reshape(-1, 4)
    leaders = np.concatenate([np.empty((0, 2)), *(place.leaders[at] for place, at in others)])
    through = _inside(own.leaders, boxes).any(1).sum(1)  # other labels that its line would cross
    crossed = _inside(leaders[None], own.boxes)[0].sum(0) / 3  # pieces of other lines that it would cover
    return _ON_LABEL * _overlap(own.boxes, boxes).sum(1) + _THROUGH * (through + crossed)


def _places(anchor: Array, size: Array, markers: Array, pieces: Array, frame: Array) -> _Places:
    directions = np.array([[math.cos(angle), math.sin(angle)] for angle in _DIRECTIONS])
    distances = np.repeat(_DISTANCES, len(directions))
    steps = np.tile(directions, (len(_DISTANCES), 1))
    # from the point to the nearest point of the box is the distance: half of the box is added in each direction
    middles = anchor + steps * distances[:, None] + np.sign(np.round(steps, 3)) * size / 2
    boxes = np.concatenate([middles - size / 2, middles + size / 2], axis=1)
    nearest = np.clip(anchor, boxes[:, :2], boxes[:, 2:])
    leaders = anchor + (nearest - anchor)[:, None] * np.linspace(0.25, 1, 12)[None, :, None]
    leaders[distances <= _LEADER] = np.inf  # so near there is none
    around = np.concatenate([markers - 5, markers + 5], axis=1)
    elsewhere = around[np.abs(markers - anchor).max(1) > 1]
    outside = size.prod() - _overlap(boxes, frame.reshape(1, 4))[:, 0]
    cost = (
        _FAR * distances
        + _ON_MARKER * _overlap(boxes, around).sum(1)
        + _ON_LINE * _inside(pieces[None], boxes)[0].sum(0)
        + _OUTSIDE * outside
        + _THROUGH * _inside(leaders, elsewhere).any(1).sum(1)
    )
    return _Places(boxes, leaders, cost)


def _draw(axes: "Axes", label: Label, anchor: Array, box: Array) -> None:
    far = math.dist(anchor, np.clip(anchor, box[:2], box[2:])) > _LEADER
    axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=tuple((box[:2] + box[2:]) / 2 - anchor),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=SMALL,
        color=INK,
        linespacing=1.0,
        zorder=6,
        arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if far else None,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def _in_points(axes: "Axes", data: Sequence[tuple[float, float]]) -> Array:
    """Places of the data, in points from the lower left corner of the figure: [places, 2]."""
    return axes.transData.transform(np.asarray(data, dtype=float).reshape(-1, 2)) * 72 / axes.figure.dpi


def _size(axes: "Axes", text: str) -> Array:
    """Width and height of a text in points, with a little room around it."""
    artist: Any = axes.text(0, 0, text, fontsize=SMALL, linespacing=1.0)
    extent = artist.get_window_extent()
    artist.remove()
    return np.array([extent.width, extent.height]) * 72 / axes.figure.dpi + 1.5


def _overlap(boxes: Array, others: Array) -> Array:
    """Areas that boxes share: [boxes, others]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def _inside(points: Array, boxes: Array) -> NDArray[np.bool_]:
    """Which points [lines, points, 2] lie in which boxes [boxes, 4]: [lines, points, boxes]."""
    low, high = boxes[None, None, :, :2], boxes[None, None, :, 2:]
    return np.asarray(((points[:, :, None] > low) & (points[:, :, None] < high)).all(-1))


def _pieces(line: Array) -> Array:
    """Places along a line, a few points apart."""
    found = [line[:1]]
    for start, end in pairwise(line):
        count = max(int(math.dist(start, end) / _PIECE), 1)
        found.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return np.concatenate(found)
