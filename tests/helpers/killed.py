"""Quantizations in a forked child that kills itself right before its k-th change to the file system, or in it."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
from safetensors.torch import save_file
from streamed import differing

from srd_modifier.quantizing import quantize
from srd_modifier.resuming.journal import Journal
from srd_modifier.resuming.workplace import unfinished

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile"}


def in_child(work: Callable[[], object]) -> int:
    """The wait status of a forked process that does some work without waiting for the disk."""
    return forked.in_child(work, fsync=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_changes(folder: Path, change: Callable[[], bool]) -> None:
    """Call `change` right before every change below a folder; if it returns True, die in the middle of that one."""
    from srd_modifier.modifier import candidates, finished

    pwrite, write = os.pwrite, Journal._write

    def half(descriptor: int, data: Any, offset: int) -> int:
        if change():
            pwrite(descriptor, data[: len(data) // 2], offset)
            die()
        return pwrite(descriptor, data, offset)

    def half_line(self: Journal[Any], line: str, mode: str) -> None:
        if change():
            with self.path.open(mode) as file:
                file.write(line.encode()[: len(line) // 2])
            die()
        write(self, line, mode)

    def half_file(tensors: Any, path: Path) -> None:
        last = change()
        save_file(tensors, path)
        if last:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writing = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(folder))
        if (writing or event in _EVENTS) and change():
            die()

    os.pwrite = half
    Journal._write = half_line  # type: ignore[method-assign]
    candidates.save_file = finished.save_file = half_file
    sys.addaudithook(audit)


@dataclass
class Quantization:
    """A quantization that is killed and resumed.

    Attributes:
        model: a directory.
        recipe: a file.
        output: alone in its folder, so that a test sees what is left beside it.
        expected: the checkpoint of an undisturbed run.
        options: of `quantize`.
    """

    model: Path
    recipe: Path
    output: Path
    expected: Path
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **options: Any) -> None:
        quantize(str(self.model), self.recipe, self.output, **{**self.options, **options})

    def killed(self, at: int, **options: Any) -> bool:
        """Run in a child that dies at its `at`-th change; False if it was done before."""
        seen = 0

        def change() -> bool:
            nonlocal seen
            seen += 1
            return seen == at

        def work() -> None:
            count_changes(self.output.parent, change)
            self.run(**options)

        status = in_child(work)
        assert status in (0, signal.SIGKILL), "the quantization failed by itself"
        return status != 0

    def killed_in(self, owner: Any, name: str, call: int = 1, **options: Any) -> None:
        """Run in a child that dies when it calls a function for the n-th time."""
        function, calls = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                die()
            return function(*args, **kwargs)

        def work() -> None:
            setattr(owner, name, counted)
            self.run(**options)

        assert in_child(work) == signal.SIGKILL

    def resume(self, **options: Any) -> None:
        """Go on in this process, and compare the whole directory."""
        self.run(resume=True, **options)
        assert differing(self.output, self.expected) == []
        assert [path.name for path in self.output.parent.iterdir()] == [self.output.name]

    def changes(self) -> int:
        """How many changes there are up to the one that moves everything to its place, by halving."""
        first, last = 1, 2
        while self.killed(last) and not self.output.exists():
            self.clean()
            first, last = last, 2 * last
        self.clean()
        while last - first > 1:
            middle = (first + last) // 2
            if self.killed(middle) and not self.output.exists():
                first = middle
            else:
                last = middle
            self.clean()
        return first

    @property
    def place(self) -> Path:
        """Where it lies until it is whole."""
        return unfinished(self.output)

    @property
    def journal(self) -> Path:
        return self.place / "finished.jsonl"

    def lines(self) -> int:
        """Whole lines of the journal."""
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    def clean(self) -> None:
        shutil.rmtree(self.output.parent)
        self.output.parent.mkdir()


def flip(path: Path, position: int) -> None:
    """Change a byte of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 1]))
