"""What this process has in memory, as Linux counts it: resident pages, those of mapped files included.

Other systems tell only the peak since the process began, which says nothing of one step; there is no figure there.
"""

import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SAMPLE_SECONDS = 0.002


@dataclass
class Peak:
    """The most that was resident during a block.

    Attributes:
        resident_bytes: None until the block has ended, and where the system does not tell.
    """

    resident_bytes: int | None = None


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory now, or None where the system does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most bytes of this process that were in memory at once, or None where the system does not tell."""
    return _status("VmHWM")


@contextmanager
def peak_resident() -> Generator[Peak, None, None]:
    """Measure the peak during a block: the kernel's own, or where it cannot be reset, the highest of many samples."""
    peak = Peak()
    if _reset_peak():
        yield peak
        peak.resident_bytes = peak_resident_bytes()
        return
    samples, ended = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            samples.append(resident_bytes())

    sampler = threading.Thread(target=sample, name="resident memory", daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
    samples.append(resident_bytes())
    peak.resident_bytes = max((value for value in samples if value is not None), default=None)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # another system, or a container that forbids it
        return False
    return True


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
