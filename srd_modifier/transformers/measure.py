"""What hydration takes on this machine: seconds and memory of every intent of a policy."""

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from srd_modifier.met.policy import Policy
from srd_modifier.transformers.correction import correction_of, hydrate, release
from srd_modifier.transformers.load import load_corrected

_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """One intent.

    Attributes:
        intent: its name.
        chunks: whose residual it loads.
        seconds: from plain W4 weights to corrected ones, the median of three.
        residual_bytes: that were read for it.
        resident_bytes_before: memory of the process with plain W4 weights; 0 where the system does not tell.
        resident_bytes_peak: the most it had while the weights changed; None where the system does not tell.
        resident_bytes_after: with the corrected weights.
    """

    intent: str
    chunks: tuple[str, ...]
    seconds: float
    residual_bytes: int
    resident_bytes_before: int
    resident_bytes_peak: int | None
    resident_bytes_after: int


def measure_hydration(directory: Path, policy: Policy, *, dtype: torch.dtype = torch.bfloat16) -> list[Measured]:
    """Load a checkpoint without its residual, and hydrate it for every intent.

    Args:
        directory: an SRD checkpoint, or the root of one in a container.
        policy: the intents.
        dtype: of the model's weights.

    Returns:
        In the order of the policy. Files are in the page cache after the first time, which is the usual case of a
        model that runs; for a cold start count with the speed of the storage.

    Raises:
        CheckpointError: there is no residual, or it is damaged.
    """
    model = load_corrected(directory, chunks=[], dtype=dtype)
    sidecar = correction_of(model).sidecar
    measured = []
    for intent, chunks in policy.intents.items():
        seconds = []
        for _ in range(_REPEATS):
            release(model)
            gc.collect()
            before = _resident("VmRSS") or 0
            can_tell = _reset_peak()
            start = time.perf_counter()
            hydrate(model, intent=intent, policy=policy)
            seconds.append(time.perf_counter() - start)
            peak = _resident("VmHWM") if can_tell else None
            after = _resident("VmRSS") or 0
        read = sum(sidecar.entries[module].bytes() for module in correction_of(model).hydrated)
        measured.append(Measured(intent, chunks, median(seconds), read, before, peak, after))
    return measured


def _resident(field: str) -> int | None:
    """Bytes that Linux gives in a field of /proc/self/status, None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _reset_peak() -> bool:
    """Let VmHWM begin anew from here; False where that is not allowed."""
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(descriptor, b"5")
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
