"""`srd quantize`: a model and a recipe to a checkpoint."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class PipelineName(str, Enum):
    """llm-compressor's calibration pipelines."""

    independent = "independent"
    sequential = "sequential"
    basic = "basic"
    datafree = "datafree"


def quantize(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    recipe: Annotated[Path, typer.Option(help="YAML recipe; see recipes/.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Directory to make.", show_default=False)],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: a text, .json or .jsonl file, `self` for text that the model writes, or a "
            "data set that llm-compressor knows by name."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 512,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the choice of samples.")] = 0,
    pipeline: Annotated[PipelineName, typer.Option(help="llm-compressor's pipeline.")] = PipelineName.independent,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model directory.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where a quantization to the same directory was cut off, if one was."),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What the weights may take of the memory while a recipe calibrates, as 8GB; the others stay on the "
            "disk.  [default: what is free, less 5GB]",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show llm-compressor's log.")] = False,
) -> None:
    """Quantize a model to W4A16, and keep what is lost as a residual beside it."""
    from srd_modifier.checkpoint.config import read_srd_config
    from srd_modifier.checkpoint.summary import summarize
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.cli.inspect import table
    from srd_modifier.distributed import launched_rank
    from srd_modifier.quantizing import quantize as run
    from srd_modifier.selection.budget import parse_bytes

    first = launched_rank() == 0  # of the processes that torchrun started the others say nothing
    if not verbose:
        quiet_libraries(bars=first and sys.stderr.isatty())
    run(
        model,
        recipe,
        output,
        dataset=dataset,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        seed=seed,
        overwrite=overwrite,
        resume=resume,
        pipeline=pipeline.value,
        max_memory=None if max_memory is None else parse_bytes(max_memory, field="--max-memory"),
    )
    if not first:
        return
    if read_srd_config(output) is None:
        Console().print(f"wrote {output}, with no residual: the recipe has no SRDModifier")
    else:
        Console().print(table(summarize(output)))
