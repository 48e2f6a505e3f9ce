"""Quality against bytes of one model: bf16, W4, and the residual in part and in full, all in one run.

    python -m benchmarks.quality [--model DIR] [--calibration FILE|self] [--text FILE] [--max-tokens N]

By default tiny-llama, calibrated on ../shared/data/calib/wiki.txt and scored on ../shared/data/eval/wiki.test.raw where
these are at hand, else calibrated on text that the model writes itself and scored on the demo's text. The windows are
512 tokens without overlap, everything in float32 against the bf16 original.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.models import REPOSITORY, TINY_LLAMA
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.quantizing import SELF, quantize

_DATA = REPOSITORY.parent / "shared" / "data"
_RECIPES = REPOSITORY / "recipes"
_BASES = {"RTN": "srd_full.yaml", "GPTQ": "srd_gptq.yaml"}
_DIALS: dict[str, dict] = {
    "W4": {"alpha": 0.0},
    "W4 + D8, alpha 0.5": {"alpha": 0.5},
    "W4 + D8, reasoning 40-77 %": {"chunks": ["reasoning"]},
    "W4 + D8": {},
}


def main() -> None:
    from srd_modifier.cli._quiet import quiet_libraries

    calibration, text = _DATA / "calib" / "wiki.txt", _DATA / "eval" / "wiki.test.raw"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--calibration", default=str(calibration) if calibration.exists() else SELF)
    parser.add_argument(
        "--text", type=Path, default=text if text.exists() else REPOSITORY / "examples" / "text" / "demo.txt"
    )
    parser.add_argument("--max-tokens", type=int, default=None)
    options = parser.parse_args()
    quiet_libraries(bars=False)
    print(f"{options.model}, calibrated on {options.calibration}, scored on {options.text}")
    print(f"{'':34} {'bytes':>11} {'bits/w':>7} {'ppl':>16} {'KLD mean':>18} {'p99':>9} {'top-1':>8}")

    def row(name: str, candidate: str, **dial: object) -> None:
        report = evaluate_text(
            candidate, options.text, reference=options.model, ctx=512, max_tokens=options.max_tokens, **dial
        )
        divergence, size = report.divergence, report.size
        assert divergence is not None
        print(
            f"{name:34} {size.bytes_on_disk:11,} {size.bits_per_weight:7.3f} "
            f"{report.perplexity.ppl:8.3f} ± {report.perplexity.ppl_stderr:5.3f} "
            f"{divergence.kld_mean:9.2e} ± {divergence.kld_stderr:.0e} {divergence.kld_p99:9.2e} "
            f"{divergence.top1_agreement:8.3%}",
            flush=True,
        )

    row("bf16", options.model)
    with tempfile.TemporaryDirectory(prefix="srd-bench-") as folder:
        for base, recipe in _BASES.items():
            output = Path(folder) / base
            quantize(
                options.model,
                _RECIPES / recipe,
                output,
                dataset=None if base == "RTN" else options.calibration,
                num_samples=64,
                max_seq_length=512,
            )
            for name, dial in _DIALS.items():
                row(f"{base} {name}", str(output), **dial)


if __name__ == "__main__":
    main()
