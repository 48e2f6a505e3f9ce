"""Memory that was freed, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return what the C library keeps of freed memory; without effect where it has no such call.

    glibc keeps the memory of temporaries of a few megabytes for the next ones, which then do not quite fit: 70 MB more
    with every layer of a model of 1.7 billion weights, although no tensor is left of any.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return None
