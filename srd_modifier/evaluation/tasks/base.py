"""What every task has: a description that a table can print, and a way to score one model."""

from dataclasses import dataclass, field
from typing import Protocol

from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.results import Score, TaskInfo
from srd_modifier.evaluation.scorer import Progress, Scorer
from srd_modifier.evaluation.scores import Reference


@dataclass(frozen=True)
class Items:
    """What a metric is the mean of, kept so that two models can be compared item by item.

    Attributes:
        values: of each window (mean negative log-likelihood of its tokens, in nats) or of each question.
        weights: scored tokens of each window; 1 for a question.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One model on one task.

    Attributes:
        scores: the metrics.
        items: what `ppl` and the metrics of questions are means of, by metric.
        seconds: spent scoring.
    """

    scores: tuple[Score, ...]
    items: dict[str, Items] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Subject:
    """The model that is scored.

    Attributes:
        scorer: answers for given tokens.
        loaded: the model itself where it runs in this process; a divergence needs it.
    """

    scorer: Scorer
    loaded: LoadedModel | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.scorer.name

    def close(self) -> None:
        """End what runs beside the model: the llama.cpp that a GGUF file's tokenizer asks."""
        close = getattr(getattr(self.loaded, "tokenizer", None), "close", None)
        if close is not None:
            close()


class Task(Protocol):
    """Something to score models by."""

    @property
    def info(self) -> TaskInfo:
        """What is asked, in words and digests."""
        ...

    def run(
        self,
        subject: Subject,
        *,
        reference: Reference | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Outcome:
        """Score a model; with a reference, measure the divergence from it where the task has one."""
        ...
