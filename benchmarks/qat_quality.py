"""What training buys at 4 bits: scheduled, constant and post-training quantization at the same bytes, all in one run.

    python -m benchmarks.qat_quality [--model DIR] [--training FOLDER] [--calibration FILE|self] [--text FILE]
                                     [--samples N] [--seeds N ...] [--learning-rate RATE] [--jobs N] [--json FILE]

By default tiny-llama, trained on excerpts of all texts below ../shared/data/text, post-training quantizers calibrated
on ../shared/data/calib/wiki.txt and scored on ../shared/data/eval/wiki.test.raw where these are at hand, else all on
the demo's text and text that the model writes. Every row is scored from the files that `srd qat` and `srd quantize`
write, windows of 512 tokens without overlap, float32 against the bf16 original. Bytes are those of the weights' file.
"Recovered" is the share of the divergence of the best post-training row that is gone. What follows a trained row's
divergence is the standard deviation over seeds, which choose and order the training samples.

All trainings of a table see as many samples, each once, and differ in nothing but what their name says. `--jobs` of
them run at once, each in a process and on one thread.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import REPOSITORY, TINY_LLAMA
from benchmarks.scratch import scratch

_DATA = REPOSITORY.parent / "shared" / "data"
_DEMO = REPOSITORY / "examples" / "text" / "demo.txt"
_GROUP_SIZE = 64
_LENGTH = 512
_BATCH = 8
_EXCERPT = 200_000  # characters of each training text

# A fall that spends its steps where rounding is felt: the last bit, in a quarter of the training.
_EARLY_FALL = "0:5,0.25:4"


@dataclass(frozen=True)
class Training:
    """A kind of training.

    Attributes:
        name: in the table.
        schedule: of the width.
        grid: the format.
        repeated: whether it is done with every seed, or with the first only.
    """

    name: str
    schedule: str
    grid: str = "w4a16"
    repeated: bool = False


@dataclass(frozen=True)
class Score:
    """One file against the original."""

    bytes_on_disk: int
    ppl: float
    kld: float
    kld_stderr: float
    top1: float


@dataclass(frozen=True)
class Row:
    """One line of the table, with a score for each seed."""

    name: str
    form: str
    scores: tuple[Score, ...]

    @property
    def kld(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(score.kld for score in self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(score.kld for score in self.scores) if len(self.scores) > 1 else None


FORMS = ("w4a16", "gguf:Q4_K_M")

TRAININGS = (
    Training("QAT, constant 4 bits, distilled", "constant", repeated=True),
    Training("QAT, 5 to 4 bits in its first quarter, distilled", _EARLY_FALL, repeated=True),
    Training("Q4_K_M QAT, constant 4 bits, distilled", "constant", grid="gguf:Q4_K_M"),
    Training("QAT, linear 16 to 4 bits, distilled", "linear"),
)


def main() -> None:
    options = parse()
    size = f"{options.samples} x {_LENGTH} tokens of {options.training}"
    print(f"{options.model}, trained on {size} in batches of {_BATCH}, learning rate {options.learning_rate:g}")
    print(
        f"post-training calibrated on {options.calibration}; {options.max_tokens} tokens of {options.text}", flush=True
    )
    chosen = [training for training in TRAININGS if not options.only or options.only in training.name]
    with scratch() as folder:
        training_text = write_excerpts(options.training, folder / "training")
        rows = [*post_training(options, folder), *trained(options, chosen, training_text, folder)]
    best = {form: min(row.kld for row in rows if row.form == form and is_post_training(row)) for form in FORMS}
    print_table(rows, best)
    if options.json:
        values = {**{key: str(value) for key, value in vars(options).items()}, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(values, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    calibration, text, training = _DATA / "calib" / "wiki.txt", _DATA / "eval" / "wiki.test.raw", _DATA / "text"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--training", type=Path, default=training if training.exists() else _DEMO)
    parser.add_argument("--calibration", default=str(calibration) if calibration.exists() else "self")
    parser.add_argument("--text", type=Path, default=text if text.exists() else _DEMO)
    parser.add_argument("--max-tokens", type=int, default=20_480)
    parser.add_argument("--samples", type=int, default=2000, help="For each training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--products", default="bfloat16", help="What matrices are multiplied in while training.")
    parser.add_argument("--only", help="Only the trainings whose name has this.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=None, help="Write every score.")
    return parser.parse_args()


def write_excerpts(source: Path, target: Path) -> Path:
    """The first characters of every text below a folder, so that each training need not read all of them."""
    if source.is_file():
        return source
    for number, path in enumerate(sorted(source.rglob("*.txt"))):
        target.mkdir(parents=True, exist_ok=True)
        with path.open(encoding="utf-8") as file:
            (target / f"{number:03}.txt").write_text(file.read(_EXCERPT), encoding="utf-8")
    return target


def post_training(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The same formats without training."""
    import yaml

    from srd_modifier.gguf.calibration.text import Calibration
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.quantizing import quantize

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP_SIZE}
    scheme: dict[str, Any] = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    modifiers = {
        "RTN": {"QuantizationModifier": scheme},
        "GPTQ": {"GPTQModifier": scheme},
        "SRDModifier's W4, base_rounding feedback": {
            "SRDModifier": {**scheme, "base_rounding": "feedback", "balance": 0.25}
        },
    }
    for name, stage in modifiers.items():
        recipe, directory = folder / "recipe.yaml", folder / "w4"
        recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": stage}}), encoding="utf-8")
        sizes = {"num_samples": 64, "max_seq_length": _LENGTH}
        quantize(options.model, recipe, directory, dataset=options.calibration, overwrite=True, **sizes)
        yield _shown(Row(f"{name} W4A16 g{_GROUP_SIZE}", "w4a16", (score(options, directory),)))
    calibration = Calibration(options.calibration, max_seq_length=_LENGTH)
    file, imatrix = folder / "ptq.gguf", folder / "imatrix.gguf"
    export_gguf(options.model, file, calibration=calibration, imatrix_output=imatrix, overwrite=True)
    calibrated = Row("Q4_K_M calibrated", "gguf:Q4_K_M", (score(options, file),))
    export_gguf(options.model, file, imatrix=imatrix, overwrite=True)
    yield _shown(Row("Q4_K_M ggml + importance", "gguf:Q4_K_M", (score(options, file),)))
    yield _shown(calibrated)


