"""The main job on the embedded model: quantize, keep the residual, load both ways, measure all in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.report import Report
from srd_modifier.quantizing import SELF, quantize

_REPOSITORY = Path(__file__).parents[1]
MODEL = _REPOSITORY / "examples" / "tiny-llama"
TEXT = _REPOSITORY / "examples" / "text" / "demo.txt"

_SAMPLES = 64
_SAMPLE_LENGTH = 256  # what tiny-llama was trained on
_WINDOW = 512


@dataclass(frozen=True)
class DemoRow:
    """One model of the comparison."""

    name: str
    report: Report


def run_demo(model: Path, text: Path, output: Path, *, say: Callable[[str], None]) -> list[DemoRow]:
    """Quantize `model` with GPTQ twice, with a residual in the middle layers and in all, and score four models.

    Args:
        model: a small dense model.
        text: to measure on; calibration uses text that the model writes itself.
        output: directory for the two checkpoints.
        say: called with a line for every step.

    Returns:
        bf16, W4, W4 with the selective residual, W4 with the full residual.

    Raises:
        SRDError: the model or the text is not there; or whatever quantizing and scoring raise.
    """
    recipes = _REPOSITORY / "recipes"
    for path in (model, text, recipes):
        if not path.exists():
            raise SRDError(
                f"{path} is missing: the demo runs in a clone of the repository, where its model and text are"
            )
    selective, full = output / "selective", output / "full"
    for recipe, directory in ((recipes / "srd_selective.yaml", selective), (recipes / "srd_gptq.yaml", full)):
        say(f"quantizing with recipes/{recipe.name}, calibrated on {_SAMPLES} texts that the model writes itself")
        quantize(
            str(model),
            recipe,
            directory,
            dataset=SELF,
            num_samples=_SAMPLES,
            max_seq_length=_SAMPLE_LENGTH,
            overwrite=True,
        )
    if BaseCheckpoint(selective).digest() != BaseCheckpoint(full).digest():
        raise SRDError("the two recipes gave different W4 weights; the rows of the table would not be comparable")

    def score(name: str, candidate: Path, alpha: float | None = None) -> DemoRow:
        say(f"scoring {name}")
        report = evaluate_text(str(candidate), text, reference=str(model), ctx=_WINDOW, stride=_WINDOW, alpha=alpha)
        return DemoRow(name, report)

    return [
        score("bf16", model),
        score("W4", full, alpha=0.0),
        score("W4+D8, 40-77 %", selective),
        score("W4+D8, all", full),
    ]


def conclusion(rows: list[DemoRow]) -> str:
    """What the table means, in one sentence, from its own figures."""
    _, w4, selective, full = rows
    lost = _kld(w4)
    more_bytes = full.report.size.bytes_on_disk / w4.report.size.bytes_on_disk
    return (
        f"W4 moves the model {lost:.1e} nats per token away from bf16; the residual of the layers at 40-77 % "
        f"of the depth takes back {1 - _kld(selective) / lost:.0%} of that, the full one all but {_kld(full):.0e} nats "
        f"at {more_bytes:.1f} times the bytes of W4, and the same directory loads as plain W4 without the plugin."
    )


def _kld(row: DemoRow) -> float:
    assert row.report.divergence is not None
    return row.report.divergence.kld_mean
