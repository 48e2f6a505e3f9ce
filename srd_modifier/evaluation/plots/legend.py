"""A legend below the axes, in as many columns as the width has room for."""

from typing import TYPE_CHECKING

from srd_modifier.evaluation.plots.style import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 4
_FEW = 8  # so many entries may have two lines each
_WIDTH = 38  # characters of a line


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Add the legend of the axes; the figure grows by its height, so that the axes keep theirs."""
    handles, texts = axes.get_legend_handles_labels()
    if not handles:
        return
    texts = [shorten(text, width=_WIDTH, lines=2 if len(texts) <= _FEW else 1) for text in texts]
    for columns in range(min(_MOST_COLUMNS, len(handles)), 0, -1):
        trial = figure.legend(handles, texts, ncols=columns)
        extent = trial.get_window_extent()
        trial.remove()
        if extent.width <= figure.bbox.width:
            break
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + extent.height / figure.dpi)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns)
