"""`srd card`: the model card of a directory."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    directory: Annotated[Path, typer.Argument(help="Directory with a checkpoint, GGUF files, or both.")],
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="results.json of srd compare; without it there are sizes only."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="HUB_ID", help="The original model.")] = None,
    quantized_by: Annotated[str | None, typer.Option(metavar="NAME", help="User or organization of the hub.")] = None,
    repo_id: Annotated[
        str | None,
        typer.Option(metavar="HUB_ID", help="Where it is published; the directory's name if not given."),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Such as apache-2.0; taken from earlier cards if not given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the card goes; README.md in the directory if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that is there.")] = False,
) -> None:
    """Write a Hugging Face model card: sizes, how to use it, and what was measured on exactly these files."""
    from srd_modifier.evaluation.card.metadata import Identity
    from srd_modifier.evaluation.card.write import write_card

    identity = Identity(base_model=base_model, quantized_by=quantized_by, repo_id=repo_id, license=license_)
    written = write_card(directory, results=results, identity=identity, output=output, overwrite=overwrite)
    if written.rows:
        rows = ", ".join(written.rows)
        typer.echo(f"wrote {written.path}: measured on it {rows}; others in the same run: {len(written.others)}")
    else:
        typer.echo(f"wrote {written.path}: sizes only, nothing measured was given")
