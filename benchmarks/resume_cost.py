"""What a calibrated `srd quantize` costs that is killed and resumed, against one that runs through.

    python -m benchmarks.resume_cost [--case MODEL/RECIPE ...] [--samples N]

Random weights in the shape of SmolLM2-135M, one thread, every run a process of its own. Three figures for each recipe:

    kept      running through, against the same without keeping what is finished on the disk
    half      killed when half of the layers are finished, and resumed: both together
    late      killed when all layers are finished, and resumed: only what comes after the kill

All as ratios to running through, with the bytes that wait on the disk at the last kill, as a ratio to the output's. The
outputs are compared byte for byte.

    gptq      GPTQModifier and an int8 residual
    feedback  SRDModifier's own W4 with feedback and a 4-bit residual
    budget    the same with 5.5 bits per weight spent by sensitivity, all candidates encoded
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.models import REPOSITORY, SCHEME, SHAPES, write_random
from benchmarks.process import environment, measure, print_cost, run
from benchmarks.scratch import contents, scratch

_MODULE = "benchmarks.resume_cost"
_LENGTH = 512
_FEEDBACK = {**SCHEME, "base_rounding": "feedback"}
_RECIPES = {
    "gptq": {"SRDModifier": {}, "GPTQModifier": SCHEME},
    "feedback": {"SRDModifier": {**_FEEDBACK, "residual_bits": 4, "rounding": "feedback"}},
    "budget": {"SRDModifier": {**_FEEDBACK, "correct": {"budget": "5.5bpw"}}},
}
_CASES = [f"smollm2-135m/{recipe}" for recipe in _RECIPES]


def worker(model: str, recipe: str, output: str, how: str, samples: int) -> None:
    """One run of `quantize`, measured from the model's load to the saved checkpoint."""
    import torch
    from llmcompressor.logger import LoggerConfig, configure_logger

    from srd_modifier import quantizing

    configure_logger(LoggerConfig(console_log_level="ERROR"))
    if how == "unkept":
        quantizing.why_not_resumable = lambda *_: "this run is the one to compare with"
    data = torch.randint(1, 4000, (samples, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    print_cost(
        measure(lambda: quantizing.quantize(model, Path(recipe), Path(output), dataset=data, resume=how == "resume"))
    )


def kill_when(finished: Callable[[], bool], arguments: list[str]) -> float:
    """Start a run and kill it when something is finished; seconds until then, its start included."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", _MODULE, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while not finished():
        if child.poll() is not None:
            sys.exit(f"{' '.join(arguments)} ended before it could be killed")
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    child.send_signal(signal.SIGKILL)
    child.wait()
    return seconds


def directory_bytes(directory: Path) -> int:
    """Bytes of the files in a directory as they are allocated: those reserved and not written count."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _case(model: Path, layers: int, recipe: Path, folder: Path, samples: int) -> str:
    def arguments(output: str, how: str) -> list[str]:
        return ["--worker", str(model), str(recipe), str(folder / output), how, str(samples)]

    def timed(output: str, how: str) -> float:
        started = time.perf_counter()
        run(_MODULE, arguments(output, how))
        return time.perf_counter() - started

    def layers_done(output: str) -> int:
        journal = folder / f".{output}.unfinished.partial" / "finished.jsonl"
        return journal.read_bytes().count(b'"step": "model.layers') if journal.exists() else 0

    unkept, whole = timed("unkept", "unkept"), timed("whole", "keep")
    half = kill_when(lambda: layers_done("half") >= layers // 2, arguments("half", "keep")) + timed("half", "resume")
    kill_when(lambda: layers_done("late") >= layers, arguments("late", "keep"))
    waiting = directory_bytes(folder / ".late.unfinished.partial")
    late = timed("late", "resume")
    outputs = [contents(folder / name) for name in ("unkept", "whole", "half", "late")]
    same = "identical" if all(output == outputs[0] for output in outputs) else "DIFFERENT"
    size = directory_bytes(folder / "whole")
    return (
        f"{whole:7.1f}s {whole / unkept:6.2f}x {half / whole:6.2f}x {late / whole:6.2f}x "
        f"{waiting / size:8.2f}x of {size / 1e6:.0f} MB  {same}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=_CASES)
    parser.add_argument("--samples", type=int, default=64, help=f"of {_LENGTH} tokens")
    parser.add_argument(
        "--worker", nargs=5, metavar=("MODEL", "RECIPE", "OUTPUT", "HOW", "SAMPLES"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.worker:
        *rest, samples = options.worker
        worker(*rest, int(samples))
        return
    print(f"{'case':24} {'through':>8} {'kept':>7} {'half':>7} {'late':>7} {'waiting on the disk':>20}")
    with scratch() as folder:
        models: dict[str, Path] = {}
        for case in options.case or _CASES:
            name, kind = case.split("/")
            if name not in models:
                models[name] = write_random(name, folder)
            recipe = folder / f"{kind}.yaml"
            recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": _RECIPES[kind]}}, sort_keys=False))
            place = folder / kind
            place.mkdir()
            print(f"{case:24} {_case(models[name], SHAPES[name].layers, recipe, place, options.samples)}", flush=True)


if __name__ == "__main__":
    main()
