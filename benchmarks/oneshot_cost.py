"""Time and memory of `oneshot` with an SRDModifier against the same base modifier alone.

    python -m benchmarks.oneshot_cost [--repeats N] [--case NAME ...]

Every run is a process of its own, saving included; the two recipes run in turn and the ratios are medians over the
pairs. Models: tiny-llama, and random weights in the shapes of SmolLM2-135M and (round-to-nearest only) SmolLM2-1.7B.

    rtn        SRDModifier's int8 residual against round-to-nearest alone
    gptq       the same beside GPTQModifier
    feedback   a 4-bit residual with error feedback beside GPTQModifier, against GPTQModifier alone
    own        SRDModifier's own W4 with feedback and a 4-bit residual, against GPTQModifier alone
    budget     the same with 5.5 bits per weight spent by sensitivity, all candidates encoded
"""

import argparse
from pathlib import Path

from benchmarks.models import SCHEME, TINY_LLAMA, write_random
from benchmarks.process import alternate, measure, median, print_cost, ratio
from benchmarks.scratch import scratch

_CASES = (
    *(f"tiny-llama/{base}" for base in ("rtn", "gptq", "feedback", "own", "budget")),
    *(f"smollm2-135m/{base}" for base in ("rtn", "gptq", "feedback", "own", "budget")),
    "smollm2-1.7b/rtn",
)
_SAMPLES = 32
_LENGTH = 256


def worker(model: str, base: str, with_srd: bool, output: str) -> None:
    """One run of `oneshot`, measured from the model's load to the saved checkpoint."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.logger import LoggerConfig, configure_logger
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from srd_modifier import SRDModifier

    configure_logger(LoggerConfig(console_log_level="ERROR"))
    tokens = torch.randint(1, 4000, (_SAMPLES, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    data = {
        "dataset": Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * _LENGTH] * _SAMPLES}),
        "num_calibration_samples": _SAMPLES,
        "max_seq_length": _LENGTH,
    }
    if base == "rtn":
        data = {}
        recipe = [SRDModifier(**SCHEME) if with_srd else QuantizationModifier(**SCHEME)]
    else:
        srd = {
            "gptq": {},
            "feedback": {"residual_bits": 4, "rounding": "feedback"},
            "own": {**SCHEME, "base_rounding": "feedback", "residual_bits": 4, "rounding": "feedback"},
            "budget": {**SCHEME, "base_rounding": "feedback", "correct": {"budget": "5.5bpw"}},
        }[base]
        modifier = SRDModifier(ignore=["lm_head"], spool_dir=str(Path(output).parent), **_without_ignore(srd))
        recipe = [GPTQModifier(**SCHEME)] if not with_srd else [modifier]
        if with_srd and not modifier.quantizes_itself:
            recipe.append(GPTQModifier(**SCHEME))
    print_cost(measure(lambda: oneshot(model=model, recipe=recipe, output_dir=output, **data)))


def _without_ignore(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "ignore"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", action="append", choices=_CASES)
    parser.add_argument("--worker", nargs=4, metavar=("MODEL", "BASE", "SRD", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        model, base, with_srd, output = options.worker
        worker(model, base, with_srd == "srd", output)
        return
    print(
        f"{'case':20} {'alone':>9} {'with SRD':>9} {'time':>6} {'peak':>6} {'anonymous':>10}   ratios, medians of pairs"
    )
    with scratch() as folder:
        models = {"tiny-llama": TINY_LLAMA}
        for case in options.case or _CASES:
            name, base = case.split("/")
            if name not in models:
                models[name] = write_random(name, folder)
            arguments = [
                ["--worker", str(models[name]), base, kind, str(folder / "output" / kind)] for kind in ("plain", "srd")
            ]
            costs = alternate("benchmarks.oneshot_cost", *arguments, repeats=options.repeats)
            print(
                f"{case:20} {median(costs[0], 'seconds'):8.1f}s {median(costs[1], 'seconds'):8.1f}s "
                f"{ratio(costs, 'seconds'):5.2f}x {ratio(costs, 'peak_mb'):5.2f}x "
                f"{ratio(costs, 'peak_anonymous_mb'):9.2f}x   "
                f"peak {median(costs[0], 'peak_mb'):.0f} and {median(costs[1], 'peak_mb'):.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
