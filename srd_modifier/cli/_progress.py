"""Bars on stderr, with the time that is left, and nothing at all where stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Show = Callable[[int, int], None]


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Show]]:
    """Gives, for the title of a piece of work, what is called with (done, of all); one bar is shown at a time."""
    quiet = not sys.stderr.isatty()
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )

    def bar(title: str) -> Show:
        tasks: list[TaskID] = []

        def show(done: int, total: int) -> None:
            # Started here and not before, so that it does not fight with the bars of loading.
            if not tasks:
                tasks.append(bars.add_task(title, total=total))
                bars.start()
            bars.update(tasks[0], completed=done, total=total, visible=done < total)

        return show

    try:
        yield bar
    finally:
        bars.stop()


@contextmanager
def byte_bar(title: str) -> Iterator[Show]:
    """Gives what is called with (done, of all) in bytes, from any thread."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
