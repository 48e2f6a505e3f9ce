"""Work in a forked process, for tests that kill it."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

_TOO_LONG = 60


def start(work: Callable[[], object], *, fsync: bool = True) -> int:
    """The number of a forked process that does some work, and exits with 0, or with 1 after an error.

    Without `fsync` it does not wait for the disk, which takes long: a killed process loses nothing that it has written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(_TOO_LONG)  # a child that hangs must not hang the tests
        if not fsync:
            os.fsync = lambda descriptor: None
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return child


def in_child(work: Callable[[], object], *, fsync: bool = True) -> int:
    """The wait status of such a process."""
    return os.waitpid(start(work, fsync=fsync), 0)[1]
