"""The predicted damage of a model's modules as a picture: one cell for each layer and kind of module."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from srd_modifier.checkpoint.sensitivity import Sensitivity
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.plots.files import check_plot_path, save_figure
from srd_modifier.evaluation.plots.style import COLOURMAP, new_figure, settings
from srd_modifier.selection.depth import layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OUTSIDE = "outside"
_DECADES = 8  # damage that is smaller still, next to the largest, gets the darkest colour
_MAX_TICKS = 16
_ROW = 0.22  # inches


def draw_heatmap(sensitivity: Sensitivity, path: Path) -> None:
    """Draw the damage of the W4 weights and, below it on the same logarithmic scale, that of the corrected ones.

    Layers go from left to right and kinds of modules from top to bottom; the experts of a layer are summed. A module
    outside of the layers has a row of its own and its cell in a last column.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: the file is neither .svg nor .png, or its directory is missing, or there are no modules.
    """
    check_plot_path(path)
    if not sensitivity.modules:
        raise SRDError(f"{path}: cannot be drawn, the sensitivity has no modules")
    with settings():
        from matplotlib.colors import LogNorm

        rows, columns, w4 = damage_grid(sensitivity, alpha=0.0)
        _, _, corrected = damage_grid(sensitivity, alpha=1.0)
        smallest, largest = _range(np.concatenate([w4, corrected]))
        figure = new_figure(1.4 + 2 * (0.35 + _ROW * len(rows)))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name, grid in zip(panels, ("plain W4", "corrected, alpha 1"), (w4, corrected), strict=True):
            image = axes.imshow(
                # a module that does no damage at all is no hole: it gets the darkest colour
                np.where(grid <= 0, smallest, grid),
                norm=LogNorm(smallest, largest),
                cmap=COLOURMAP,
                aspect="auto",
                interpolation="nearest",
            )
            axes.set_title(f"{name}: {np.nansum(grid):.3g} nats per token")
            axes.set_yticks(range(len(rows)), rows)
        _label_layers(panels[-1], columns)
        figure.colorbar(image, ax=panels, label="predicted KL divergence, nats per token", aspect=30)
        save_figure(figure, path)


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


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """The damage that gets the darkest colour, and the one that gets the brightest."""
    largest = float(np.nanmax(values, initial=0.0)) or 1.0
    smallest = float(np.nanmin(np.where(values > 0, values, np.nan), initial=largest))
    return max(min(smallest, largest / 10), largest / 10**_DECADES), largest


def _label_layers(axes: "Axes", columns: list[str]) -> None:
    step = -(-len(columns) // _MAX_TICKS)
    shown = [index for index, name in enumerate(columns) if index % step == 0 or name == _OUTSIDE]
    if len(shown) > 1 and columns[-1] == _OUTSIDE and shown[-1] - shown[-2] < step:
        shown.pop(-2)  # the two labels would overlap
    axes.set_xticks(shown, [columns[index] for index in shown])
    axes.set_xlabel("decoder layer")
