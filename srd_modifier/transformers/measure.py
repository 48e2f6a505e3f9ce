"""What hydration takes, measured: the time of each intent and the memory of the process around it."""

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from srd_modifier.met.policy import Policy
from srd_modifier.transformers.correction import correction_of, hydrate, release
from srd_modifier.transformers.load import load_corrected
from srd_modifier.transformers.memory import peak_resident, resident_bytes

_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """What one intent took.

    Attributes:
        intent: of the policy.
        chunks: that it hydrates, in depth order.
        seconds: from plain W4 to hydrated, the median of three.
        residual_bytes: read from the files each time: codes, scales and masks.
        resident_bytes_before: of the whole process while the model is plain W4; None where the system does not tell,
            and likewise below.
        resident_bytes_peak: the most during hydration: mapped files and the weight that is being computed come on top.
        resident_bytes_after: when hydration is done. The weights are changed in place, so that it is near the first.
    """

    intent: str
    chunks: tuple[str, ...]
    seconds: float
    residual_bytes: int
    resident_bytes_before: int | None
    resident_bytes_peak: int | None
    resident_bytes_after: int | None


def measure_hydration(directory: Path, policy: Policy, *, dtype: torch.dtype = torch.bfloat16) -> list[Measured]:
    """Hydrate a model for every intent, each from plain W4, and measure it.

    The model is loaded once, on the CPU, and hydrated with the alphas of the checkpoint. Its files are in the page
    cache by then: reading them from the storage for the first time is not in these figures.

    Args:
        directory: an SRD checkpoint, or the root of one in a container.
        policy: the chunks of every intent.
        dtype: of the model's weights in memory.

    Returns:
        In the order of the policy.

    Raises:
        CheckpointError: there is no residual, or it is damaged or of another base.
    """
    model = load_corrected(directory, chunks=[], dtype=dtype)
    correction = correction_of(model)
    measured = []
    for intent, chunks in policy.intents.items():
        seconds, before, peaks, after = [], None, [], None
        for _ in range(_REPEATS):
            release(model)
            gc.collect()
            before = resident_bytes()
            with peak_resident() as peak:
                start = time.perf_counter()
                hydrate(model, intent=intent, policy=policy)
                seconds.append(time.perf_counter() - start)
            after = resident_bytes()
            peaks.append(peak.resident_bytes)
        read = sum(correction.sidecar.entries[name].bytes() for name, alpha in correction.applied.items() if alpha)
        highest = max((value for value in peaks if value is not None), default=None)
        measured.append(Measured(intent, chunks, statistics.median(seconds), read, before, highest, after))
    return measured
