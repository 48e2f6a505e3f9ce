"""Code in Markdown, whatever it contains, and tables of it. Prose is escaped by `evaluation.table.escape`."""

import re
from collections.abc import Sequence


def code(text: str) -> str:
    r"""A code span, also for a cell of a table.

    >>> code("model.gguf"), code("a|b")
    ('`model.gguf`', '`a\\|b`')
    """
    text = " ".join(text.split()).replace("|", r"\|")
    fence = "`" * (_longest_run(text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def block(text: str, language: str) -> str:
    """A fenced block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> str:
    """A table of cells that are Markdown already; its last `numbers` columns are aligned to the right."""
    rules = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
