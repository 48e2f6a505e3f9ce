"""What a comparison measured: `results.json`, whose schema is `results.schema.json` beside this module."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.checkpoint.atomic import write_json
from srd_modifier.errors import SRDError

SCHEMA_VERSION = 1

# metrics whose values are divergences from the reference, of which a share of the reference's own makes no sense
DIVERGENCE_METRICS = ("kld_mean", "kld_median", "kld_p99", "top1_agreement")


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task.

    Attributes:
        task: its name.
        metric: `ppl`, `kld_mean`, `kld_median`, `kld_p99`, `top1_agreement`, or a metric of the harness (`acc`,
            `acc_norm`, `exact_match`, ...).
        value: as the metric has it: accuracies are shares between 0 and 1, divergences are in nats per token.
        stderr: standard error of the value, `None` where the metric has none.
        count: tokens or questions it is made of.
        higher_is_better: which way the metric goes.
        recovery: percent of the reference's score (reference over model where lower is better), with a confidence
            interval from the differences on the same items; `None` for divergences and where the reference has 0.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    count: int
    higher_is_better: bool
    recovery: Interval | None = None


@dataclass(frozen=True)
class TaskInfo:
    """What was asked of every model.

    Attributes:
        name: as `--tasks` takes it.
        title: for the head of a table.
        description: one sentence: windows or prompt, BOS, examples shown, metric.
        source: the file or the hub data set.
        sha256: of the text or the questions that were scored, hexadecimal; `None` where it is not known.
        settings: sizes and options, such as ctx and stride.
    """

    name: str
    title: str
    description: str
    source: str
    sha256: str | None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelResult:
    """One row of the comparison.

    Attributes:
        label: what the row is called.
        family: rows of one family are drawn as one line.
        model: directory, file, hub id or address, as it was given.
        reference: whether the others are compared with it.
        format: such as `bfloat16`, `W4A16`, `W4A16 + D8`, `GGUF Q4_K_M`, `server`.
        digest: SHA-256 over the files that make the model; `None` for a server.
        alpha: share of the residual applied, `None` for a model without one.
        chunks: chunks of depth whose residual was applied, `None` for all or for a model without one.
        bytes_on_disk: of the files that hold weights, codes, scales, masks and headers counted; `None` for a server.
        bits_per_weight: of the decoder layers' matrices, scales and masks counted; `None` where it is not known.
        total_bits_per_weight: bits on disk over the number of the reference's weights.
        residual_bytes: codes, scales and masks of the residual that was applied, `None` for a model without one.
        seconds: spent scoring.
        notes: what a reader must know, for footnotes.
        scores: of every task.
        depth: KL divergence from the reference in nats per token when both models are read out after each decoder
            layer, first to last; `None` where it was not measured.
    """

    label: str
    family: str
    model: str
    reference: bool
    format: str
    digest: str | None
    alpha: float | None
    chunks: tuple[str, ...] | None
    bytes_on_disk: int | None
    bits_per_weight: float | None
    total_bits_per_weight: float | None
    residual_bytes: int | None
    seconds: float
    notes: tuple[str, ...]
    scores: tuple[Score, ...]
    depth: tuple[float, ...] | None = None

    def score(self, task: str, metric: str) -> Score | None:
        """The score of a metric, `None` where it was not measured."""
        return next((score for score in self.scores if (score.task, score.metric) == (task, metric)), None)


@dataclass(frozen=True)
class Results:
    """Models scored on the same tasks in one run, the reference first."""

    created: str
    command: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    tasks: tuple[TaskInfo, ...]
    models: tuple[ModelResult, ...]

    @property
    def reference(self) -> ModelResult:
        """The model that the others are compared with."""
        return next(model for model in self.models if model.reference)

    @property
    def candidates(self) -> tuple[ModelResult, ...]:
        """The others, in their order."""
        return tuple(model for model in self.models if not model.reference)

    def task(self, name: str) -> TaskInfo:
        """A task by its name."""
        return next(task for task in self.tasks if task.name == name)

    def as_json(self) -> dict[str, Any]:
        """What `results.json` holds."""
        # through JSON, so that tuples are the lists that a reader would get
        return {"schema": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self), allow_nan=False))}


def write_results(results: Results, path: Path) -> None:
    """Check against the schema and write, whole or not at all."""
    values = results.as_json()
    _check(values, path)
    write_json(path, values)


def read_results(path: Path) -> Results:
    """Read and check a `results.json`.

    Raises:
        SRDError: there is no such file, it is not JSON, or the schema refuses it; the message names the field.
        MissingExtraError: jsonschema is not installed.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SRDError(f"{path}: the results cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SRDError(f"{path} is not JSON: {error}") from error
    if isinstance(values, dict) and values.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise SRDError(
            f"{path}: schema is {values['schema']!r}, this version reads {SCHEMA_VERSION}; "
            "measure again with srd compare"
        )
    _check(values, path)
    return Results(
        created=values["created"],
        command=tuple(values["command"]),
        machine=values["machine"],
        versions=values["versions"],
        settings=values["settings"],
        tasks=tuple(TaskInfo(**task) for task in values["tasks"]),
        models=tuple(_model(model) for model in values["models"]),
    )


def _model(values: dict[str, Any]) -> ModelResult:
    return ModelResult(
        **{
            **values,
            "chunks": _tuple(values["chunks"]),
            "notes": tuple(values["notes"]),
            "scores": tuple(_score(score) for score in values["scores"]),
            "depth": _tuple(values["depth"]),
        }
    )


def _score(values: dict[str, Any]) -> Score:
    recovery = values["recovery"]
    return Score(**{**values, "recovery": None if recovery is None else Interval(**recovery)})


def _tuple(values: Iterable[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _check(values: Any, path: Path) -> None:
    require("jsonschema", extra="eval")
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(_schema()).iter_errors(values))
    if error is not None:
        raise SRDError(f"{path}: {error.json_path}: {error.message}")
    references = [model["label"] for model in values["models"] if model["reference"]]
    if len(references) != 1:
        raise SRDError(f"{path}: models: {len(references)} are marked as the reference, expected one")


@cache
def _schema() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "results.schema.json").read_text(encoding="utf-8"))