def trained(options: argparse.Namespace, trainings: Sequence[Training], text: Path, folder: Path) -> Iterator[Row]:
    """Train every kind with every seed, several at a time."""
    seeds = {training: options.seeds if training.repeated else options.seeds[:1] for training in trainings}
    jobs = [
        (training, seed, text, folder / f"{number}-{seed}", options)
        for number, training in enumerate(trainings)
        for seed in seeds[training]
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_use_one_thread) as pool:
        scores = list(pool.map(train_and_score, jobs))
    for training in trainings:
        own = tuple(found for job, found in zip(jobs, scores, strict=True) if job[0] is training)
        yield Row(training.name, training.grid, own)


def train_and_score(job: tuple[Training, int, Path, Path, argparse.Namespace]) -> Score:
    """One training, scored from its export."""
    from srd_modifier.cli._quiet import quiet_libraries
    from srd_modifier.qat.exports.destination import Destination
    from srd_modifier.qat.settings import TrainingSettings
    from srd_modifier.qat.train import Data, train

    training, seed, text, output, options = job
    quiet_libraries(bars=False)
    settings = TrainingSettings(
        grid=training.grid,
        schedule=training.schedule,
        group_size=_GROUP_SIZE,
        learning_rate=options.learning_rate,
        batch_size=_BATCH,
        micro_batch_size=_BATCH,
        num_samples=options.samples,
        max_seq_length=_LENGTH,
        products=options.products,
        seed=seed,
    )
    result = train(options.model, Data(text=text), settings, output, exports=[Destination.parse(training.grid)])
    found = score(options, result.exports[0])
    shutil.rmtree(output)
    print(f"  {training.name}, seed {seed}: KLD {found.kld:.3e}, last training loss {result.loss:.3e}", flush=True)
    return found


def score(options: argparse.Namespace, path: Path) -> Score:
    """A file's divergence from the original."""
    from srd_modifier.evaluation.evaluate import evaluate_text
    from srd_modifier.evaluation.windows import Convention

    is_srd = path.is_dir() and (path / "srd").is_dir()
    report = evaluate_text(
        str(path),
        options.text,
        reference=options.model,
        convention=Convention.SLIDING,
        ctx=_LENGTH,
        stride=_LENGTH,
        max_tokens=options.max_tokens,
        alpha=0.0 if is_srd else None,
    )
    assert report.divergence is not None
    weights = path / "model.safetensors" if path.is_dir() else path
    return Score(
        weights.stat().st_size,
        report.perplexity.ppl,
        report.divergence.kld_mean,
        report.divergence.kld_stderr,
        report.divergence.top1_agreement,
    )


def print_table(rows: Sequence[Row], best: dict[str, float]) -> None:
    """All rows as Markdown."""
    print("\n| | bytes | perplexity | KLD | equal top-1 | recovered |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        first = row.scores[0]
        ppl, top1 = (statistics.mean(getattr(score, name) for score in row.scores) for name in ("ppl", "top1"))
        spread = "" if row.spread is None else f" ± {row.spread:.1e}"
        recovered = "" if is_post_training(row) else f"{1 - row.kld / best[row.form]:.0%}"
        print(
            f"| {row.name} | {first.bytes_on_disk:,} | {ppl:.2f} | {row.kld:.2e}{spread} | {top1:.2%} | {recovered} |"
        )


def is_post_training(row: Row) -> bool:
    """Whether nothing was trained."""
    return "QAT" not in row.name


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _shown(row: Row) -> Row:
    print(f"  {row.name}: KLD {row.kld:.3e}", flush=True)
    return row


if __name__ == "__main__":
    main()
