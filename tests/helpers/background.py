"""Work in another thread, whose result is waited for with a limit: a deadlock fails its test and not the run."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch

SOON = 60.0  # seconds in which anything is done that is not stuck
A_WHILE = 0.3  # seconds in which what need not wait is done


def in_background(work: Callable[[], Any]) -> "Future[Any]":
    """Begin `work` in a thread that does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        torch.set_num_threads(1)  # is a setting of the thread
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
