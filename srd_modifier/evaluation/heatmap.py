"""The predicted damage of a model's modules as a picture: one cell for each layer and kind of module."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from srd_modifier._extras import require
from srd_modifier.checkpoint.sensitivity import Sensitivity
from srd_modifier.errors import SRDError
from srd_modifier.selection.depth import layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")

_OUTSIDE = "outside"
_DECADES = 8  # damage that is smaller still, next to the largest, gets the darkest colour
_MAX_TICKS = 16


def draw_heatmap(sensitivity: Sensitivity, path: Path) -> None:
    """Draw the damage of the W4 weights and that of the corrected ones, side by side on one logarithmic scale.

    Layers go from left to right and kinds of modules from top to bottom; the experts of a layer are summed. A module
    outside of the layers has a row of its own and its cell in a last column.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: the file is neither .svg nor .png, or its directory is missing, or there are no modules.
    """
    kind_of_file = check_plot_path(path)
    if not sensitivity.modules:
        raise SRDError(f"{path}: cannot be drawn, the sensitivity has no modules")
    require("matplotlib", extra="plot")
    # the figure alone: pyplot would choose a backend for the whole process
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns, w4 = damage_grid(sensitivity, alpha=0.0)
    _, _, corrected = damage_grid(sensitivity, alpha=1.0)
    values = np.concatenate([w4, corrected])
    largest = np.nanmax(values, initial=0.0) or 1.0
    smallest = np.nanmin(np.where(values > 0, values, np.nan), initial=largest)
    smallest = max(min(smallest, largest / 10), largest / 10**_DECADES)
    norm = LogNorm(smallest, largest)

    width = min(2.5 + 0.5 * len(columns), 24)
    figure = Figure(figsize=(max(width, 9), 1.8 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axes, name, grid in zip(panels, ("plain W4", "corrected, alpha 1"), (w4, corrected), strict=True):
        # a module that does no damage at all is no hole: it gets the darkest colour
        image = axes.imshow(np.where(grid <= 0, smallest, grid), norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(f"{name}: {np.nansum(grid):.3g} nats per token")
        _label(axes, rows, columns)
    figure.colorbar(image, ax=panels, label="predicted KL divergence, nats per token")
    # without its date the same sensitivity gives the same picture
    figure.savefig(path, format=kind_of_file, dpi=150, metadata={"Date": None} if kind_of_file == "svg" else None)


def check_plot_path(path: Path) -> str:
    """The format that a picture's name asks for.

    Raises:
        SRDError: it asks for none that is offered, or its directory is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise SRDError(f"{path}: cannot be drawn, expected a file name that ends in .svg or .png")
    if not path.parent.is_dir():
        raise SRDError(f"{path}: cannot be written, there is no directory {path.parent}")
    return kind


def damage_grid(sensitivity: Sensitivity, *, alpha: float) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Names of the rows and columns, and the damage in each cell; NaN where the model has no such module."""
    layers = [layer_of(name) for name in sensitivity.modules]
    columns = [str(layer) for layer in sorted({layer for layer in layers if layer is not None})]
    columns += [_OUTSIDE] if None in layers else []
    places = [_place(name) for name in sensitivity.modules]
    # the model's own order, modules outside of the layers last
    rows = [row for row, _ in sorted(dict.fromkeys(places), key=lambda place: place[1] == _OUTSIDE)]
    rows = list(dict.fromkeys(rows))
    grid = np.full((len(rows), len(columns)), np.nan)
    for module, (row, column) in zip(sensitivity.modules.values(), places, strict=True):
        cell = rows.index(row), columns.index(column)
        grid[cell] = np.nan_to_num(grid[cell]) + module.damage(alpha)
    return rows, columns, grid


def _place(name: str) -> tuple[str, str]:
    """The row and the column of a module.

    >>> _place("model.layers.11.mlp.experts.3.up_proj"), _place("lm_head")
    (('mlp.experts.up_proj', '11'), ('lm_head', 'outside'))
    """
    layer = layer_of(name)
    inside = name if layer is None else name.partition(f".{layer}.")[2] or name
    # numbers that are left are those of experts, or of the layers of another tower
    kind = ".".join(part for part in inside.split(".") if not part.isdigit())
    return kind, _OUTSIDE if layer is None else str(layer)


def _label(axes: "Axes", rows: list[str], columns: list[str]) -> None:
    step = -(-len(columns) // _MAX_TICKS)
    shown = [index for index, name in enumerate(columns) if index % step == 0 or name == _OUTSIDE]
    if len(shown) > 1 and shown[-1] - shown[-2] < step:
        shown.pop(-2)  # the two labels would overlap
    axes.set_xticks(shown, [columns[index] for index in shown])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
