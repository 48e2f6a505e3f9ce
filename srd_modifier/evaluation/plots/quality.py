"""Quality against bytes on disk: what each model gives for its size, and which of them no other beats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.files import check_plot_path, save_figure
from srd_modifier.evaluation.plots.labels import Label, place_labels
from srd_modifier.evaluation.plots.legend import add_legend
from srd_modifier.evaluation.plots.pareto import Point, pareto
from srd_modifier.evaluation.plots.style import (
    REFERENCE,
    RULE,
    FamilyStyle,
    family_styles,
    new_figure,
    settings,
    shorten,
)
from srd_modifier.evaluation.results import Results, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]

_HEIGHT = 4.8  # inches, without the legend
_JOINED_FROM = 3  # points of a family that make a line
_ALL_NAMED = 8  # up to so many models have their names in the picture, of more only those of the front
_STANDARD_ERRORS = 1.96  # to either side are 95 %
_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 0))

_NAMES = {
    "ppl": "perplexity",
    "kld_mean": "mean KL divergence, nats per token",
    "kld_median": "median KL divergence, nats per token",
    "kld_p99": "99th percentile of the KL divergence, nats per token",
    "top1_agreement": "share of tokens with the reference's first choice",
    "acc": "accuracy",
    "acc_norm": "accuracy, normalized by length",
    "exact_match": "share of exact answers",
}


def draw_quality(results: Results, path: Path, *, task: str, metric: str) -> None:
    """Draw a metric of a task against the bytes of each model, and the Pareto front of them.

    The reference is a line, as what the others are measured against. Divergences are on a logarithmic scale; one of
    exactly 0 has its marker at the lower edge and the 0 in its name. Bars are 95 % confidence intervals: of the
    difference from the reference on the same items where that was measured for all models, else of the score.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: the name of the file asks for no picture, or no model has both a size and this score.
    """
    check_plot_path(path)
    points = quality_points(results, task=task, metric=metric)
    if not points:
        raise SRDError(f"{path}: cannot be drawn, no model has both bytes on disk and a score of {task} {metric}")
    with settings():
        figure = new_figure(_HEIGHT)
        axes = figure.add_subplot()
        scale = _Scale.of(points, logarithmic=metric.startswith("kld"))
        front = pareto(points)
        lines = _draw_families(axes, points, scale, family_styles(model.family for model in results.candidates))
        if len(front) > 1:
            lines.append(_stairs([scale.place(point) for point in front]))
            axes.plot(*zip(*lines[-1], strict=True), color=RULE, linewidth=4, zorder=1, label="Pareto front")
        reference = _draw_reference(axes, results, task, metric)
        _set_limits(axes, points, scale)
        if reference is not None:
            lines.append([(edge, reference) for edge in axes.get_xlim()])
        axes.set_title(shorten(f"{results.task(task).title}: {_NAMES.get(metric, metric)}", width=76, lines=2))
        axes.set_xlabel("\n".join([f"{scale.unit} on disk", *_about_bars(results, points, task, metric)]))
        axes.set_ylabel(f"{'higher' if points[0].higher_is_better else 'lower'} is better")
        axes.grid()
        add_legend(figure, axes)
        # from here on nothing may move: names go where there is room now
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        named = sorted(points if len(points) <= _ALL_NAMED else front, key=lambda point: point.bytes)
        names = [Label(_name(point), *scale.place(point)) for point in named]
        place_labels(axes, names, points=[scale.place(point) for point in points], lines=lines)
        save_figure(figure, path)


def quality_points(results: Results, *, task: str, metric: str) -> list[Point]:
    """The models that are drawn: those with both a size and this score, without the reference."""
    paired = _is_paired(results, task, metric)
    reference = results.reference.score(task, metric)
    points = []
    for model in results.candidates:
        score = model.score(task, metric)
        if score is not None and model.bytes_on_disk is not None:
            interval = _recovered(reference, score) if paired and reference is not None else _around(score)
            points.append(
                Point(model.label, model.family, model.bytes_on_disk, score.value, score.higher_is_better, interval)
            )
    return points


@dataclass(frozen=True)
class _Scale:
    """Where a point is in the picture.

    Attributes:
        unit: of the sizes, decimal.
        unit_bytes: bytes of it.
        floor: the least value that a logarithmic axis shows; `None` for a linear one.
    """

    unit: str
    unit_bytes: int
    floor: float | None

    @classmethod
    def of(cls, points: Sequence[Point], *, logarithmic: bool) -> "_Scale":
        largest = max(point.bytes for point in points)
        unit, size = next((name, size) for name, size in _UNITS if largest >= size)
        above_zero = [point.value for point in points if point.value > 0]
        return cls(unit, max(size, 1), min(above_zero, default=1.0) / 4 if logarithmic else None)

    def place(self, point: Point) -> Place:
        return point.bytes / self.unit_bytes, self.height(point.value)

    def height(self, value: float) -> float:
        return value if self.floor is None else max(value, self.floor)


def _is_paired(results: Results, task: str, metric: str) -> bool:
    """Whether every model's difference from the reference was measured on the same items."""
    scores = [model.score(task, metric) for model in results.candidates if model.bytes_on_disk is not None]
    known = [score.recovery is not None and score.recovery.low > 0 for score in scores if score is not None]
    return results.reference.score(task, metric) is not None and bool(known) and all(known)


