"""What `srd plan` says against what `srd quantize` then does: bytes, time and memory.

    python -m benchmarks.plan_accuracy [--case NAME ...] [--repeats N]

Plan and quantization are processes of their own, and a quantization is repeated; its figures are medians. Models have
random weights in real shapes.

    rtn        round-to-nearest W4 in groups of 64, and an int8 residual everywhere
    gptq       the same after GPTQ
    feedback   W4 and a 4-bit residual with error feedback
    budget     W4 with error feedback, and 5.5 bits per weight spent by sensitivity

All but the first calibrate, on 16 samples of 128 tokens unless --samples and --length say otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.models import REPOSITORY, SCHEME, write_random, write_sharded
from benchmarks.process import measure, median, print_cost, run
from benchmarks.scratch import scratch

_CASES = (
    "smollm2-135m/rtn",
    "llama-132m/rtn",
    "smollm2-1.7b/rtn",
    *(f"{name}/{base}" for name in ("smollm2-135m", "llama-132m") for base in ("gptq", "feedback", "budget")),
    "llama-7b/rtn",
)
_MODIFIERS = {
    "rtn": {"SRDModifier": SCHEME},
    "gptq": {"SRDModifier": {"ignore": ["lm_head"]}, "GPTQModifier": SCHEME},
    "feedback": {"SRDModifier": SCHEME | {"base_rounding": "feedback", "residual_bits": 4, "rounding": "feedback"}},
    "budget": {"SRDModifier": SCHEME | {"base_rounding": "feedback", "correct": {"budget": "5.5bpw"}}},
}


def worker(model: str, recipe: str, output: str, samples: int, length: int) -> None:
    """One quantization, measured as the command runs it: imports are done, the model is not loaded.

    Without samples the recipe gets no data.
    """
    import llmcompressor  # noqa: F401
    import torch

    import srd_modifier.modifier  # noqa: F401
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.quantizing import quantize

    quiet_libraries(bars=False)
    # from all of the embedding, of which a long text reads nearly every page
    words = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    data = torch.randint(words, (samples, length), generator=torch.Generator().manual_seed(0)).tolist() or None
    print_cost(measure(lambda: quantize(model, Path(recipe), Path(output), dataset=data, overwrite=True)))


def planned(model: Path, recipe: Path, samples: int, length: int) -> dict:
    """The plan as the command prints it."""
    command = [str(Path(sys.executable).with_name("srd")), "plan", str(model), "--recipe", str(recipe), "--json"]
    command += ["--num-samples", str(samples), "--max-seq-length", str(length)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def written(directory: Path) -> int:
    """Bytes of every file."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=_CASES, help="all but llama-7b, which takes 24 GB of disk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16, help="of calibration")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    worker_arguments = ("MODEL", "RECIPE", "OUTPUT", "SAMPLES", "LENGTH")
    parser.add_argument("--worker", nargs=5, metavar=worker_arguments, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        model, recipe, output, samples, length = options.worker
        worker(model, recipe, output, int(samples), int(length))
        return
    with scratch() as folder:
        for case in options.case or _CASES[:-1]:
            name, base = case.split("/")
            model = folder / name
            if not model.is_dir():
                (write_sharded if name == "llama-7b" else write_random)(name, folder)
            recipe = folder / f"{base}.yaml"
            recipe.write_text(
                yaml.safe_dump({"quant_stage": {"quant_modifiers": _MODIFIERS[base]}}, sort_keys=False),
                encoding="utf-8",
            )
            plan = planned(model, recipe, options.samples, options.length)
            samples = 0 if base == "rtn" else options.samples
            arguments = ["--worker", str(model), str(recipe), str(folder / "output"), str(samples), str(options.length)]
            costs = [run("benchmarks.plan_accuracy", arguments) for _ in range(options.repeats)]
            _report(f"{case} bytes", plan["total_bytes"], written(folder / "output"))
            if plan["estimate"] is not None:
                _report(f"{case} seconds", plan["estimate"]["seconds"], median(costs, "seconds"))
                if plan["estimate"]["peak_bytes"] is not None:
                    _report(f"{case} MiB", plan["estimate"]["peak_bytes"] / 2**20, median(costs, "peak_mb"))
            peaks = [cost.peak_mb for cost in costs]
            print(f"{case} peaks of memory: {min(peaks):,.0f} to {max(peaks):,.0f} MiB", flush=True)


def _report(label: str, expected: float, found: float) -> None:
    print(f"{label:32} planned {expected:15,.1f}   found {found:15,.1f}   {expected / found - 1:+8.3%}", flush=True)


if __name__ == "__main__":
    main()
