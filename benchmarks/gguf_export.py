"""Throughput and memory of a plain GGUF export, with llama.cpp's own quantizer beside it if there is one.

    python -m benchmarks.gguf_export [--repeats N] [--threads N] [--reference-python PYTHON] [--large]

The model has random bf16 weights, 132 M in a Llama's shape; `--large` takes SmolLM2-1.7B's. Every run is a process of
its own that writes a Q4_K_M file; the two quantizers take turns and the ratios are medians over the pairs. Memory is
what a run takes above the interpreter with everything imported.

PYTHON is that of an environment with llama-cpp-python and gguf, neither of which this package needs. Its quantizer
reads the same weights from a BF16 GGUF file, and the tensors that it writes are compared with ours, byte by byte.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.models import REPOSITORY, write_random
from benchmarks.process import Cost, measure, median, print_cost, ratio, run
from benchmarks.scratch import scratch

_SMALL = "llama-132m"
_LARGE = "smollm2-1.7b"
_FILE_TYPE = "Q4_K_M"


def worker(model: str, output: str, file_type: str, threads: int, imatrix: str | None) -> None:
    """One export, measured."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType
    from srd_modifier.gguf.plan import plan_export

    settings = {"file_type": FileType(file_type), "imatrix": None if imatrix is None else Path(imatrix)}

    def work() -> None:
        export_gguf(model, Path(output), overwrite=True, **settings)

    plan_export(model, **settings)  # imports all that the export will
    before = measure(lambda: None)
    cost = measure(work)
    print_cost(_above(cost, before))


def _above(cost: Cost, before: Cost) -> Cost:
    return replace(
        cost,
        peak_mb=cost.peak_mb - before.peak_mb,
        peak_anonymous_mb=cost.peak_anonymous_mb - before.peak_anonymous_mb,
    )


def _run_reference(python: str, arguments: list[str]) -> Cost:
    """Run llama.cpp's quantizer in its own environment."""
    command = [python, "-m", "benchmarks.llama_quantize", *arguments]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    return Cost(**json.loads(finished.stdout.strip().splitlines()[-1]))


def write_importance(source: Path, path: Path) -> None:
    """Random importance for every matrix of the decoder layers of a GGUF file."""
    import gguf
    import torch

    from srd_modifier.gguf.importance import write_imatrix

    torch.manual_seed(0)
    tensors = gguf.GGUFReader(source).tensors
    columns = {tensor.name: int(tensor.shape[0]) for tensor in tensors if len(tensor.shape) > 1}
    importance = {name: torch.randn(size).exp() for name, size in columns.items() if name.startswith("blk.")}
    write_imatrix(path, importance, dataset="random", tokens=4096)


def count_weights(path: Path) -> int:
    """Weights of all tensors of a GGUF file."""
    import gguf

    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two GGUF files have the same tensors, byte by byte."""
    import gguf
    import numpy as np

    ours, theirs = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (first, second))
    return ours.keys() == theirs.keys() and all(
        ours[name].tensor_type == theirs[name].tensor_type and np.array_equal(ours[name].data, theirs[name].data)
        for name in ours
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference-python", metavar="PYTHON")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--worker", nargs="+", metavar="ARGUMENT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        model, output, file_type, threads, *imatrix = options.worker
        worker(model, output, file_type, int(threads), imatrix[0] if imatrix else None)
        return
    with scratch() as directory:
        model = write_random(_LARGE if options.large else _SMALL, directory)
        source, ours, theirs, imatrix = (
            directory / f"{name}.gguf" for name in ("source", "ours", "theirs", "importance")
        )
        threads = str(options.threads)
        run("benchmarks.gguf_export", ["--worker", str(model), str(source), "BF16", threads])
        write_importance(source, imatrix)
        weights = count_weights(source) / 1e6
        print(f"{weights:.0f} M weights to {_FILE_TYPE}, {threads} threads; Mw/s and MB, medians of {options.repeats}")
        print(f"{'importance':10} {'Mw/s':>6} {'peak':>6} {'anonymous':>10} | llama.cpp {'Mw/s':>6} {'ratio':>6} bytes")
        for label, extra in (("without", []), ("with", [str(imatrix)])):
            costs: tuple[list[Cost], list[Cost]] = ([], [])
            for _ in range(options.repeats):
                arguments = ["--worker", str(model), str(ours), _FILE_TYPE, threads, *extra]
                costs[0].append(run("benchmarks.gguf_export", arguments))
                if options.reference_python:
                    arguments = [str(source), str(theirs), _FILE_TYPE, threads, *extra]
                    costs[1].append(_run_reference(options.reference_python, arguments))
            line = (
                f"{label:10} {weights / median(costs[0], 'seconds'):6.1f} {median(costs[0], 'peak_mb'):6.0f} "
                f"{median(costs[0], 'peak_anonymous_mb'):10.0f} |"
            )
            if costs[1]:
                same = "equal" if same_tensors(ours, theirs) else "DIFFERENT"
                line += f" {weights / median(costs[1], 'seconds'):16.1f} {ratio(costs, 'seconds'):5.2f}x {same}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