def _recovered(reference: Score, score: Score) -> tuple[float, float] | None:
    """What is recovered of the reference's score, with its confidence, as values of the metric."""
    if score.recovery is None:
        return None
    low, high = score.recovery.low / 100, score.recovery.high / 100
    if score.higher_is_better:
        return reference.value * low, reference.value * high
    return reference.value / high, reference.value / low


def _around(score: Score) -> tuple[float, float] | None:
    if score.stderr is None:
        return None
    return score.value - _STANDARD_ERRORS * score.stderr, score.value + _STANDARD_ERRORS * score.stderr


def _draw_families(
    axes: "Axes", points: Sequence[Point], scale: _Scale, styles: Mapping[str, FamilyStyle]
) -> list[list[Place]]:
    """Markers, bars, and a line for a family with enough points; all lines are given back, bars included."""
    lines: list[list[Place]] = []
    for family in dict.fromkeys(point.family for point in points):
        style = styles[family]
        members = sorted((point for point in points if point.family == family), key=lambda point: point.bytes)
        places = [scale.place(point) for point in members]
        joined = len(members) >= _JOINED_FROM
        if joined:
            lines.append(places)
        axes.plot(
            *zip(*places, strict=True),
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes if joined else "",
            label=family,
            zorder=4,
        )
        for point, (x, _) in zip(members, places, strict=True):
            if point.interval is not None:
                lines.append([(x, scale.height(value)) for value in point.interval])
                axes.plot(
                    *zip(*lines[-1], strict=True),
                    color=style.colour,
                    marker="_",
                    markeredgecolor=style.colour,
                    linewidth=1,
                    zorder=3,
                )
    return lines


def _draw_reference(axes: "Axes", results: Results, task: str, metric: str) -> float | None:
    """A line at the reference's score, which is given back."""
    reference = results.reference
    score = reference.score(task, metric)
    # its divergence from itself is nothing that was measured
    if score is None or metric.startswith("kld") or metric == "top1_agreement":
        return None
    size = "" if reference.bytes_on_disk is None else f", {format_bytes(reference.bytes_on_disk)}"
    label = f"{reference.label} (reference{size})"
    axes.axhline(score.value, color=REFERENCE, linestyle=(0, (5, 2)), linewidth=1.2, zorder=2, label=label)
    return score.value


def _set_limits(axes: "Axes", points: Sequence[Point], scale: _Scale) -> None:
    axes.margins(x=0.07, y=0.10)
    if scale.floor is None:
        return
    axes.set_yscale("log")
    heights = [scale.height(value) for point in points for value in (point.value, *(point.interval or ()))]
    has_zero = any(point.value <= 0 for point in points)
    lowest = scale.floor if has_zero else min(point.value for point in points)
    axes.set_ylim(lowest / (1.0 if has_zero else 1.7), max(heights) * 1.5)


def _about_bars(results: Results, points: Sequence[Point], task: str, metric: str) -> list[str]:
    if all(point.interval is None for point in points):
        return []
    of = "the difference from the reference" if _is_paired(results, task, metric) else "each score"
    return [f"bars: 95 % confidence interval of {of}"]


def _name(point: Point) -> str:
    exactly = " (0)" if point.value == 0 else ""
    return shorten(point.label + exactly, width=32, lines=2)


def _stairs(places: Sequence[Place]) -> list[Place]:
    """The best that is to be had for so many bytes: it changes at each model of the front."""
    corners = [(right[0], left[1]) for left, right in pairwise(places)]
    return [place for pair in zip(places, [*corners, None], strict=True) for place in pair if place is not None]


def format_bytes(size: int) -> str:
    """A size in decimal units with three digits.

    >>> format_bytes(14_696_792), format_bytes(1_234)
    ('14.7 MB', '1.23 kB')
    """
    exponent = min(max(int(math.log10(max(size, 1)) / 3), 0), 4)
    return f"{size / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
