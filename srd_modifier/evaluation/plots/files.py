"""The file of a picture: its name is checked before anything is drawn, and it appears whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING

from srd_modifier.checkpoint.atomic import sibling
from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")


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


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture in the format of its name; the same figure gives the same bytes.

    Raises:
        SRDError: the name asks for no format, or the file cannot be written.
    """
    kind = check_plot_path(path)
    temporary = sibling(path)
    try:
        # an SVG file has its date in it otherwise
        figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
        temporary.replace(path)
    except OSError as error:
        raise SRDError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
