"""Run a piece of work in a process of its own and learn what it cost."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.models import REPOSITORY

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """What a piece of work cost.

    Attributes:
        seconds: wall time of the work, imports not counted.
        peak_mb: largest resident memory of the process, mapped files included.
        peak_anonymous_mb: largest anonymous memory: what the process itself allocated.
        cpu_seconds: of all its threads, in the work; unlike wall time, what others do on the machine hardly changes it.
    """

    seconds: float
    peak_mb: float
    peak_anonymous_mb: float
    cpu_seconds: float = 0.0


def measure(work: Callable[[], None]) -> Cost:
    """Run `work` in this process and measure it: the kernel's own peak, and anonymous memory sampled every 20 ms."""
    anonymous = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal anonymous
        while not stop.is_set():
            anonymous = max(anonymous, _memory()["RssAnon"])
            time.sleep(_SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    stop.set()
    sampler.join()
    return Cost(seconds, _memory()["VmHWM"] / 1024, anonymous / 1024, cpu_seconds)


def _memory() -> dict[str, int]:
    """Peak of resident memory and anonymous memory of this process in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon")}


def print_cost(cost: Cost) -> None:
    """Hand a cost to the process that started this one: the last line of stdout."""
    print(json.dumps(asdict(cost)), flush=True)


def environment() -> dict[str, str]:
    """That of a run: no hub is asked, and nothing is shown on the way."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def run(module: str, arguments: Sequence[str]) -> Cost:
    """Run `python -m MODULE ARGUMENTS` and read the cost it prints."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{finished.stderr[-2000:]}")
    return Cost(**json.loads(finished.stdout.strip().splitlines()[-1]))


def alternate(module: str, first: Sequence[str], second: Sequence[str], repeats: int) -> tuple[list[Cost], list[Cost]]:
    """Run two pieces of work in turn, so that a machine that slows down slows both down."""
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(repeats):
        costs[0].append(run(module, first))
        costs[1].append(run(module, second))
    return costs


def ratio(costs: tuple[list[Cost], list[Cost]], figure: str) -> float:
    """Median over the pairs of the second's figure over the first's."""
    return statistics.median(getattr(b, figure) / getattr(a, figure) for a, b in zip(*costs, strict=True))


def median(costs: list[Cost], figure: str) -> float:
    """Median of a figure."""
    return statistics.median(getattr(cost, figure) for cost in costs)
