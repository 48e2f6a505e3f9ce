"""`srd eval`: perplexity of a model on a text, and its divergence from a reference."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from srd_modifier.evaluation.report import Report


class ConventionName(str, Enum):
    """The windowing rules of `srd_modifier.evaluation.windows`, spelled here so that `--help` needs no torch."""

    sliding = "sliding"
    llamacpp = "llamacpp"


class DtypeName(str, Enum):
    """What the models compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DeviceName(str, Enum):
    """Where the models run."""

    cpu = "cpu"
    cuda = "cuda"
    auto = "auto"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model directory or hub id, with or without a residual, or a GGUF file.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.", show_default=False)],
    reference: Annotated[
        str | None, typer.Option(help="Model to measure the divergence from, usually the original.")
    ] = None,
    ctx: Annotated[int | None, typer.Option(help="Tokens in a window: 2048 if not given, 512 with llamacpp.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens a window advances: 512 if not given, ctx with llamacpp.")
    ] = None,
    convention: Annotated[
        ConventionName, typer.Option(help="Sliding windows, or llama.cpp's: no overlap, second half scored.")
    ] = ConventionName.sliding,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the residual to apply, 0 to 1; the checkpoint's own if not given.")
    ] = None,
    chunk: Annotated[
        list[str] | None, typer.Option(help="Chunk of depth to correct, all if not given; repeat for more.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use only this many tokens of the text.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows at once: 4096 tokens if not given.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="What the models compute in.")] = DtypeName.float32,
    device: Annotated[DeviceName, typer.Option(help="Where the models run.")] = DeviceName.cpu,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout alone.")
    ] = None,
) -> None:
    """Score a text: perplexity and, with --reference, KL divergence and agreement per token."""
    import torch

    from srd_modifier.checkpoint.atomic import write_json
    from srd_modifier.evaluation.evaluate import evaluate_text
    from srd_modifier.evaluation.windows import Convention

    _require_folder(json_path)
    with _progress() as progress:
        report = evaluate_text(
            model,
            text,
            reference=reference,
            convention=Convention(convention.value),
            ctx=ctx,
            stride=stride,
            alpha=alpha,
            chunks=chunk or None,
            max_tokens=max_tokens,
            batch_size=batch_size,
            dtype=getattr(torch, dtype.value),
            device=device.value,
            progress=progress,
        )
    if json_path == Path("-"):
        typer.echo(json.dumps(report.as_json(), indent=2))
        return
    Console().print(_table(report))
    if json_path is not None:
        write_json(json_path, report.as_json())


def _require_folder(json_path: Path | None) -> None:
    """Refuse a result that could not be written before the minutes of scoring, not after them."""
    if json_path is not None and not json_path.parent.is_dir():
        raise SRDError(f"{json_path}: cannot be written, there is no directory {json_path.parent}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while windows are scored, and nothing at all where stderr is not a terminal."""
    quiet = not sys.stderr.isatty()
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    bar = Progress(
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )

    def show(done: int, total: int) -> None:
        # Started here and not before, so that it does not fight with the bars of loading.
        if not bar.tasks:
            bar.add_task("scoring", total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done)

    try:
        yield show
    finally:
        bar.stop()


def _table(report: "Report") -> Table:
    table = Table(title=report.model, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, value)
    return table


def _rows(report: "Report") -> list[tuple[str, str]]:
    rule, perplexity, size = report.rule, report.perplexity, report.size
    rows = [
        ("text", report.text_path),
        ("windows", f"{rule.convention.value}, ctx {rule.ctx}, stride {rule.stride}"),
        ("tokens scored", f"{perplexity.tokens:,}"),
        ("perplexity", f"{perplexity.ppl:.4f} ± {perplexity.ppl_stderr:.4f}"),
    ]
    if report.divergence is not None:
        divergence = report.divergence
        rows += [
            ("reference", str(report.reference)),
            ("KLD mean", f"{divergence.kld_mean:.3e} ± {divergence.kld_stderr:.1e} nats"),
            *_predicted(report),
            ("KLD median, p99", f"{divergence.kld_median:.3e}, {divergence.kld_p99:.3e} nats"),
            ("equal top-1", f"{divergence.top1_agreement:.2%}"),
        ]
    else:
        rows += _predicted(report)
    if report.alpha is not None:
        rows.append(("alpha", f"{report.alpha:g}"))
        rows.append(("chunks", "all" if report.chunks is None else ", ".join(report.chunks)))
    rows.append(("on disk", f"{size.bytes_on_disk:,} bytes"))
    if report.bits_per_weight is not None:
        rows.append(("bits per weight", f"{report.bits_per_weight:.3f}{_of_all(report)}"))
    rows.append(("computed in", f"{report.dtype}, {report.seconds:.1f} s"))
    return rows


def _of_all(report: "Report") -> str:
    """Bits per weight of all that the model has on disk."""
    total = report.total_bits_per_weight
    return "" if total is None else f", {total:.3f} with embeddings and headers"


def _predicted(report: "Report") -> list[tuple[str, str]]:
    """What the calibration foresaw, to be read beside what was measured."""
    if report.predicted_kld is None:
        return []
    ratio = report.predicted_ratio
    beside = "" if ratio is None else f", {ratio:.3g} times the measured"
    return [("KLD predicted", f"{report.predicted_kld:.3e} nats{beside}")]
