"""Put a comparison's figures where readers see them: docs/peers.json, docs/peers.png, and the table in README.md."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.models import REPOSITORY
from srd_modifier.checkpoint.atomic import write_text
from srd_modifier.evaluation.plots.comparison import quality_pictures
from srd_modifier.evaluation.results import Results, read_results, write_results
from srd_modifier.evaluation.table import markdown_table, shown_metrics, table_rows

RESULTS = REPOSITORY / "docs" / "peers.json"
PLOT = REPOSITORY / "docs" / "peers.png"
TABLE = REPOSITORY / "docs" / "peers.md"
README = REPOSITORY / "README.md"

_HEAD = """\
# Peers, side by side

Written by `make bench-quality`; every figure with its circumstances is in `peers.json`.

![quality against bytes on disk](peers.png)

"""
_MARKED = re.compile(r"(?<=<!-- peers -->\n)(.*?)(?=\n<!-- end of peers -->)", re.S)


def publish(folder: Path, *, readme: Path = README) -> None:
    """Copy the results of `python -m benchmarks.peers` from its output, and renew the table between the marks."""
    results = portable(read_results(folder / "results.json"))
    write_results(results, RESULTS)
    picture = next(iter(quality_pictures(results).values()))
    shutil.copyfile(folder / picture, PLOT)
    write_text(TABLE, _HEAD + markdown_table(results))
    write_text(readme, with_table(readme.read_text(encoding="utf-8")))


def portable(results: Results) -> Results:
    """The same without the folders of this machine: paths are given from the repository."""
    return replace(
        results,
        tasks=tuple(replace(task, source=_relative(task.source)) for task in results.tasks),
        models=tuple(replace(model, model=_relative(model.model)) for model in results.models),
    )


def _relative(text: str) -> str:
    return text.replace(f"{REPOSITORY}/", "").replace(f"{REPOSITORY.parent}/", "../")


def with_table(page: str) -> str:
    """A page with the published table between its marks."""
    results = read_results(RESULTS)
    # of a text the divergence alone: perplexity and its interval are in docs/peers.md
    shown = [(task, metric) for task, metric in shown_metrics(results) if metric != "ppl"]
    rows = table_rows(results, shown=shown, marks=False)
    return _MARKED.sub(lambda _: rows, page)


if __name__ == "__main__":
    publish(REPOSITORY / "out" / "peers")
