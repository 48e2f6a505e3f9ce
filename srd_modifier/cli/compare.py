"""`srd compare`: models scored on the same tasks in one run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from srd_modifier._extras import require
from srd_modifier.cli.eval import ConventionName, DeviceName, DtypeName, command_line

# what nobody asked for stays small
_UNASKED_BYTES = 8_000_000_000


def compare(
    reference: Annotated[str, typer.Argument(help="What the others are compared with, usually the original.")],
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE...",
            help="[LABEL=]MODEL[@alpha=A][@chunks=NAME+NAME]: a directory, hub id, GGUF file, container or server.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for results.json, table.md and the plots; made if need be.")],
    tasks: Annotated[
        str, typer.Option(help="Names with commas between: wikitext2, wikitext2_llamacpp, or any of the harness.")
    ] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Local data: wiki.test.raw, TASK.jsonl; what is not there comes from the hub.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file to score as well.")] = None,
    ctx: Annotated[int | None, typer.Option(help="Tokens in a window, if not the task's own.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a sliding window advances, if not the task's own.")] = None,
    convention: Annotated[ConventionName, typer.Option(help="How --text is cut.")] = ConventionName.sliding,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use only this many tokens of a text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many questions of a task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question, if not the task's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences at once, if not what suits.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="What the models compute in.")] = DtypeName.float32,
    device: Annotated[DeviceName, typer.Option(help="Where the models run.")] = DeviceName.cpu,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where log-probabilities of the reference are kept; ~/.cache/srd-modifier if not given."),
    ] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep them at all.")] = True,
    depth_tokens: Annotated[int, typer.Option(min=0, help="Tokens for divergence by depth, 0 for none.")] = 1024,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the results.")] = True,
) -> None:
    """Score models on the same tasks in one run: results.json, a table, plots. A run that was interrupted goes on."""
    import torch

    from srd_modifier.cli._progress import progress_bars
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.evaluation.comparison.candidate import Candidate
    from srd_modifier.evaluation.comparison.report import write_report
    from srd_modifier.evaluation.comparison.run import Setting, default_cache
    from srd_modifier.evaluation.comparison.run import compare as run
    from srd_modifier.evaluation.table import markdown_table
    from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks
    from srd_modifier.evaluation.windows import Convention

    quiet_libraries(bars=False)
    options = TaskOptions(
        data_dir=data_dir,
        text=text,
        ctx=ctx,
        stride=stride,
        convention=Convention(convention.value),
        max_tokens=max_tokens,
        limit=limit,
        num_fewshot=num_fewshot,
    )
    if not tasks.strip(" ,") and text is None:
        raise typer.BadParameter("give --tasks names, or --text a file")
    # what the report needs is asked for before the minutes of scoring, not after them
    require("jsonschema", extra="eval")
    if plots:
        require("matplotlib", extra="plot")
    models = [Candidate.parse(word) for word in (reference, *candidates)]
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    with progress_bars() as progress:
        results = run(
            models[0],
            models[1:],
            find_tasks([name.strip() for name in tasks.split(",") if name.strip()], options),
            output,
            setting=Setting(
                dtype=getattr(torch, dtype.value),
                device=device.value,
                batch_size=batch_size,
                cache=(cache_dir or default_cache()) if cache else None,
                cache_limit=_UNASKED_BYTES if cache_dir is None else None,
                depth_tokens=depth_tokens,
            ),
            command=command_line(),
            settings={"max_tokens": max_tokens, "limit": limit},
            progress=progress,
            say=lambda line: Console(stderr=True).print(line, style="dim", soft_wrap=True, markup=False),
        )
    written = write_report(results, output, plots=plots)
    console.print(Markdown(markdown_table(results)))
    console.print(f"wrote {', '.join(path.name for path in written)} to {output}", soft_wrap=True, markup=False)
