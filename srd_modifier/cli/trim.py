"""`srd trim`: a checkpoint cut down to a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from srd_modifier.errors import ConfigError

if TYPE_CHECKING:
    from srd_modifier.checkpoint.trim import Trimmed


def trim(
    directory: Annotated[Path, typer.Argument(help="SRD checkpoint, quantized with `sensitivity: gradient`.")],
    output: Annotated[Path, typer.Option(help="Directory to make.", show_default=False)],
    budget: Annotated[
        str | None, typer.Option(help="Size to stay within: 5.0bpw (bits per weight), 13MB or 12.5MiB on disk.")
    ] = None,
    max_divergence: Annotated[
        str | None,
        typer.Option(help="Predicted KL divergence to stay within, nats per token, with the fewest bytes."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model directory.")] = False,
) -> None:
    """Drop the residuals that earn least; the original model is not needed."""
    from srd_modifier.checkpoint.trim import trim as run
    from srd_modifier.selection.budget import parse_budget

    if (budget is None) == (max_divergence is None):
        raise ConfigError("srd trim takes either --budget or --max-divergence")
    limit = (
        parse_budget("max_divergence", max_divergence, field="--max-divergence")
        if budget is None
        else parse_budget("budget", budget, field="--budget")
    )
    trimmed = run(directory, output, limit, overwrite=overwrite)
    if not trimmed.dropped:
        typer.echo(f"{directory} is within {limit} with all its residuals: {output} is a copy of it")
    Console().print(_table(trimmed, output))


def _table(trimmed: "Trimmed", output: Path) -> Table:
    before, after = trimmed.before, trimmed.after
    table = Table(title=str(output), title_justify="left", caption="predicted at alpha 1", caption_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("modules with a residual", f"{len(trimmed.kept) + len(trimmed.dropped)}", f"{len(trimmed.kept)}")
    table.add_row("bytes on disk", f"{before.bytes_on_disk:,}", f"{after.bytes_on_disk:,}")
    table.add_row("bits per weight", f"{before.bits_per_weight:.3f}", f"{after.bits_per_weight:.3f}")
    table.add_row("predicted KLD, nats", f"{trimmed.divergence_before:.3e}", f"{trimmed.divergence_after:.3e}")
    return table
