"""Training while the bit width falls, so that the trained weights suit the format they are exported to.

schedule        QATSchedule: the width at each optimizer step
grid            the values that a weight may take in its export format
start           where grids and first levels come from: rounding, or a calibrated quantizer's result
gguf_start      the same from the blocks of a GGUF file
fake_quantizer  a weight as it will be exported, at any width, with gradients that pass straight through
linear          Linear modules that compute with fake-quantized weights, put in and taken out in place
callback        ScheduledQATCallback: the schedule in the Trainer of Transformers
data            text as training sequences
distillation    the divergence from the full-precision model as the loss
curve           the picture of a training: the loss, and the width under it
exports         the trained model in the formats that are asked for
train           all of it, as `srd qat` runs it

>>> from srd_modifier.qat import QATSchedule
>>> QATSchedule.linear(bits=4).width_at(0.5)
10.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srd_modifier.qat.callback import ScheduledQATCallback
    from srd_modifier.qat.schedule import QATSchedule

__all__ = ["QATSchedule", "ScheduledQATCallback"]

_HOMES = {
    "QATSchedule": "srd_modifier.qat.schedule",
    "ScheduledQATCallback": "srd_modifier.qat.callback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
