"""The picture of a training whose bit width falls: the loss over the optimizer steps, and the width under it."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.files import check_plot_path, save_figure
from srd_modifier.evaluation.plots.legend import add_legend
from srd_modifier.evaluation.plots.style import INK, QUIET, family_styles, new_figure, settings, shorten
from srd_modifier.qat.schedule import FULL_PRECISION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 4.6  # inches, without the legend
_LOSS_ALONE = 3.6  # where no width was recorded
_PANELS = (3.0, 1.0)  # heights of loss and width
_SHADE = "#ececec"
_DECADE = 10.0
_MOST_MARKERS = 20  # on the line of the evaluation loss
_TITLE_WIDTH, _TITLE_LINES = 80, 2

Points = list[tuple[float, float]]


def draw_curve(history: Sequence[Mapping[str, float]], path: Path, *, title: str | None = None) -> None:
    """Draw the loss at each optimizer step that was logged and, under it, the width of the weights in bits.

    The loss has a logarithmic scale if it spans more than a decade. Steps at full precision have a grey ground. A loss
    that is not finite is left out, so that the curve of a training that diverged ends where it did.

    Args:
        history: the Trainer's `state.log_history`, of which `step`, `loss`, `eval_loss` and `bits` are read.
        path: a PNG or SVG file.
        title: what was trained.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: the name of the file asks for no picture, it cannot be written, or no finite loss was logged.
    """
    check_plot_path(path)
    if not any(math.isfinite(loss) for _, loss in _points(history, "loss")):
        raise SRDError(f"{path}: cannot be drawn, no finite training loss was logged")
    with settings():
        save_figure(_figure(history, title), path)


def _figure(history: Sequence[Mapping[str, float]], title: str | None) -> "Figure":
    bits = _points(history, "bits")
    figure = new_figure(_HEIGHT if bits else _LOSS_ALONE)
    if bits:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=_PANELS)
        _draw_loss(above, history)
        _draw_width(below, bits)
        _shade_full_precision((above, below), bits)
    else:
        above = below = figure.add_subplot()
        _draw_loss(above, history)
    _fit_steps(below, history)
    if title:
        above.set_title(shorten(title, width=_TITLE_WIDTH, lines=_TITLE_LINES))
    add_legend(figure, above)
    return figure


def _points(history: Sequence[Mapping[str, float]], name: str) -> Points:
    """Step and value of the entries that have the value, in the order of steps."""
    points = ((float(entry["step"]), float(entry[name])) for entry in history if "step" in entry and name in entry)
    return sorted(points, key=itemgetter(0))


def _draw_loss(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    training, evaluation = _points(history, "loss"), _points(history, "eval_loss")
    styles = family_styles(("training loss", "evaluation loss"))
    style = styles["training loss"]
    axes.plot(
        *_columns(training),
        color=style.colour,
        marker=style.marker if len(training) == 1 else None,  # a line of one point is not seen
        linewidth=1.3,
        label="training loss",
    )
    if evaluation:
        style = styles["evaluation loss"]
        axes.plot(
            *_columns(evaluation),
            color=style.colour,
            marker=style.marker,
            markevery=-(-len(evaluation) // _MOST_MARKERS),
            linestyle="--",
            label="evaluation loss",
        )
    losses = [loss for _, loss in (*training, *evaluation) if math.isfinite(loss)]
    if min(losses) > 0 and max(losses) / min(losses) > _DECADE:
        _scale_by_decades(axes)
    axes.set_ylabel("loss")
    axes.grid(axis="y")


def _scale_by_decades(axes: "Axes") -> None:
    """A logarithmic scale that has numbers within its decades too, as a loss spans few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_width(axes: "Axes", bits: Points) -> None:
    steps, widths = _columns(bits)
    shown = [min(width, FULL_PRECISION) for width in widths]
    axes.plot(steps, shown, color=INK, marker="o" if len(bits) == 1 else None, markersize=4)
    axes.annotate(
        f"{widths[-1]:.3g} bits" if widths[-1] < FULL_PRECISION else "full precision",
        (steps[-1], shown[-1]),
        # under a line at the upper edge, else above it
        xytext=(0, -5 if shown[-1] > FULL_PRECISION / 2 else 5),
        textcoords="offset points",
        ha="right",
        va="top" if shown[-1] > FULL_PRECISION / 2 else "bottom",
        color=QUIET,
    )
    axes.set_ylabel("width, bits")
    axes.set_yticks((0, 4, 8, 12, 16))
    axes.set_ylim(0, 17.5)
    axes.grid(axis="y")


def _shade_full_precision(panels: Sequence["Axes"], bits: Points) -> None:
    """A grey ground under the steps whose weights are not quantized: those of a width of 16 at least."""
    last = max((step for step, width in bits if width >= FULL_PRECISION), default=None)
    if last is None:
        return
    for axes in panels:
        axes.axvspan(0, last, color=_SHADE, linewidth=0, zorder=0, label="full precision")


def _fit_steps(axes: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max(step for name in ("loss", "eval_loss", "bits") for step, _ in _points(history, name))
    axes.set_xlim(0, max(last, 1) * 1.01)
    axes.set_xlabel("optimizer step")


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
