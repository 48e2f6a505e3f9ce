"""`srd demo`: the main job on the embedded model, in a table."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from srd_modifier.demo import DemoRow


def demo(
    model: Annotated[Path | None, typer.Option(help="Another model than examples/tiny-llama.")] = None,
    text: Annotated[Path | None, typer.Option(help="Another text than examples/text/demo.txt.")] = None,
    output: Annotated[Path, typer.Option(help="Where the checkpoints go; replaced if there.")] = Path("out/demo"),
) -> None:
    """Quantize a small trained model, load it with and without the correction, and measure."""
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.demo import MODEL, TEXT, conclusion, run_demo

    quiet_libraries(bars=False)
    console = Console()
    started = time.perf_counter()
    rows = run_demo(model or MODEL, text or TEXT, output, say=lambda line: console.print(f"[dim]{line}[/dim]"))
    console.print(_table(rows, text or TEXT))
    console.print(conclusion(rows))
    console.print(
        f"[dim]{time.perf_counter() - started:.0f} s. The checkpoints are in {output}; "
        f"look closer with: srd inspect {output / 'full'} --verify[/dim]"
    )


def _table(rows: "list[DemoRow]", text: Path) -> Table:
    rule = rows[0].report.rule
    table = Table(
        title=f"{rows[0].report.perplexity.tokens:,} tokens of {text.name} in windows of {rule.ctx}, float32",
        caption="bytes: on disk. bits/weight: of the Linear weights, scales included.\n"
        "KLD: nats per token from bf16. top-1: tokens with the same best guess as bf16.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("model", "bytes", "bits/weight", "perplexity", "KLD", "top-1"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        report = row.report
        assert report.divergence is not None
        table.add_row(
            row.name,
            f"{report.size.bytes_on_disk:,}",
            f"{report.size.bits_per_weight:.2f}",
            f"{report.perplexity.ppl:.3f}",
            f"{report.divergence.kld_mean:.2e}",
            f"{report.divergence.top1_agreement:.2%}",
        )
    return table
