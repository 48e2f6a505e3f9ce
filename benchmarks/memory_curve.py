"""Time and memory of `srd quantize` without data against the number of decoder layers: W4 and an int8 residual.

    python -m benchmarks.memory_curve [--shape NAME] [--layers N ...] [--whole]

The model has random weights in the shape of a real one, a file per layer, and as many of its layers as the case says.
Every quantization is a process of its own. Memory is the peak of its resident pages, imports and mapped files counted.
`--whole` measures the same with the model held whole, as llm-compressor's `oneshot` does it.

llama-7b takes 24 GB of disk with all its layers.
"""

import argparse
from pathlib import Path

import yaml

from benchmarks.models import SCHEME, SHAPES, write_sharded
from benchmarks.process import measure, print_cost, run
from benchmarks.scratch import scratch


def worker(model: str, recipe: str, output: str, *, whole: bool) -> None:
    """One quantization, measured as the command runs it: imports are done, the model is not loaded."""
    import llmcompressor  # noqa: F401

    import srd_modifier.modifier  # noqa: F401
    from srd_modifier import quantizing
    from srd_modifier.cli._quiet import quiet_libraries

    quiet_libraries(bars=False)
    if whole:
        quantizing._STREAMED_PIPELINES = ()
    print_cost(measure(lambda: quantizing.quantize(model, Path(recipe), Path(output))))


def write_recipe(path: Path) -> Path:
    """Round-to-nearest W4 in groups of 64, and an int8 residual everywhere."""
    recipe = {"quant_stage": {"quant_modifiers": {"SRDModifier": SCHEME}}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-1.7b")
    parser.add_argument("--layers", type=int, nargs="+", help="by default a sixth, a third, two thirds and all of them")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "RECIPE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, whole=options.whole)
        return
    every = SHAPES[options.shape].layers
    print(
        f"{'shape':14}{'layers':>7}{'seconds':>9}{'CPU':>8}{'CPU per layer':>14}{'peak MiB':>10}{'anonymous MiB':>14}",
        flush=True,
    )
    for layers in options.layers or [every // 6, every // 3, 2 * every // 3, every]:
        with scratch() as folder:
            model = write_sharded(options.shape, folder, layers=layers)
            arguments = ["--worker", str(model), str(write_recipe(folder / "recipe.yaml")), str(folder / "output")]
            cost = run("benchmarks.memory_curve", [*arguments, *(["--whole"] if options.whole else [])])
        cells = (cost.seconds, cost.cpu_seconds, cost.cpu_seconds / layers, cost.peak_mb, cost.peak_anonymous_mb)
        print("{:14}{:7}{:9.1f}{:8.1f}{:14.2f}{:10,.0f}{:14,.0f}".format(options.shape, layers, *cells), flush=True)


if __name__ == "__main__":
    main()
