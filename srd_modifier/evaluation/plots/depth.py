"""Where in the depth of a model its divergence arises: one curve for each model, one value after each layer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.files import check_plot_path, save_figure
from srd_modifier.evaluation.plots.labels import spread
from srd_modifier.evaluation.plots.style import QUIET, RULE, dash, family_styles, new_figure, settings, shorten
from srd_modifier.evaluation.results import Results
from srd_modifier.selection.depth import CHUNKS, chunk_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 4.3  # inches, where the names need no more
_MOST_MARKERS = 12  # on a curve; where there are more layers not all have one
_NAME_WIDTH, _NAME_LINES = 26, 2
_NAMES_AT = 1.07  # widths of the axes, from their left edge
_ROOM = 2.0  # points between two names


@dataclass(frozen=True)
class Curve:
    """A model's divergence after each layer, and how it is drawn."""

    name: str
    values: NDArray[np.float64]
    colour: str
    marker: str
    dashes: str


def draw_depth(results: Results, path: Path) -> None:
    """Draw the divergence from the reference after each decoder layer, on a logarithmic scale.

    Layers have their numbers where all models have as many, else their share of the depth. The four chunks of depth are
    marked. A divergence of exactly 0 is drawn at the lower edge.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: the name of the file asks for no picture, or no model was measured layer by layer.
    """
    check_plot_path(path)
    curves = _curves(results)
    if not curves:
        raise SRDError(f"{path}: cannot be drawn, no model was measured layer by layer")
    counts = {len(curve.values) for curve in curves}
    layers = counts.pop() if len(counts) == 1 else None
    with settings():
        figure = new_figure(_HEIGHT)
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(
                _positions(len(curve.values), layers),
                curve.values,
                color=curve.colour,
                linestyle=curve.dashes,
                marker=curve.marker,
                markersize=5,
                markevery=-(-len(curve.values) // _MOST_MARKERS),
            )
        axes.set_yscale("log")
        _mark_chunks(axes, layers)
        axes.set_title("divergence from the reference, read out after each decoder layer", pad=20)
        axes.set_xlabel("decoder layer" if layers is not None else "depth, percent")
        axes.set_ylabel("mean KL divergence, nats per token")
        axes.grid(axis="y")
        _name_curves(figure, axes, curves, [_positions(len(curve.values), layers)[-1] for curve in curves])
        save_figure(figure, path)


def _curves(results: Results) -> list[Curve]:
    models = [(model, np.asarray(model.depth, dtype=np.float64)) for model in results.candidates if model.depth]
    above_zero = np.concatenate([np.array([1.0]), *(values[values > 0] for _, values in models)])
    floor = float(above_zero.min()) / 4
    styles = family_styles(model.family for model in results.candidates)
    drawn: Counter[str] = Counter()
    curves = []
    for model, values in models:
        style = styles[model.family]
        dashes = dash(drawn[model.family])
        drawn[model.family] += 1
        curves.append(Curve(model.label, np.maximum(values, floor), style.colour, style.marker, dashes))
    return curves


def _positions(count: int, layers: int | None) -> NDArray[np.float64]:
    """Where a model's layers are on the axis: by number, or at the middle of each layer's share in percent."""
    numbers = np.arange(count, dtype=np.float64)
    return numbers if layers is not None else (numbers + 0.5) * 100 / count


def chunk_borders(layers: int | None) -> dict[str, tuple[float, float]]:
    """Where the chunks begin and end on the axis: between two layers, or in percent if `layers` is None.

    >>> chunk_borders(8)["reasoning"], chunk_borders(None)["reasoning"]
    ((3.5, 6.5), (40.0, 77.0))
    """
    if layers is None:
        return {name: (100 * start, 100 * end) for name, (start, end) in CHUNKS.items()}
    counts = Counter(chunk_of(f"layers.{layer}", layers) for layer in range(layers))
    ends = np.cumsum([0, *(counts[name] for name in CHUNKS)]) - 0.5
    return {
        name: (float(start), float(end))
        for name, (start, end) in zip(CHUNKS, pairwise(ends), strict=True)
        if end > start  # so few layers may there be that none is in a chunk
    }


def _mark_chunks(axes: "Axes", layers: int | None) -> None:
    """Light borders of the chunks of depth, and their names above the curves."""
    from matplotlib.ticker import MaxNLocator

    borders = chunk_borders(layers)
    for name, (start, end) in borders.items():
        axes.axvline(start, color=RULE, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(
            name,
            ((start + end) / 2, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=QUIET,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(start for start, _ in borders.values()), max(end for _, end in borders.values()))


def _name_curves(figure: "Figure", axes: "Axes", curves: Sequence[Curve], ends: Sequence[float]) -> None:
    """Names in a column to the right, moved apart, each with a line that leads to the end of its curve."""
    from matplotlib.text import Text

    names = [
        axes.annotate(
            shorten(curve.name, width=_NAME_WIDTH, lines=_NAME_LINES),
            (position, curve.values[-1]),
            xytext=(_NAMES_AT, 0.5),
            textcoords="axes fraction",
            va="center",
            linespacing=1.0,
            arrowprops={
                "arrowstyle": "-",
                "color": curve.colour,
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
        for curve, position in zip(curves, ends, strict=True)
    ]
    figure.draw_without_rendering()
    # of the text alone: an annotation's own extent has its line in it
    sizes = [Text.get_window_extent(name).height / figure.dpi * 72 + _ROOM for name in names]
    missing = sum(sizes) - _height(axes)
    if missing > 0:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + missing / 72)
        figure.draw_without_rendering()
    # names have the places that they get now
    figure.set_layout_engine("none")
    height = _height(axes)
    pixels = axes.transData.transform([(end, curve.values[-1]) for curve, end in zip(curves, ends, strict=True)])
    middles = spread(axes.transAxes.inverted().transform(pixels)[:, 1] * height, sizes, high=height)
    for name, middle in zip(names, middles, strict=True):
        name.xyann = (_NAMES_AT, middle / height)


def _height(axes: "Axes") -> float:
    """Of the axes, in points."""
    return float(axes.bbox.height / axes.figure.dpi * 72)
