"""GGUF files against their original: ggml's own rounding, calibrated rounding, and mixtures by budget, in one run.

    python -m benchmarks.gguf_quality [--model DIR] [--calibration FILE|self] [--text FILE] [--max-tokens N] [--ctx N]
                                      [--types TYPE ...] [--autoround ITERATIONS] [--json FILE]

By default tiny-llama, calibrated on ../shared/data/calib/wiki.txt and scored on ../shared/data/eval/wiki.test.raw where
these are at hand, else calibrated on text that the model writes itself and scored on the demo's text. Everything is
calibrated on the same 64 samples: ggml's importance is the mean square of the original model's inputs on them. Each
file is scored from its own bytes, in float32 against the bf16 original, windows of 512 tokens without overlap. Bytes
are whole files; bits per weight are those of the decoder's matrices.

With --autoround, AutoRound makes its `gguf:q4_k_m` of the same samples (0 iterations are its default for GGUF; 200 take
minutes). Its converter does not know this tokenizer, so its tensors are put into a file with ours.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import REPOSITORY, TINY_LLAMA
from benchmarks.scratch import scratch
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.gguf.calibration.text import SELF, Calibration, read_samples
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import ExportPlan, plan_export, write_plan
from srd_modifier.selection.budget import Budget

_DATA = REPOSITORY.parent / "shared" / "data"
_TYPES = (FileType.Q4_K_M, FileType.Q5_K_M, FileType.Q6_K, FileType.Q8_0)


@dataclass(frozen=True)
class Row:
    """One file."""

    name: str
    bytes_on_disk: int
    bits_per_weight: float
    ppl: float
    kld: float
    kld_stderr: float
    top1: float
    predicted: float | None
    seconds: float


def main() -> None:
    options = parse()
    calibration = Calibration(options.calibration, max_seq_length=options.ctx)
    print(f"{options.model}, calibrated on {options.calibration}, {options.max_tokens} tokens of {options.text}")
    print(f"{'':34} {'bytes':>11} {'bits/w':>7} {'ppl':>9} {'KLD mean':>18} {'top-1':>8} {'predicted':>10} {'time':>7}")
    rows: dict[str, Row] = {}
    with scratch() as folder:

        def add(name: str, file: Path, seconds: float, predicted: float | None = None) -> Row:
            rows[name] = score(options, name, file, seconds, predicted)
            print(line(rows[name]), flush=True)
            return rows[name]

        def export(name: str, **settings: Any) -> Row:
            file = folder / "model.gguf"
            started = time.perf_counter()
            summary = export_gguf(options.model, file, overwrite=True, **settings)
            return add(name, file, time.perf_counter() - started, summary.predicted_kld)

        imatrix = folder / "imatrix.gguf"
        for number, own in enumerate(options.types):
            calibrated = export(
                f"{own.value} calibrated",
                file_type=own,
                calibration=calibration,
                imatrix_output=None if number else imatrix,
            )
            export(f"{own.value} ggml", file_type=own)
            export(f"{own.value} ggml + importance", file_type=own, imatrix=imatrix)
            export(
                f"{own.value} bytes by budget", calibration=calibration, budget=Budget(bytes=calibrated.bytes_on_disk)
            )
        if options.autoround is not None:
            started = time.perf_counter()
            file = autoround(options.model, calibration, options.autoround, folder)
            add(f"Q4_K_M AutoRound, {options.autoround} iterations", file, time.perf_counter() - started)
    print_ratios(rows, options.types)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows.values()], indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line; also quietens the libraries."""
    from srd_modifier.cli._quiet import quiet_libraries

    calibration, text = _DATA / "calib" / "wiki.txt", _DATA / "eval" / "wiki.test.raw"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--calibration", default=str(calibration) if calibration.exists() else SELF)
    parser.add_argument(
        "--text", type=Path, default=text if text.exists() else REPOSITORY / "examples" / "text" / "demo.txt"
    )
    parser.add_argument("--max-tokens", type=int, default=20_480)
    parser.add_argument("--ctx", type=int, default=512, help="Tokens of a window, and of a calibration sample.")
    parser.add_argument("--types", type=FileType, nargs="+", default=_TYPES)
    parser.add_argument("--autoround", type=int, default=None, help="Compare with AutoRound of so many iterations.")
    parser.add_argument("--json", type=Path, default=None, help="Write every row.")
    quiet_libraries(bars=False)
    return parser.parse_args()


