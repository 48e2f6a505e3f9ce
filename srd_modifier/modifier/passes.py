"""Calibration forwards that show nothing new, left out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.sequential.helpers import Subgraph
from torch import nn


@contextmanager
def without_idle_passes(is_idle: Callable[[Sequence[nn.Module]], bool]) -> Iterator[None]:
    """Leave out the first forward through layers that are finished.

    llm-compressor's sequential pipeline runs the data through every layer twice: before it is quantized, for the hooks
    that calibrate it, and afterwards, without hooks, for what the next layer is calibrated on. Only the second gives
    outputs that are used, as long as errors are propagated, which is upstream's default and ours.

    Args:
        is_idle: whether none of some modules is still to be calibrated.
    """
    forward = Subgraph.forward

    @wraps(forward)
    def forward_if_needed(self: Subgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        if not HooksMixin._HOOKS_DISABLED and is_idle(self.submodules(model)):
            return {}
        return forward(self, model, **inputs)

    Subgraph.forward = forward_if_needed
    try:
        yield
    finally:
        Subgraph.forward = forward
