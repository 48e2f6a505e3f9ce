"""`srd inspect`: what a checkpoint is, what it costs, and whether it is whole."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from srd_modifier.checkpoint.sensitivity import Sensitivity
    from srd_modifier.checkpoint.summary import Summary


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR|F.axm", help="Checkpoint directory or container.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with its digest.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Show what divergence each module is predicted to cause.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the sensitivity as a heat map: FILE.svg or FILE.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the settings and the bytes of a checkpoint; its sidecar is always checked against srd_config.

    A container is read whole before anything of it is shown, and checked with the key in SRD_AXM_KEY if there is one.
    """
    from srd_modifier.checkpoint.sidecar import Sidecar
    from srd_modifier.checkpoint.summary import summarize

    given, directory = directory, _checkpoint(directory)
    summary = replace(summarize(directory), directory=str(given))
    measured = _require_sensitivity(directory) if sensitivity or plot is not None else None
    if verify:
        Sidecar.open(directory).verify()
    if plot is not None and measured is not None:
        from srd_modifier.evaluation.plots.heatmap import draw_heatmap

        draw_heatmap(measured, plot)
    if as_json:
        values = summary.as_json() | ({"verified": True} if verify else {})
        if measured is not None:
            values["sensitivity"] = _sensitivity_json(measured, _residual_bytes(directory))
        typer.echo(json.dumps(values, indent=2))
        return
    console = Console()
    console.print(table(summary))
    if sensitivity and measured is not None:
        console.print(_sensitivity_table(measured, _residual_bytes(directory)))
    if plot is not None:
        console.print(f"wrote {plot}", soft_wrap=True)
    if verify:
        console.print("verified: base and residual match their digests")


def _checkpoint(path: Path) -> Path:
    """The directory, or the root of the container."""
    from srd_modifier.axm.entries import is_container, open_root
    from srd_modifier.cli._progress import byte_bar
    from srd_modifier.errors import SRDError

    if not is_container(path):
        return path
    with byte_bar("verifying") as progress:
        root = open_root(path, progress)
    if not (root / "config.json").is_file():
        raise SRDError(f"{path} holds no checkpoint directory; `srd axm inspect` shows what it holds")
    return root


def _require_sensitivity(directory: Path) -> "Sensitivity":
    from srd_modifier.checkpoint.config import SENSITIVITY
    from srd_modifier.checkpoint.sensitivity import read_sensitivity
    from srd_modifier.errors import CheckpointError

    found = read_sensitivity(directory)
    if found is None:
        raise CheckpointError(
            f"{directory / SENSITIVITY} is missing, so nothing is predicted; quantize with `sensitivity: gradient` in "
            "the SRDModifier recipe"
        )
    return found


def _residual_bytes(directory: Path) -> dict[str, int]:
    from srd_modifier.checkpoint.sidecar import Sidecar

    return {module: entry.bytes() for module, entry in Sidecar.open(directory).entries.items()}


def _sensitivity_json(measured: "Sensitivity", residual_bytes: dict[str, int]) -> dict[str, Any]:
    values = measured.to_dict()
    for name, numbers in values["modules"].items():
        numbers["residual_bytes"] = residual_bytes.get(name, 0)
    return {
        "predicted_kld_w4": measured.predicted({}),
        "predicted_kld": measured.predicted(dict.fromkeys(residual_bytes, 1.0)),
        **values,
    }


def _sensitivity_table(measured: "Sensitivity", residual_bytes: dict[str, int]) -> Table:
    """One row for each module, the most damaged first, and their totals."""
    rows = Table(
        title=f"Predicted damage in nats per token, by {measured.method} on {measured.tokens:,} tokens",
        caption="removed per byte: what the residual takes off the damage, for each byte of it",
        title_justify="left",
        caption_justify="left",
    )
    rows.add_column("module", overflow="fold")
    for heading in ("W4", "corrected", "residual bytes", "removed per byte"):
        rows.add_column(heading, justify="right")
    for name, module in sorted(measured.modules.items(), key=lambda item: -item[1].w4):
        size = residual_bytes.get(name, 0)
        if module.corrected is None:
            rows.add_row(name, f"{module.w4:.3e}", "-", "-", "-")
        else:
            rows.add_row(
                name, f"{module.w4:.3e}", f"{module.corrected:.3e}", f"{size:,}", f"{module.removed / size:.3e}"
            )
    plain, corrected = measured.predicted({}), measured.predicted(dict.fromkeys(residual_bytes, 1.0))
    size = sum(residual_bytes.values())
    per_byte = f"{(plain - corrected) / size:.3e}" if size else "-"
    rows.add_section()
    rows.add_row("all", f"{plain:.3e}", f"{corrected:.3e}", f"{size:,}", per_byte)
    return rows


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
        if summary.predicted_kld is not None:
            rows.add_row("KLD predicted, W4", f"{summary.predicted_kld_w4:.3e} nats")
            rows.add_row("KLD predicted, with residual", f"{summary.predicted_kld:.3e} nats")
        rows.add_row("base digest", str(summary.base_digest))
    return rows
