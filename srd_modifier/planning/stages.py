"""A calibrated quantization by its stages: how long each takes, and how much memory.

What a stage takes grows with other things than the next: a pass over the samples with their number, quantizing with the
weights alone. llm-compressor's callbacks say where one ends. They are replaced for the whole process, which has nothing
else to do.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from srd_modifier.transformers.memory import Peak, peak_resident

PREPARING, CALIBRATING, SAVING = "preparing", "calibrating", "saving"
SENSITIVITY, QUANTIZING, PASSES = "sensitivity", "quantizing", "passes"


class Stages:
    """What one quantization of this process takes; used as a context around it.

    Attributes:
        cached_bytes: the most that llm-compressor kept of the samples between two decoder layers.
    """

    def __init__(self) -> None:
        self.cached_bytes = 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, list[Peak]] = {PREPARING: [], CALIBRATING: [], SAVING: []}
        self._stage = PREPARING
        self._begun = 0.0
        self._measuring = ExitStack()

    def __enter__(self) -> "Stages":
        self._watch()
        self._enter(PREPARING)
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by what was done.

        `preparing` is loading and tracing, without `sensitivity`; `passes` are the samples through the decoder layers,
        `quantizing` comes between them, and `saving` is last.
        """
        found = {name: self._seconds[name] for name in (PREPARING, SENSITIVITY, QUANTIZING, SAVING)}
        found[PREPARING] -= found[SENSITIVITY]
        found[PASSES] = self._seconds[CALIBRATING] - found[QUANTIZING]
        return found

    @property
    def peaks(self) -> dict[str, int | None]:
        """The most bytes that were resident in a stage; None where the system does not tell.

        They are `preparing`, the sensitivity included, `calibrating` and `saving`.
        """
        return {
            stage: max((peak.resident_bytes for peak in peaks if peak.resident_bytes is not None), default=None)
            for stage, peaks in self._peaks.items()
        }

    def _watch(self) -> None:
        from llmcompressor.core import LifecycleCallbacks
        from llmcompressor.pipelines.cache import IntermediatesCache

        self._wrap(LifecycleCallbacks, "calibration_start", SENSITIVITY, after=lambda: self._enter(CALIBRATING))
        self._wrap(LifecycleCallbacks, "sequential_epoch_end", QUANTIZING)
        # a recipe of several quantizers calibrates several times: what is between counts as saving, and is short
        self._wrap(LifecycleCallbacks, "calibration_end", QUANTIZING, after=lambda: self._enter(SAVING))
        delete = IntermediatesCache.delete

        @wraps(delete)
        def counted(cache: IntermediatesCache, *args: Any, **kwargs: Any) -> None:
            delete(cache, *args, **kwargs)
            self.cached_bytes = max(self.cached_bytes, sum(cache.size().values()))

        setattr(IntermediatesCache, "delete", counted)  # noqa: B010 - a method is not to be assigned

    def _wrap(self, owner: Any, name: str, part: str, *, after: Callable[[], None] = lambda: None) -> None:
        """Count the seconds of a callback as those of a part of the stage."""
        inner = getattr(owner, name)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - begun
                after()

        setattr(owner, name, timed)

    def _enter(self, stage: str) -> None:
        self._leave()
        self._stage, self._begun = stage, time.perf_counter()
        self._peaks[stage].append(self._measuring.enter_context(peak_resident()))

    def _leave(self) -> None:
        if self._begun:
            self._seconds[self._stage] += time.perf_counter() - self._begun
        self._measuring.close()
