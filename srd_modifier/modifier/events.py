"""Looking over the shoulder of the quantizer that follows in the recipe.

In llm-compressor's default pipeline every modifier has a calibration epoch of its own, so an SRDModifier that waited
for its own events would have to copy the whole model before the quantizer begins. Standing around the quantizer's
own events instead, it holds the originals of one layer, and only while that layer is being quantized.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

from llmcompressor.modifiers import Modifier
from torch import nn


class Observer(Protocol):
    """What wants to know when a quantizer calibrates and quantizes."""

    def calibration_starts(self, quantizer: Modifier) -> None:
        """Before the quantizer's calibration forwards."""

    def is_finished(self, module: nn.Module) -> bool:
        """Whether a module is quantized already, so that it needs no calibration."""

    def restore(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """The calibration forwards of these modules are done; put finished ones back, and return the others."""

    def before_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """The weights of these modules are still original, and will be quantized next."""

    def after_quantizing(self, quantizer: Modifier, modules: Sequence[nn.Module]) -> None:
        """Scales and weights of these modules are final."""

    def calibration_ends(self, quantizer: Modifier) -> None:
        """After the quantizer's last event."""


def observe(quantizer: Modifier, observer: Observer) -> Callable[[], None]:
    """Call `observer` around the quantizer's life-cycle events; returns what undoes it.

    The methods are replaced on this one instance (past pydantic, whose models accept no unknown attribute).
    """
    start, epoch_end, end = (
        quantizer.on_calibration_start,
        quantizer.on_sequential_epoch_end,
        quantizer.on_calibration_end,
    )

    @wraps(start)
    def on_calibration_start(*args: Any, **kwargs: Any) -> Any:
        observer.calibration_starts(quantizer)
        with _without_hooks(quantizer, observer.is_finished):
            return start(*args, **kwargs)

    @wraps(epoch_end)
    def on_sequential_epoch_end(state: Any, event: Any, modules: Sequence[nn.Module], **kwargs: Any) -> Any:
        modules = observer.restore(quantizer, modules)
        observer.before_quantizing(quantizer, modules)
        result = epoch_end(state, event, modules, **kwargs)
        observer.after_quantizing(quantizer, modules)
        return result

    @wraps(end)
    def on_calibration_end(*args: Any, **kwargs: Any) -> Any:
        result = end(*args, **kwargs)
        observer.calibration_ends(quantizer)
        return result

    replacements = (on_calibration_start, on_sequential_epoch_end, on_calibration_end)
    for method in replacements:
        object.__setattr__(quantizer, method.__name__, method)

    def undo() -> None:
        for method in replacements:
            if method.__name__ in vars(quantizer):
                object.__delattr__(quantizer, method.__name__)

    return undo


@contextmanager
def _without_hooks(quantizer: Modifier, finished: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Let a quantizer put no hooks on finished modules: it would calibrate them, and then quantize them."""
    register, replaced = quantizer.register_hook, "register_hook" in vars(quantizer)  # by another observer

    @wraps(register)
    def register_hook(target: Any, *args: Any, **kwargs: Any) -> Any:
        return None if finished(target) else register(target, *args, **kwargs)

    object.__setattr__(quantizer, "register_hook", register_hook)
    try:
        yield
    finally:
        if replaced:
            object.__setattr__(quantizer, "register_hook", register)
        else:
            object.__delattr__(quantizer, "register_hook")