def score(options: argparse.Namespace, name: str, file: Path, seconds: float, predicted: float | None) -> Row:
    """A file's divergence from the original."""
    report = evaluate_text(
        str(file),
        options.text,
        reference=options.model,
        ctx=options.ctx,
        stride=options.ctx,
        max_tokens=options.max_tokens,
    )
    assert report.divergence is not None
    return Row(
        name,
        report.size.bytes_on_disk,
        report.size.bits_per_weight,
        report.perplexity.ppl,
        report.divergence.kld_mean,
        report.divergence.kld_stderr,
        report.divergence.top1_agreement,
        predicted,
        seconds,
    )


def line(row: Row) -> str:
    """One line of the table."""
    predicted = "" if row.predicted is None else f"{row.predicted:.2e}"
    return (
        f"{row.name:34} {row.bytes_on_disk:>11,} {row.bits_per_weight:>7.3f} {row.ppl:>9.3f} "
        f"{row.kld:>9.2e} ± {row.kld_stderr:.1e} {row.top1:>8.2%} {predicted:>10} {row.seconds:>6.1f}s"
    )


def print_ratios(rows: dict[str, Row], types: Sequence[FileType]) -> None:
    """What the project promises: divergences relative to ggml with importance at the same bytes."""
    print("\nmean KLD relative to ggml with importance, at no more bytes")
    for own in types:
        peer = rows[f"{own.value} ggml + importance"].kld
        calibrated, budget = (rows[f"{own.value} {what}"].kld / peer for what in ("calibrated", "bytes by budget"))
        print(f"{own.value:8} calibrated {calibrated:.3f}x, by budget {budget:.3f}x")
    for name, row in rows.items():
        if "AutoRound" in name:
            print(f"Q4_K_M calibrated {rows['Q4_K_M calibrated'].kld / row.kld:.3f}x of {name.removeprefix('Q4_K_M ')}")


def autoround(model_name: str, calibration: Calibration, iterations: int, folder: Path) -> Path:
    """AutoRound's Q4_K_M, with the tokenizer that its own converter cannot write."""
    import auto_round.export.export_to_gguf.export as exporting
    import gguf
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    samples, _ = read_samples(calibration, Path(model_name))
    original = exporting.get_conversion

    def without_vocabulary(*args: Any, **kwargs: Any) -> Any:
        conversion = original(*args, **kwargs)
        find = conversion.get_model_class

        def found(*args: Any, **kwargs: Any) -> Any:
            model_class = find(*args, **kwargs)
            model_class.set_vocab = lambda self: None
            return model_class

        conversion.get_model_class = found
        return conversion

    exporting.get_conversion = without_vocabulary
    try:
        AutoRound(
            AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32),
            AutoTokenizer.from_pretrained(model_name),
            scheme="GGUF:Q4_K_M",
            dataset=[torch.tensor([sample]) for sample in samples],
            nsamples=len(samples),
            seqlen=calibration.max_seq_length,
            iters=iterations,
            enable_torch_compile=False,
            device_map="cpu",
            batch_size=8,
        ).quantize_and_save(str(folder / "autoround"), format="gguf:q4_k_m")
    finally:
        exporting.get_conversion = original
    (source,) = (folder / "autoround").rglob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}

    def encode(plan: ExportPlan, tensor: GGUFTensor) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(tensors[tensor.name].data).view(np.uint8)

    plan = plan_export(model_name)
    types = {name: GGMLType(tensors[name].tensor_type.name) for name in plan.types}
    output = folder / "autoround.gguf"
    write_plan(replace(plan, types=types), output, encode=encode)
    shutil.rmtree(folder / "autoround")
    return output


if __name__ == "__main__":
    main()
