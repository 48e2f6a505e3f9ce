"""The comparison itself: a reference and its candidates on the same tasks, but for what is known already."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.cache import StoredReference, TooLargeError
from srd_modifier.evaluation.comparison.candidate import Candidate, Described, describe
from srd_modifier.evaluation.comparison.environment import library_versions, machine
from srd_modifier.evaluation.comparison.store import OutcomeStore, key_of
from srd_modifier.evaluation.depth import Depths, depth_divergence, record_depths
from srd_modifier.evaluation.load import load_tokenizer, resolve_device
from srd_modifier.evaluation.recovery import mean_recovery, perplexity_recovery
from srd_modifier.evaluation.results import DIVERGENCE_METRICS, Interval, ModelResult, Results, Score
from srd_modifier.evaluation.scorer import Progress
from srd_modifier.evaluation.scores import LiveReference, Reference, TokenScores
from srd_modifier.evaluation.tasks.base import Outcome, Subject, Task
from srd_modifier.evaluation.tasks.text import METRIC, TextTask, tokenizer_of

T = TypeVar("T")

# whose versions decide what a model computes; those of others may change without a new measurement
_DECISIVE = ("torch", "transformers", "compressed-tensors", "tokenizers", "lm_eval", "xllamacpp")
_DEPTH_WINDOW = 512


@dataclass(frozen=True)
class Setting:
    """How everything is scored.

    Attributes:
        dtype: what models compute in.
        device: `cpu`, `cuda` or `auto`.
        batch_size: sequences at once, `None` for what suits.
        cache: where log-probabilities of the reference are kept, `None` to ask the reference again for each candidate.
        cache_limit: bytes that they may take for one text; what is larger is not kept. `None` for half of what is free,
            and an error beyond.
        depth_tokens: tokens on which models are read out after every layer, 0 for none.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int | None = None
    cache: Path | None = None
    cache_limit: int | None = None
    depth_tokens: int = 1024


def default_cache() -> Path:
    """Where log-probabilities are kept if nothing else is said: `$XDG_CACHE_HOME/srd-modifier/reference`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srd-modifier" / "reference"


def compare(
    reference: Candidate,
    candidates: Sequence[Candidate],
    tasks: Sequence[Task],
    output: Path,
    *,
    setting: Setting | None = None,
    command: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    progress: Callable[[str], Progress] | None = None,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Score all models on all tasks.

    Finished scores are kept in `output/scores`, so the same call after an interruption, or with more candidates, goes
    on where it stopped.

    Args:
        reference: what the others are compared with, usually the original model; it must run in this process.
        candidates: the others.
        tasks: what to score by.
        output: an existing directory.
        setting: how to score.
        command: how this can be run again, for `Results.command`.
        settings: what else decides the figures, for `Results.settings`.
        progress: gives the progress callback of a piece of work by its title.
        say: called with what a user should know on the way.

    Raises:
        SRDError: a model, the data or a size is at fault. Everything that can be found out without scoring is.
    """
    return _Comparison(reference, candidates, tasks, output, setting or Setting(), progress, say).run(
        tuple(command), settings or {}
    )


