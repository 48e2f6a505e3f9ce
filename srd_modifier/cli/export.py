"""`srd export`: a checkpoint in another form."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from srd_modifier.cli.eval import DeviceName

if TYPE_CHECKING:
    from srd_modifier.gguf.plan import ExportSummary

app = typer.Typer(help="Write a checkpoint in another form.", no_args_is_help=True)


class DtypeName(str, Enum):
    """What the exported weights are stored as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class FileTypeName(str, Enum):
    """Which types the tensors of a GGUF file get; `gguf.mixture.FileType` has the rules."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_0 = "Q4_0"


@app.callback()
def export() -> None:
    """Write a checkpoint in another form."""


@app.command("bf16")
def bf16(
    directory: Annotated[Path, typer.Argument(help="SRD checkpoint.")],
    output: Annotated[Path, typer.Option(help="Directory to make.", show_default=False)],
    alpha: Annotated[
        float | None, typer.Option(help="Share of the residual, 0 to 1; the checkpoint's own if not given.")
    ] = None,
    chunk: Annotated[
        list[str] | None, typer.Option(help="Chunk of depth to correct, all if not given; repeat for more.")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of the exported weights.")] = DtypeName.bfloat16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model directory.")] = False,
) -> None:
    """Write the corrected weights as an ordinary dense checkpoint that any loader reads."""
    import torch

    from srd_modifier.checkpoint.merge import export_dense

    export_dense(
        directory, output, dtype=getattr(torch, dtype.value), alpha=alpha, chunks=chunk or None, overwrite=overwrite
    )
    typer.echo(f"wrote {output}: dense {dtype.value}, no quantization, no sidecar")


@app.command("gguf")
def gguf(
    model: Annotated[str, typer.Argument(help="SRD checkpoint, W4A16 checkpoint, or any model: directory or hub id.")],
    output: Annotated[Path, typer.Option(help="GGUF file to make, or a directory to name it in.", show_default=False)],
    file_type: Annotated[
        FileTypeName, typer.Option("--type", help="Which types the tensors get, by llama.cpp's name.")
    ] = FileTypeName.Q4_K_M,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the residual, 0 to 1; the checkpoint's own if not given.")
    ] = None,
    chunk: Annotated[
        list[str] | None, typer.Option(help="Chunk of depth to correct, all if not given; repeat for more.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=TYPE: tensors whose name has the pattern get this type; repeat for more."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance by llama-imatrix; the checkpoint's own if not given.")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Write the importance that was used, for llama-quantize.")
    ] = None,
    no_importance: Annotated[
        bool, typer.Option("--no-importance", help="Quantize without importance, even if there is some.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Choose codes by the layers' outputs on this text or JSON file, or `self`: the model's own."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 64,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a calibration sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the choice of samples, or of writing them.")] = 0,
    device: Annotated[DeviceName, typer.Option(help="Where calibration computes.")] = DeviceName.auto,
    budget: Annotated[
        str | None,
        typer.Option(help="Choose each tensor's type within 4.85bpw (bits per weight, all tensors), 119MB or 110MiB."),
    ] = None,
    residual_lora: Annotated[
        int | None, typer.Option(min=1, help="Also write what the file lost as a LoRA adapter of this rank.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a GGUF file that stock llama.cpp loads."""
    from srd_modifier.gguf.calibration.text import Calibration
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType, read_override
    from srd_modifier.selection.budget import parse_budget

    if no_importance and (imatrix or imatrix_out):
        raise typer.BadParameter("give either --no-importance or an imatrix, not both", param_hint="--no-importance")
    with _progress() as report:
        summary = export_gguf(
            model,
            output,
            file_type=FileType(file_type.value),
            overrides=[read_override(text) for text in tensor_type or []],
            alpha=alpha,
            chunks=chunk or None,
            imatrix=imatrix,
            use_importance=not no_importance,
            imatrix_output=imatrix_out,
            calibration=None
            if calibration is None
            else Calibration(calibration, num_samples, max_seq_length, seed, device.value),
            budget=None if budget is None else parse_budget("budget", budget, field="--budget"),
            lora_rank=residual_lora,
            overwrite=overwrite,
            report=report,
        )
    typer.echo(json.dumps(_as_dict(summary), indent=2) if as_json else _as_text(summary))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each thing that calibration does, and nothing at all where stderr is not a terminal."""
    console = Console(stderr=True)
    bars = Progress(transient=True, console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    with bars:
        yield report


def _as_dict(summary: "ExportSummary") -> dict[str, object]:
    return {**vars(summary), "path": str(summary.path)}


def _as_text(summary: "ExportSummary") -> str:
    weighted = "with importance" if summary.weighted else "without importance"
    method = "calibrated" if summary.method == "output-error" else weighted
    lines = [
        f"wrote {summary.path}: {summary.mixture} {method}, {summary.bytes:,} bytes, "
        f"{summary.bits_per_weight:.3f} bits per weight over all {summary.weights:,} weights",
        "tensors: " + ", ".join(f"{count} {name}" for name, count in summary.types.items()),
    ]
    if summary.fallen_back:
        pairs = Counter(summary.fallen_back.values())
        listed = ", ".join(f"{count} {old} to {new}" for (old, new), count in pairs.items())
        lines.append(f"{len(summary.fallen_back)} tensors have rows that do not divide into blocks: {listed}")
    if summary.predicted_kld is not None:
        lines.append(f"predicted divergence from the original: {summary.predicted_kld:.3g} nats per token")
    return "\n".join([*lines, *(f"note: {note}" for note in summary.notes)])
