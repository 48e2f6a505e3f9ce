"""`srd export`: a checkpoint in another form."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write a checkpoint in another form.", no_args_is_help=True)


class DtypeName(str, Enum):
    """What the exported weights are stored as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


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
