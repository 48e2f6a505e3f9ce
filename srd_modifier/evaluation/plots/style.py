"""What all pictures have in common: colours, markers, fonts and sizes.

A picture is made for a column of 700 pixels, as a model card has. Colours are those of Okabe and Ito, which people with
any kind of colour vision tell apart; yellow is left out, as it is too light on white, and black is for references. A
family has a marker of its own too, so that nothing is told by colour alone.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from srd_modifier._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches; with 150 dots each a picture has 1050 pixels, half again as many as the column shows."""

DPI = 150
SMALL = 9.0
"""Points, and the smallest text of a picture."""

INK = "#222222"
QUIET = "#5a5a5a"
RULE = "#b8b8b8"
REFERENCE = "#000000"
COLOURMAP = "cividis"
"""Perceptually uniform, and the same to all kinds of colour vision."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# as many as have no common factor with the colours: only after 66 families would a pair come again
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
_DASHES = ("-", "--", "-.", ":")

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a picture is the same everywhere
    "font.size": SMALL,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "text.color": INK,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "lines.markeredgewidth": 0.7,
    "lines.markeredgecolor": INK,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.hashsalt": "srd-modifier",  # else ids are random
    "axes.formatter.use_mathtext": True,
}


@dataclass(frozen=True)
class FamilyStyle:
    """How the points of a family and the line that joins them look."""

    colour: str
    marker: str
    dashes: str = "-"


def settings() -> AbstractContextManager[None]:
    """The settings of matplotlib under which a picture is made and saved; they end with the block.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib import style

    # on top of matplotlib's own, not of what this machine's user prefers
    return style.context(["default", _SETTINGS])


def new_figure(height: float) -> "Figure":
    """An empty figure of the common width. It is no pyplot figure: that would choose a backend for the process."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def family_styles(families: Iterable[str]) -> dict[str, FamilyStyle]:
    """A colour and a marker for each family of a comparison, in the order in which they come first.

    Every picture of a comparison asks with all of its families, so that each looks the same everywhere.
    """
    return {
        # a colour that comes again has lines of its own
        family: FamilyStyle(
            _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], dash(number // len(_COLOURS))
        )
        for number, family in enumerate(dict.fromkeys(families))
    }


def dash(number: int) -> str:
    """The dashes of the n-th line of one colour."""
    return _DASHES[number % len(_DASHES)]


def shorten(text: str, *, width: int, lines: int) -> str:
    r"""Text in at most so many lines of so many characters, as even as they can be.

    What is too much is left out of the middle, as names of models differ most at their ends.

    >>> shorten("feedback W4 + D4 nearest, 40-77 %", width=26, lines=2)
    'feedback W4 + D4\nnearest, 40-77 %'
    >>> shorten("Llama-3.1-8B-Instruct-W4A16-G64", width=20, lines=1)
    'Llama-…uct-W4A16-G64'
    """
    shown, kept = text, len(text)
    while len(_wrap(shown, width)) > lines:
        kept -= 1
        shown = f"{text[: kept // 3].rstrip()}…{text[kept // 3 - kept :].lstrip()}"
    fewest = len(_wrap(shown, width))
    even = next(narrow for narrow in range(1, width + 1) if len(_wrap(shown, narrow)) <= fewest)
    return "\n".join(_wrap(shown, even)).replace("$", r"\$")  # a dollar would begin a formula


def _wrap(text: str, width: int) -> list[str]:
    """Lines of text, broken at spaces, and at hyphens only in words that are too long."""
    return wrap(text, width, break_on_hyphens=any(len(word) > width for word in text.split()))
