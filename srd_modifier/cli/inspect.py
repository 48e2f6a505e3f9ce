"""`srd inspect`: what a checkpoint is, what it costs, and whether it is whole."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from srd_modifier.checkpoint.summary import Summary


def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with its digest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the settings and the bytes of a checkpoint; its sidecar is always checked against srd_config."""
    from srd_modifier.checkpoint.sidecar import Sidecar
    from srd_modifier.checkpoint.summary import summarize

    summary = summarize(directory)
    if verify:
        Sidecar.open(directory).verify()
    if as_json:
        typer.echo(json.dumps(summary.as_json() | ({"verified": True} if verify else {}), indent=2))
        return
    console = Console()
    console.print(table(summary))
    if verify:
        console.print("verified: base and residual match their digests")


def table(summary: "Summary") -> Table:
    """A summary as a table of two columns."""
    rows = Table(title=summary.directory, show_header=False, title_justify="left")
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("W4 modules", f"{summary.quantized_modules}")
    if summary.settings:
        rows.add_row("corrected", f"{summary.corrected_modules}")
    elif summary.quantized_modules:
        rows.add_row("corrected", "none: a plain W4A16 checkpoint")
    for label, count in summary.formats.items():
        rows.add_row("residual", f"{label}: {count} modules")
    if summary.settings:
        rows.add_row("alpha", f"{summary.settings['alpha']:g}")
        for pattern, alpha in summary.settings["layer_alphas"].items():
            rows.add_row(f"alpha of {pattern}", f"{alpha:g}")
        for name, chunk in summary.chunks.items():
            rows.add_row(name, f"{chunk.modules} of {chunk.of} modules, {chunk.bytes:,} bytes")
        rows.add_row("calibrated", "yes, importance saved" if summary.has_importance else "no data")
    rows.add_row("base on disk", f"{summary.base_bytes:,} bytes")
    if summary.settings:
        rows.add_row("residual on disk", f"{summary.residual_bytes:,} bytes")
    if summary.bits_per_weight_w4 is not None:
        rows.add_row("bits per weight, W4", f"{summary.bits_per_weight_w4:.3f}")
    if summary.settings:
        rows.add_row("bits per weight, with residual", f"{summary.bits_per_weight:.3f}")
        rows.add_row("base digest", str(summary.base_digest))
    return rows
