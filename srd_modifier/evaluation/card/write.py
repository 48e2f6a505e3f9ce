"""A model card, written beside the model that it is about."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.checkpoint.atomic import sibling, write_text
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.card.contents import Contents, read_contents
from srd_modifier.evaluation.card.figures import circumstances, figures
from srd_modifier.evaluation.card.measured import Measured, bind
from srd_modifier.evaluation.card.metadata import Identity, card_data, inherited
from srd_modifier.evaluation.card.sections import introduction, limits, making, residual, sizes
from srd_modifier.evaluation.card.usage import usage
from srd_modifier.evaluation.plots.comparison import quality_pictures
from srd_modifier.evaluation.results import read_results
from srd_modifier.evaluation.table import METRIC_NAMES, escape

CARD = "README.md"
ASSETS = "assets"


@dataclass(frozen=True)
class WrittenCard:
    """What was written.

    Attributes:
        path: the card.
        rows: labels of the rows that were measured on the directory's files.
        others: labels of the other rows of the same run.
        pictures: files that were copied beside the card.
    """

    path: Path
    rows: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()


def write_card(
    directory: Path,
    *,
    results: Path | None = None,
    identity: Identity | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> WrittenCard:
    """Write the card of a model directory.

    Args:
        directory: a dense, W4A16 or SRD checkpoint, GGUF files, or both.
        results: the results.json of a comparison that has the directory among its models. Its pictures of quality
            against bytes are copied into the directory where they lie beside it.
        identity: what the files do not say.
        output: where the card goes; `None` is README.md in the directory. Elsewhere it has no pictures.
        overwrite: replace a card that is there.

    Raises:
        SRDError: there is nothing to describe, the results were not measured on these files, or the card would replace
            another.
    """
    identity = Identity() if identity is None else identity
    path = directory / CARD if output is None else output
    contents = read_contents(directory)
    _require_place(path, overwrite=overwrite)
    measured = None if results is None else bind(read_results(results), contents, results)
    pictures = {}
    if measured is not None and results is not None and path.resolve() == (directory / CARD).resolve():
        pictures = _pictures(measured, results.parent)
    text = card_text(contents, identity, measured, {f"{ASSETS}/{name}": title for name, title in pictures.items()})
    copied = [_copy(results.parent / name, directory / ASSETS / name) for name in pictures if results is not None]
    write_text(path, text)
    if measured is None:
        return WrittenCard(path)
    own = tuple(model.label for model in measured.own)
    return WrittenCard(
        path,
        own,
        tuple(model.label for model in measured.results.models if model not in measured.own),
        tuple(copied),
    )


def card_text(
    contents: Contents, identity: Identity, measured: Measured | None = None, pictures: dict[str, str] | None = None
) -> str:
    """The card.

    Args:
        contents: of the directory.
        identity: what its files do not say.
        measured: rows of a comparison that belong to it.
        pictures: what each shows, by its path from the card.
    """
    known = inherited(contents, identity)
    data = card_data(contents, identity, measured, known)
    base_model = data.get("base_model")
    sections = {
        "": introduction(contents, base_model),
        "Use": usage(contents, identity.repo_id),
        "Size": sizes(contents),
        "Residual": residual(contents),
        "Results": "" if measured is None else figures(measured, pictures or {}),
        "How it was measured": "" if measured is None else circumstances(measured),
        "How it was made": making(contents),
        "Limits": limits(contents, measured, base_model),
    }
    parts = [f"# {escape(identity.title(contents))}"]
    for heading, text in sections.items():
        parts += [f"## {heading}", text] if heading and text else [text] if text else []
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _require_place(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise SRDError(f"{path} is a directory, expected the name of a file")
    if path.exists() and not overwrite:
        raise SRDError(f"{path} already exists; choose another file with --output or pass --overwrite")
    if not path.parent.is_dir():
        raise SRDError(f"{path}: cannot be written, there is no directory {path.parent}")


def _pictures(measured: Measured, folder: Path) -> dict[str, str]:
    """Pictures of quality against bytes that lie beside the results, and what they show."""
    results = measured.results
    return {
        name: f"{results.task(task).title}: {METRIC_NAMES.get(metric, metric)} against bytes on disk"
        for (task, metric), name in quality_pictures(results).items()
        if (folder / name).is_file()
    }


def _copy(source: Path, target: Path) -> Path:
    """Copy a file whole, or not at all."""
    temporary = sibling(target)
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise SRDError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
