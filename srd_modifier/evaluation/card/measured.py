"""What of a comparison was measured on the files of a directory: their digests decide, not their names."""

from dataclasses import dataclass
from pathlib import Path

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.card.contents import Contents, Kind
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.results import ModelResult, Results


@dataclass(frozen=True)
class Measured:
    """A comparison, and the files of a directory that its rows are about.

    Attributes:
        results: the comparison.
        own: the path of the row's files, for rows that were measured on the directory or on one of its GGUF files.
        digest: of the directory's checkpoint, `None` without one.
    """

    results: Results
    own: dict[ModelResult, Path]
    digest: str | None


def bind(results: Results, contents: Contents, path: Path) -> Measured:
    """Find the rows that were measured on what the directory holds now.

    Args:
        results: the comparison.
        contents: of the directory.
        path: of the comparison, for messages.

    Raises:
        SRDError: no row was measured on the directory as it is, or one on a file of it that has changed since.
    """
    directory = contents.directory
    digest = None if contents.kind is Kind.NONE else model_digest(directory)
    files = {model_digest(model.path): model.path for model in contents.gguf}
    if digest is not None:
        files[digest] = directory
    own = {model: files[model.digest] for model in results.models if model.digest in files}
    if not own or (digest is not None and directory not in own.values()):
        raise SRDError(
            f"{path}: no row was measured on {directory} as it is now; measure with srd compare REFERENCE {directory}"
        )
    here = {place.resolve() for place in (directory, *(model.path for model in contents.gguf))}
    stale = [model.label for model in results.models if model not in own and Path(model.model).resolve() in here]
    if stale:
        raise SRDError(
            f"{path}: {', '.join(stale)} was measured before the files in {directory} were changed; measure again with "
            "srd compare"
        )
    return Measured(results, own, digest)
