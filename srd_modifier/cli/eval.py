"""`srd eval`: one model on a text or on tasks, and its divergence from a reference."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from srd_modifier.evaluation.report import Report
    from srd_modifier.evaluation.results import Results, Score
    from srd_modifier.evaluation.tasks.find import TaskOptions


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
        str, typer.Argument(help="Model directory, hub id, GGUF file, .axm container, or http:// address of a server.")
    ],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file to score.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="wikitext2, wikitext2_llamacpp or any task of the harness; repeat for more."),
    ] = None,
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
    data_dir: Annotated[Path | None, typer.Option(help="Local data of the tasks, looked at before the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many questions of a task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question, if not the task's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use only this many tokens of a text.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows at once: 4096 tokens if not given.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="What the models compute in.")] = DtypeName.float32,
    device: Annotated[DeviceName, typer.Option(help="Where the models run.")] = DeviceName.cpu,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout alone.")
    ] = None,
) -> None:
    """Score a text or tasks: perplexity, accuracy and, with --reference, KL divergence and agreement per token."""
    import torch

    from srd_modifier.cli._progress import progress_bars
    from srd_modifier.evaluation.comparison.candidate import ADDRESSES
    from srd_modifier.evaluation.evaluate import evaluate_text
    from srd_modifier.evaluation.windows import Convention

    if text is None and not task:
        raise typer.BadParameter("give --text a file, or --task a name")
    _require_folder(json_path)
    rule = Convention(convention.value)
    if task or model.startswith(ADDRESSES):
        from srd_modifier.evaluation.tasks.find import TaskOptions

        options = TaskOptions(data_dir, text, ctx, stride, rule, max_tokens, limit, num_fewshot)
        chosen = None if not chunk else tuple(chunk)
        results = _evaluate_tasks(
            model,
            reference,
            task or [],
            options,
            alpha=alpha,
            chunks=chosen,
            dtype=dtype,
            device=device,
            batch=batch_size,
        )
        _write(results.as_json(), json_path, lambda: _tasks_table(results))
        return
    assert text is not None
    with progress_bars() as bar:
        report = evaluate_text(
            model,
            text,
            reference=reference,
            convention=rule,
            ctx=ctx,
            stride=stride,
            alpha=alpha,
            chunks=chunk or None,
            max_tokens=max_tokens,
            batch_size=batch_size,
            dtype=getattr(torch, dtype.value),
            device=device.value,
            progress=bar("scoring"),
        )
    _write(report.as_json(), json_path, lambda: _table(report))


def _evaluate_tasks(
    model: str,
    reference: str | None,
    names: list[str],
    options: "TaskOptions",
    *,
    alpha: float | None,
    chunks: tuple[str, ...] | None,
    dtype: DtypeName,
    device: DeviceName,
    batch: int | None,
) -> "Results":
    """One model, or two of which one is the reference, compared without leaving anything on disk."""
    import torch

    from srd_modifier.cli._progress import progress_bars
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.evaluation.comparison.candidate import Candidate
    from srd_modifier.evaluation.comparison.run import Setting, compare
    from srd_modifier.evaluation.tasks.find import find_tasks

    quiet_libraries(bars=False)
    models = [Candidate(model, model, alpha=alpha, chunks=chunks)]
    if reference is not None:
        models.insert(0, Candidate(reference, reference if reference != model else f"{reference} (reference)"))
    tasks = find_tasks(names, options)
    with progress_bars() as bar, tempfile.TemporaryDirectory(prefix="srd-eval-") as folder:
        return compare(
            models[0],
            models[1:],
            tasks,
            Path(folder),
            setting=Setting(getattr(torch, dtype.value), device.value, batch, depth_tokens=0),
            command=command_line(),
            settings={"max_tokens": options.max_tokens, "limit": options.limit},
            progress=bar,
        )


def command_line() -> list[str]:
    """This command, to be run again."""
    return ["srd", *(shlex.quote(word) for word in sys.argv[1:])]


def _write(values: dict[str, Any], json_path: Path | None, table: Callable[[], Table]) -> None:
    from srd_modifier.checkpoint.atomic import write_json

    if json_path == Path("-"):
        typer.echo(json.dumps(values, indent=2))
        return
    Console().print(table())
    if json_path is not None:
        write_json(json_path, values)


def _tasks_table(results: "Results") -> Table:
    """One row for each metric of the model, beside the reference's where there is one."""
    model = results.models[-1]
    table = Table(title=model.label, title_justify="left")
    headings = ["task", "metric", "value", *(["reference", "recovery"] if len(results.models) > 1 else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for score in model.scores:
        row = [results.task(score.task).title, score.metric, _value(score)]
        if len(results.models) > 1:
            own = results.reference.score(score.task, score.metric)
            kept = score.recovery
            row.append("" if own is None else _value(own))
            row.append("" if kept is None else f"{kept.value:.2f} % [{kept.low:.2f}, {kept.high:.2f}]")
        table.add_row(*row)
    size = "" if model.bytes_on_disk is None else f"{model.bytes_on_disk:,} bytes on disk. "
    table.caption = size + " ".join(f"{task.title}: {task.description}." for task in results.tasks)
    table.caption_justify = "left"
    return table


def _value(score: "Score") -> str:
    """A value with its standard error."""
    shape = ".3e" if score.metric.startswith("kld") else ".4f"
    return f"{score.value:{shape}}" + (
        "" if score.stderr is None else f" ± {score.stderr:{'.1e' if 'e' in shape else shape}}"
    )


def _require_folder(json_path: Path | None) -> None:
    """Refuse a result that could not be written before the minutes of scoring, not after them."""
    if json_path is not None and not json_path.parent.is_dir():
        raise SRDError(f"{json_path}: cannot be written, there is no directory {json_path.parent}")


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
