"""Comparisons made of a few numbers, as `srd compare` would have measured them."""

from collections.abc import Sequence
from typing import Any

from srd_modifier.evaluation.results import Interval, ModelResult, Results, Score, TaskInfo

WIKITEXT = TaskInfo(
    name="wikitext2",
    title="WikiText-2",
    description="windows of 512 tokens that do not overlap, BOS in front of each, perplexity of every token",
    source="texts/wiki.test.raw",
    sha256="5" * 64,
    settings={"ctx": 512, "stride": 512},
)
ARC = TaskInfo(
    name="arc_easy",
    title="ARC easy",
    description="multiple choice, no examples shown, the most likely answer counts",
    source="allenai/ai2_arc",
    sha256=None,
    settings={"limit": 500},
)


def make_model(label: str, size: int | None, *scores: Score, **fields: Any) -> ModelResult:
    """A row; `fields` are its other fields."""
    values: dict[str, Any] = {
        "family": label,
        "model": f"out/{label}",
        "reference": False,
        "format": "W4A16",
        "digest": None,
        "alpha": None,
        "chunks": None,
        "bytes_on_disk": size,
        "bits_per_weight": None,
        "total_bits_per_weight": None,
        "residual_bytes": None,
        "seconds": 1.0,
        "notes": (),
        "depth": None,
    }
    return ModelResult(label=label, scores=scores, **values | fields)


def ppl(value: float, *recovery: float, stderr: float | None = 0.5) -> Score:
    """A perplexity; what it recovers is given as value, low and high."""
    return Score("wikitext2", "ppl", value, stderr, 20480, False, Interval(*recovery) if recovery else None)


def kld(value: float, *, stderr: float | None = None) -> Score:
    """A mean divergence."""
    return Score("wikitext2", "kld_mean", value, stderr, 20480, False)


def accuracy(value: float, *recovery: float, metric: str = "acc", stderr: float | None = 0.01) -> Score:
    """An accuracy; what it recovers is given as value, low and high."""
    return Score("arc_easy", metric, value, stderr, 500, True, Interval(*recovery) if recovery else None)


REFERENCE = make_model(
    "bf16", 20_000_000, ppl(10.0), accuracy(0.8), reference=True, format="bfloat16", bits_per_weight=16.0
)


def make_results(
    *candidates: ModelResult,
    reference: ModelResult = REFERENCE,
    tasks: Sequence[TaskInfo] = (WIKITEXT, ARC),
    **fields: Any,
) -> Results:
    """A comparison; `fields` are its other fields."""
    values: dict[str, Any] = {
        "created": "2026-11-25T12:00:00+00:00",
        "command": ("srd", "compare", "out/bf16", "out/w4", "--tasks", "wikitext2,arc_easy"),
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2},
        "versions": {"srd-modifier": "0.3.0", "python": "3.11.7", "torch": "2.13.0"},
        "settings": {"dtype": "float32", "device": "cpu", "limit": None},
    }
    return Results(tasks=tuple(tasks), models=(reference, *candidates), **values | fields)