class _Comparison:
    def __init__(
        self,
        reference: Candidate,
        candidates: Sequence[Candidate],
        tasks: Sequence[Task],
        output: Path,
        setting: Setting,
        progress: Callable[[str], Progress] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        if reference.is_server and candidates:
            raise ConfigError(
                f"{reference.model}: the reference must be a model on this machine, a server gives no logits"
            )
        labels = [reference.label, *(each.label for each in candidates)]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ConfigError(f"two models are called {repeated[0]!r}; name one with LABEL=MODEL")
        resolve_device(setting.device)
        self._setting, self._progress, self._say = setting, progress, say or _say_nothing
        self._tasks = list(tasks)
        for task in self._tasks:
            _ = task.info  # reads its data: what is wrong with it is said before any model is loaded
        self._reference = describe(reference)
        self._candidates = [describe(each) for each in candidates]
        self._store = OutcomeStore(output / "scores")
        self._versions = library_versions()
        self._original: Subject | None = None
        self._streams: dict[str, Tensor] = {}
        self._stored: dict[str, StoredReference] = {}
        self._kept: dict[str, bool] = {}

    def run(self, command: tuple[str, ...], settings: dict[str, Any]) -> Results:
        own = {task.info.name: self._reference_outcome(task) for task in self._tasks}
        if all(self._keeps(task) for task in self._tasks):
            _ = self._depths
            self._original = None  # all that is asked of it from here on is on disk
        size = self._reference.size
        total_weights = 0 if size is None else size.total_weights
        models = [self._result(self._reference, own, own, None, total_weights)]
        models += [self._score(described, own, total_weights) for described in self._candidates]
        return Results(
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=command,
            machine=machine(),
            versions=self._versions,
            settings={
                "dtype": str(self._setting.dtype).removeprefix("torch."),
                "device": str(resolve_device(self._setting.device)),
                **settings,
            },
            tasks=tuple(task.info for task in self._tasks),
            models=tuple(models),
        )

    # the reference

    def _reference_outcome(self, task: Task) -> Outcome:
        return self._known(self._reference, task, partial(self._measure_reference, task))

    def _measure_reference(self, task: Task) -> Outcome:
        if isinstance(task, TextTask) and self._keeps(task):
            started = time.perf_counter()
            nll = self._stored_reference(task).nll()
            windows = task.rule.windows(len(self._stream(task)))
            return task.outcome(TokenScores(nll=nll), windows, time.perf_counter() - started)
        return task.run(
            self._load_original(), batch_size=self._setting.batch_size, progress=self._bar(self._reference, task)
        )

    def _reference_of(self, task: TextTask) -> Reference:
        """What the divergence on a text is measured from: what is on disk, or the model."""
        if self._keeps(task):
            return self._stored_reference(task)
        loaded = self._load_original().loaded
        assert loaded is not None
        return LiveReference(loaded)

    def _keeps(self, task: Task) -> bool:
        """Whether what the reference says of a task is read from disk when candidates are scored."""
        if not isinstance(task, TextTask):
            return True  # nothing is asked of it
        if self._setting.cache is None:
            return False
        if task.info.name not in self._kept:
            try:
                self._stored_reference(task).prepare()
            except TooLargeError as error:
                if self._setting.cache_limit is None:
                    raise
                self._say(f"{error}: not kept, --cache-dir DIR would keep it")
                self._kept[task.info.name] = False
            else:
                self._kept[task.info.name] = True
        return self._kept[task.info.name]

    def _stored_reference(self, task: TextTask) -> StoredReference:
        name, cache = task.info.name, self._setting.cache
        assert cache is not None
        if name not in self._stored:
            stream, tokenizer = self._stream(task), self._tokenizer
            first_token = task.first_token(tokenizer)

            def load_original() -> Any:
                original = self._load_original()
                task.windows(original, stream)  # what does not fit is said before it is read
                return original.loaded

            self._stored[name] = StoredReference(
                self._reference.candidate.label,
                cache,
                {**self._circumstances(self._reference), "rule": asdict(task.rule), "first_token": first_token},
                stream,
                task.rule.windows(len(stream)),
                load_original,
                first_token=first_token,
                limit=self._setting.cache_limit,
                batch_size=self._setting.batch_size,
                progress=self._bar(self._reference, task),
            )
        return self._stored[name]

    def _stream(self, task: TextTask) -> Tensor:
        """The text's tokens as the reference reads them."""
        name = task.info.name
        if name not in self._streams:
            self._streams[name] = task.stream(self._tokenizer)
        return self._streams[name]

    @cached_property
    def _tokenizer(self) -> Any:
        """The reference's; its weights are not loaded for it."""
        return load_tokenizer(self._reference.candidate.model)

    def _load_original(self) -> Subject:
        if self._original is None:
            self._original = self._open(self._reference)
        return self._original

    # the candidates

    def _score(self, described: Described, own: dict[str, Outcome], total_weights: int) -> ModelResult:
        """One candidate: what is not known yet is measured, and the model loaded only for that."""
        opened = _Once(lambda: self._open(described))
        found = {}
        for task in self._tasks:
            found[task.info.name] = self._known(described, task, partial(self._measure, opened, task, described))
        curve = self._curve(described, opened)
        for subject in opened.made:
            subject.close()
        return self._result(described, found, own, curve, total_weights)

    def _measure(self, opened: "_Once[Subject]", task: Task, described: Described) -> Outcome:
        reference, subject, same_tokens = None, opened.get(), True
        if isinstance(task, TextTask):
            same_tokens = torch.equal(task.stream(tokenizer_of(subject)), self._stream(task))
            if subject.loaded is not None:
                if not same_tokens:
                    raise SRDError(
                        f"{subject.name} and the reference {self._reference.candidate.label} tokenize {task.text.path} "
                        "differently: their divergence is not defined"
                    )
                reference = self._reference_of(task)
        outcome = task.run(
            subject,
            reference=reference,
            batch_size=self._setting.batch_size,
            progress=self._bar(described, task),
        )
        # a server that cuts the text otherwise has windows that are not those of the reference
        return outcome if same_tokens else replace(outcome, items={})

    def _open(self, described: Described) -> Subject:
        return described.open(
            dtype=self._setting.dtype, device=self._setting.device, batch_size=self._setting.batch_size
        )

    # divergence by depth

    @property
    def _depth_text(self) -> TextTask | None:
        """The text whose first tokens it is measured on."""
        return next((task for task in self._tasks if isinstance(task, TextTask)), None)

    def _curve_key(self, described: Described) -> str | None:
        """Under which a curve is kept; `None` where there is nothing to measure it on."""
        text = self._depth_text
        if described.path is None or text is None or not self._setting.depth_tokens:
            return None
        return self._key(described, text, depth=self._setting.depth_tokens)

    def _curve(self, described: Described, opened: "_Once[Subject]") -> tuple[float, ...] | None:
        """Divergence after each layer; `None` for servers and unlike architectures."""
        key = self._curve_key(described)
        if key is None:
            return None
        curve = self._store.read_curve(key)
        if curve is None:
            loaded, theirs = opened.get().loaded, self._depths
            ours = None if loaded is None or theirs is None else record_depths(loaded, self._depth_inputs)
            curve = None if theirs is None or ours is None else depth_divergence(theirs, ours)
            # an empty one where there is none, so that neither model is loaded for it again
            self._store.write_curve(key, curve or ())
        return curve or None

    @cached_property
    def _depths(self) -> Depths | None:
        """What the reference's layers give, if any candidate's curve is still to be measured."""
        keys = [key for described in self._candidates if (key := self._curve_key(described)) is not None]
        loaded = self._load_original().loaded if any(self._store.read_curve(key) is None for key in keys) else None
        return None if loaded is None else record_depths(loaded, self._depth_inputs)

    @cached_property
    def _depth_inputs(self) -> Tensor:
        """Windows of 512 tokens, or one that is shorter."""
        text = self._depth_text
        assert text is not None
        stream = self._stream(text)
        length = min(_DEPTH_WINDOW, text.rule.ctx, self._setting.depth_tokens, len(stream))
        count = max(1, min(self._setting.depth_tokens, len(stream)) // length)
        return stream[: count * length].view(count, length)

    # what is kept, and what comes out

    def _known(self, described: Described, task: Task, measure: Callable[[], Outcome]) -> Outcome:
        """What was measured before, or is measured now and kept; what an address serves may change, and is not kept."""
        if described.digest is None:
            return measure()
        key = self._key(described, task)
        outcome = self._store.read(key)
        if outcome is None:
            outcome = measure()
            self._store.write(key, outcome)
        return outcome

    def _circumstances(self, described: Described) -> dict[str, Any]:
        """Everything but the task that decides a model's figures."""
        return {
            "digest": described.digest,
            "alpha": described.alpha,
            "chunks": described.candidate.chunks,
            # one directory may be read in several ways, which only the label tells apart
            "read": None if described.candidate.read is None else described.candidate.label,
            "dtype": str(self._setting.dtype),
            "device": resolve_device(self._setting.device).type,
            "versions": {name: self._versions.get(name) for name in _DECISIVE},
        }

    def _key(self, described: Described, task: Task, **more: Any) -> str:
        divergence = {}
        if isinstance(task, TextTask):
            # the reference has no divergence, but has one as a candidate; with a cache it has 16 bits
            reference = None if described is self._reference else self._circumstances(self._reference)
            divergence = {"reference": reference, "stored": self._keeps(task)}
        # not where its data lies: a directory that was moved is not measured again
        asked = {"name": task.info.name, "sha256": task.info.sha256, "settings": task.info.settings}
        return key_of({"task": asked, **self._circumstances(described), **divergence, **more})

    def _result(
        self,
        described: Described,
        found: dict[str, Outcome],
        own: dict[str, Outcome],
        curve: tuple[float, ...] | None,
        total_weights: int,
    ) -> ModelResult:
        candidate, size = described.candidate, described.size
        is_reference = described is self._reference
        bits = None if size is None or math.isnan(size.bits_per_weight) else size.bits_per_weight
        return ModelResult(
            label=candidate.label,
            family=candidate.family or ("original" if is_reference else described.family),
            model=candidate.model,
            reference=is_reference,
            format=described.format,
            digest=described.digest,
            alpha=described.alpha,
            chunks=candidate.chunks,
            bytes_on_disk=None if size is None else size.bytes_on_disk,
            bits_per_weight=bits,
            total_bits_per_weight=8 * size.bytes_on_disk / total_weights
            if size is not None and total_weights
            else None,
            residual_bytes=described.residual_bytes,
            seconds=round(sum(outcome.seconds for outcome in found.values()), 3),
            notes=candidate.notes,
            scores=tuple(
                score if is_reference else replace(score, recovery=_recovery(score, own[name], outcome))
                for name, outcome in found.items()
                for score in outcome.scores
            ),
            depth=curve,
        )

    def _bar(self, described: Described, task: Task) -> Progress | None:
        return None if self._progress is None else self._progress(f"{described.candidate.label}: {task.info.title}")


class _Once(Generic[T]):
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.made: list[T] = []

    def get(self) -> T:
        """The value."""
        if not self.made:
            self.made.append(self._make())
        return self.made[0]


def _say_nothing(line: str) -> None:
    """What a caller without an ear gets."""


def _recovery(score: Score, own: Outcome, found: Outcome) -> Interval | None:
    """Of a score whose items are known for both models; a divergence is no share of anything."""
    reference, model = own.items.get(score.metric), found.items.get(score.metric)
    if score.metric in DIVERGENCE_METRICS or reference is None or model is None:
        return None
    if reference.weights != model.weights:
        return None
    if score.metric == METRIC:
        return perplexity_recovery(reference, model)
    return mean_recovery(reference, model, higher_is_better=score.higher_is_better)
