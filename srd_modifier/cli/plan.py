"""`srd plan`: what quantizing would give and take, before it is done."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from srd_modifier.planning.estimate import Estimate
    from srd_modifier.planning.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    recipe: Annotated[Path, typer.Option(help="YAML recipe; see recipes/.", show_default=False)],
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Quantize a shorter model with made-up weights, for time and memory."),
    ] = True,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples, where the recipe calibrates: for time and memory.")
    ] = 512,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what `srd quantize` would write, beside other forms of the model; no weight is read."""
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.planning.plan import plan as run

    quiet_libraries(bars=False)
    planned = run(model, recipe, probe=probe, num_samples=num_samples, max_seq_length=max_seq_length)
    if as_json:
        typer.echo(json.dumps(planned.as_json(), indent=2))
        return
    console = Console()
    console.print(_modules(planned))
    console.print(_bytes(planned))
    console.print(_alternatives(planned))
    if planned.estimate is not None:
        for line in _estimated(planned.estimate):
            console.print(line, soft_wrap=True)
    elif probe:
        console.print(f"time and memory are not estimated: {planned.not_estimated}", soft_wrap=True)


def _estimated(estimate: "Estimate") -> Iterator[str]:
    data = "" if estimate.tokens is None else f", of given data of {estimate.tokens:,} tokens"
    yield f"time on this machine: about {estimate.seconds:,.0f} s{data}"
    if estimate.peak_bytes is None:
        yield f"memory is not estimated: {estimate.why_no_memory}"
        return
    held = "a decoder layer at a time" if estimate.tokens is None else "the whole model and its activations"
    yield f"memory at its peak: about {estimate.peak_bytes / 1e9:,.2f} GB, {held}"


def _modules(plan: "Plan") -> Table:
    table = _table(f"{plan.model}, {plan.recipe}", "modules", "quantized", "with residual")
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.quantized.items())
    for name, chunk in plan.chunks.items():
        corrected = f"up to {chunk.corrected}" if plan.budget else f"{chunk.corrected}"
        table.add_row(name, f"{chunk.quantized}", corrected)
    for reason, count in plan.skipped.items():
        table.add_row(f"left as they are: {reason}", f"{count}", "")
    table.caption = kinds
    table.caption_justify = "left"
    return table


def _bytes(plan: "Plan") -> Table:
    table = _table("output directory", "", "bytes")
    base, files = plan.base, plan.files
    rows = {
        "W4 codes": base.codes,
        "W4 scales": base.scales,
        "W4 zero points": base.zero_points,
        "W4 shapes": base.shapes,
        "not quantized": base.unquantized,
    }
    if plan.residual is not None:
        rows |= {
            "residual codes": plan.residual.codes,
            "residual scales": plan.residual.scales,
            "residual masks": plan.residual.masks,
        }
    elif plan.total_bytes is not None:
        rows["residual, at most"] = files.residual
    rows["mean squared inputs"] = files.importance
    rows["GGUF"] = files.gguf
    for label, size in rows.items():
        if size:
            table.add_row(label, f"{size:,}")
    headers = files.total - sum(rows.values()) - files.text
    table.add_row("headers, indexes, sensitivity", f"{headers:,}")
    table.add_row("config, recipe, tokenizer (about)", f"{files.text:,}")
    if plan.budget is not None:
        table.add_row("budget", plan.budget)
    table.add_section()
    most = "at most " if plan.budget is not None else ""
    table.add_row("total", "open" if plan.total_bytes is None else f"{most}{plan.total_bytes:,}")
    if plan.bits_per_weight is not None:
        table.add_row("bits per quantized weight", f"{most}{plan.bits_per_weight:.3f}")
    return table


def _alternatives(plan: "Plan") -> Table:
    table = _table("in other forms", "", "bytes of weights", "bits per quantized weight", "bits per weight")
    for form in plan.alternatives:
        bits = "-" if form.bits_per_weight is None else f"{form.bits_per_weight:.3f}"
        table.add_row(form.name, f"{form.bytes:,}", bits, f"{form.total_bits_per_weight:.3f}")
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
