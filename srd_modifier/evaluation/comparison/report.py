"""What a comparison leaves behind: results.json, the table, the plots."""

from pathlib import Path

from srd_modifier.checkpoint.atomic import write_text
from srd_modifier.checkpoint.sensitivity import Sensitivity, read_sensitivity
from srd_modifier.evaluation.load import find_files
from srd_modifier.evaluation.plots.comparison import draw_all
from srd_modifier.evaluation.results import Results, write_results
from srd_modifier.evaluation.table import markdown_table

RESULTS = "results.json"
TABLE = "table.md"


def write_report(results: Results, directory: Path, *, plots: bool = True) -> list[Path]:
    """Write everything, each file whole or not at all.

    Args:
        results: the comparison.
        directory: an existing directory; files of an earlier comparison are replaced.
        plots: draw pictures too.

    Returns:
        The files.

    Raises:
        MissingExtraError: jsonschema is not installed, or matplotlib for the plots.
        SRDError: a file cannot be written.
    """
    write_results(results, directory / RESULTS)
    write_text(directory / TABLE, markdown_table(results))
    drawn = draw_all(results, directory, sensitivities=_sensitivities(results)) if plots else []
    return [directory / RESULTS, directory / TABLE, *drawn]


def _sensitivities(results: Results) -> dict[str, Sensitivity]:
    """Of each checkpoint that has one, by the label of its first row."""
    found: dict[str, Sensitivity] = {}
    seen = set()
    for model in results.models:
        # a row of a checkpoint with a residual; others have none
        if model.residual_bytes is None or model.digest in seen:
            continue
        seen.add(model.digest)
        sensitivity = read_sensitivity(find_files(model.model))
        if sensitivity is not None:
            found[model.label] = sensitivity
    return found
