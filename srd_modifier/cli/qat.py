"""`srd qat`: a training while the bit width falls, from a model and a text to its exports."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srd_modifier.cli.eval import DeviceName

if TYPE_CHECKING:
    from srd_modifier.qat.train import Trained


def qat(
    model: Annotated[str, typer.Argument(help="Model directory or hub id, not quantized.")],
    output: Annotated[Path, typer.Option(help="Directory to make.", show_default=False)],
    text: Annotated[
        Path | None, typer.Option(help="Train on a text, a folder of texts, or a .json or .jsonl file of records.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Or on NAME[:CONFIG[:SPLIT]] of the hub, or `self`: text that the model writes."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of the settings below, in which words are joined by _.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="What to train for: w4a16, or gguf:TYPE as gguf:Q4_K_M. Default: w4a16.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Width over the training: linear, cosine, step, constant, or milestones as 0:16,0.1:16,0.9:4. "
            "Default: constant."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="First levels and scales: calibrated, nearest, or a W4A16 checkpoint or GGUF file of the model. "
            "Default: calibrated."
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns per scale of w4a16. Default: 64.")] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Module or re:PATTERN that stays in full precision, as the head does; repeat for more."),
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="searched, or learned with the weights. Default: searched.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="linear, only what is quantized, or all. Default: linear.")] = None,
    distill: Annotated[
        float | None,
        typer.Option(help="Share of the loss that is the divergence from the original, 0 to 1. Default: 1."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the distillation. Default: 1.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the samples. Default: 1.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW, falling along a cosine. Default: 2e-5.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. Default: 0.01.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per optimizer step. Default: 64.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Samples computed at once. Default: 8.")] = None,
    num_samples: Annotated[
        str | None, typer.Option(metavar="N|all", help="Samples to train on, at most. Default: 4000.")
    ] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens per sample. Default: 512.")] = None,
    products: Annotated[
        str | None,
        typer.Option(help="What is multiplied: float32, bfloat16, or auto: bfloat16 on CUDA. Default: auto."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice and order of samples. Default: 0.")] = None,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints; a tenth of the training if not given.")
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.auto,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, w4a16, srd, gguf:TYPE; commas between, or repeat. Default: bf16 and the grid's own.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training that the output holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the training that the output holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' logs and bars.")] = False,
) -> None:
    """Train a model while the bit width of its weights falls, and export it in the format that it was trained for."""
    from srd_modifier._extras import require
    from srd_modifier.cli._progress import progress_bars
    from srd_modifier.cli._quiet import quiet_libraries

    if (text is None) == (dataset is None):
        raise typer.BadParameter("give either --text or --dataset", param_hint="--text")
    if resume and overwrite:
        raise typer.BadParameter("give either --resume or --overwrite, not both", param_hint="--resume")
    require("accelerate", extra="qat")
    if not verbose:
        quiet_libraries(bars=False)

    from srd_modifier.qat.exports.destination import DENSE, Destination
    from srd_modifier.qat.settings import TrainingSettings
    from srd_modifier.qat.train import Data
    from srd_modifier.qat.train import train as run

    settings = TrainingSettings.read(
        recipe,
        grid=grid,
        schedule=schedule,
        start=start,
        group_size=group_size,
        ignore=ignore or None,
        scales=scales,
        train=train,
        distill=distill,
        temperature=temperature,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        num_samples=_number(num_samples),
        max_seq_length=max_seq_length,
        products=products,
        seed=seed,
    )
    stderr = Console(stderr=True)
    with progress_bars() as bar, nullcontext() if verbose else _errors_only():
        trained = run(
            model,
            Data(text=text, dataset=dataset),
            settings,
            output,
            exports=[Destination.parse(word) for word in _words(export) or [DENSE, settings.grid]],
            device=device.value,
            save_steps=save_steps,
            resume=resume,
            overwrite=overwrite,
            progress=bar,
            say=lambda line: stderr.print(line, style="dim", soft_wrap=True, markup=False),
        )
    if as_json:
        typer.echo(json.dumps(_as_dict(trained), indent=2))
        return
    console = Console()
    console.print(_table(trained))
    for note in trained.notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"the loss over the training is in {trained.output / 'loss.png'}", soft_wrap=True, markup=False)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Transformers warns of what is no matter to a user of the command, such as file systems without times.

    AutoRound, once imported, has its own logger say what any library warns of once; it sets the level itself then.
    """
    from transformers.utils import logging as transformers_logging

    verbosity, others = transformers_logging.get_verbosity(), logging.getLogger("autoround")
    transformers_logging.set_verbosity_error()
    others.addFilter(_is_error)
    try:
        yield
    finally:
        others.removeFilter(_is_error)
        transformers_logging.set_verbosity(verbosity)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _number(text: str | None) -> int | str | None:
    """A number of samples; what is none goes to the settings, which know `all` and refuse the rest."""
    return int(text) if text is not None and text.isdecimal() else text


def _words(given: list[str] | None) -> list[str]:
    """The options with commas between their words, each word once."""
    words = (word.strip() for option in given or [] for word in option.split(","))
    return list(dict.fromkeys(word for word in words if word))


def _bytes(export: Path) -> int:
    """Of the weights; of a GGUF file all."""
    from srd_modifier.checkpoint.sizes import measure

    return measure(export).bytes_on_disk if export.is_dir() else export.stat().st_size


def _as_dict(trained: "Trained") -> dict[str, Any]:
    return {
        "output": str(trained.output),
        "steps": trained.steps,
        "samples": trained.samples,
        "loss": trained.loss if math.isfinite(trained.loss) else None,
        "exports": [{"path": str(path), "bytes": _bytes(path)} for path in trained.exports],
        "notes": list(trained.notes),
    }


def _table(trained: "Trained") -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("optimizer steps", f"{trained.steps:,}")
    table.add_row("samples", f"{trained.samples:,}")
    table.add_row("last loss", f"{trained.loss:.4g}")
    for path in trained.exports:
        table.add_row(escape(path.name), f"{_bytes(path):,} bytes")
    return table
