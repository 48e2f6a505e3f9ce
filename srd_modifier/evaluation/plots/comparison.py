"""All pictures of a comparison, under names that say what they show."""

import re
from collections.abc import Mapping
from pathlib import Path

from srd_modifier.checkpoint.sensitivity import Sensitivity
from srd_modifier.evaluation.plots.depth import draw_depth
from srd_modifier.evaluation.plots.heatmap import draw_heatmap
from srd_modifier.evaluation.plots.quality import draw_quality, quality_points
from srd_modifier.evaluation.results import Results
from srd_modifier.evaluation.table import shown_metrics


def draw_all(results: Results, directory: Path, *, sensitivities: Mapping[str, Sensitivity]) -> list[Path]:
    """Draw what there is to draw of a comparison, as PNG files.

    Args:
        results: the comparison.
        directory: where the pictures go.
        sensitivities: predicted damages by the label of their model; one without modules is passed over.

    Returns:
        The files: quality against bytes for the first perplexity task and for each accuracy task, the depth where it
        was measured, and a heat map of each sensitivity.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SRDError: a file cannot be written.
    """
    written = []
    for (task, metric), name in quality_pictures(results).items():
        draw_quality(results, directory / name, task=task, metric=metric)
        written.append(directory / name)
    if any(model.depth for model in results.candidates):
        draw_depth(results, directory / "depth.png")
        written.append(directory / "depth.png")
    for label, sensitivity in sensitivities.items():
        if sensitivity.modules:
            path = _unused(directory / f"sensitivity-{slug(label)}.png", written)
            draw_heatmap(sensitivity, path)
            written.append(path)
    return written


def quality_pictures(results: Results) -> dict[tuple[str, str], str]:
    """File names of the pictures of quality against bytes, by task and metric; one that would be empty is left out."""
    wanted = []
    has_text = False
    for task in results.tasks:
        metrics = [metric for name, metric in shown_metrics(results) if name == task.name]
        if not {"ppl", "kld_mean"}.isdisjoint(metrics):
            if not has_text:
                wanted.append((task.name, "kld_mean" if "kld_mean" in metrics else "ppl"))
            has_text = True
        elif metrics:
            wanted.append((task.name, metrics[0]))
    names: dict[tuple[str, str], str] = {}
    for name, metric in wanted:
        if quality_points(results, task=name, metric=metric):
            picture = Path(f"quality-{slug(name)}-{slug(metric)}.png")
            names[name, metric] = str(_unused(picture, [Path(other) for other in names.values()]))
    return names


def slug(text: str) -> str:
    """A part of a file name that any system and any Markdown takes.

    >>> slug("W4 + D8, 40-77 %"), slug("kld_mean")
    ('w4-d8-40-77', 'kld_mean')
    """
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.") or "model"


def _unused(path: Path, taken: list[Path]) -> Path:
    """The path itself, or with a number where another picture has it."""
    number = 2
    candidate = path
    while candidate in taken:
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate
