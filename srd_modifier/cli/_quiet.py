"""What the libraries below would print, kept to what a user of a command needs."""

import logging
import os
import warnings
from functools import wraps
from typing import Any


def quiet_libraries(*, bars: bool) -> None:
    """Show no log of llm-compressor below errors and, unless `bars`, none of the libraries' progress bars."""
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
    if not bars:
        hide_bars()
    # llm-compressor reads this when it is imported, and logs at once
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    # its tracing uses a name that torch is about to retire
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        from llmcompressor.logger import LoggerConfig, configure_logger
    except ImportError:
        return  # nothing that could log; who needs the library says so
    configure_logger(LoggerConfig(console_log_level="ERROR"))


def hide_bars() -> None:
    """Disable every tqdm bar, those included whose owner does not ask whether there is a terminal."""
    from tqdm import tqdm

    initialize = tqdm.__init__

    @wraps(initialize)
    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = disabled
