"""Load time of a corrected model against the plain W4 model in the same directory.

    python -m benchmarks.load_time [--repeats N] [--model NAME ...]

Both are measured from `from_pretrained` to the end of the first forward pass, because a plain W4 model is
decompressed only there. Every run is a process of its own; the two run in turn and the ratios are medians over the
pairs. The files are in the page cache: the ratio from a cold disk is that of the bytes.
"""

import argparse
from pathlib import Path

from benchmarks.models import SCHEME, SHAPES, TINY_LLAMA, write_random
from benchmarks.process import alternate, measure, median, print_cost, ratio
from benchmarks.scratch import scratch

_MODELS = ("tiny-llama", *SHAPES)


def worker(directory: str, kind: str) -> None:
    """Load a checkpoint and run one token through it, with or without the plugin."""
    import torch
    from transformers import AutoModelForCausalLM

    if kind == "corrected":
        import srd_modifier  # noqa: F401 - registers the hook

    def load() -> None:
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            model(torch.tensor([[1]]))

    print_cost(measure(load))


def quantize(model: Path, output: Path) -> None:
    """Round-to-nearest W4A16 with a full D8."""
    from llmcompressor import oneshot

    from srd_modifier import SRDModifier

    oneshot(model=str(model), recipe=SRDModifier(**SCHEME), output_dir=str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", action="append", choices=_MODELS)
    parser.add_argument("--worker", nargs=2, metavar=("DIRECTORY", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    print(f"{'model':14} {'plain W4':>9} {'corrected':>9} {'time':>6} {'peak':>6}   ratios, medians of pairs")
    with scratch() as folder:
        for name in options.model or _MODELS:
            model = TINY_LLAMA if name == "tiny-llama" else write_random(name, folder)
            output = folder / f"{name}-srd"
            quantize(model, output)
            costs = alternate(
                "benchmarks.load_time",
                ["--worker", str(output), "plain"],
                ["--worker", str(output), "corrected"],
                repeats=options.repeats,
            )
            print(
                f"{name:14} {median(costs[0], 'seconds'):8.2f}s {median(costs[1], 'seconds'):8.2f}s "
                f"{ratio(costs, 'seconds'):5.2f}x {ratio(costs, 'peak_mb'):5.2f}x   "
                f"peak {median(costs[0], 'peak_mb'):.0f} and {median(costs[1], 'peak_mb'):.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
