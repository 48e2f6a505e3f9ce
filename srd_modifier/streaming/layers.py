"""The steps of a streamed quantization: what is in memory together."""

from dataclasses import dataclass, field

from torch import nn

from srd_modifier.planning.modules import is_packed, saved_by_module
from srd_modifier.selection.depth import layer_of


@dataclass
class Step:
    """A decoder layer, or a module outside the layers.

    Attributes:
        name: "layer 3", or the module's.
        quantized: its modules that are quantized, by name.
        copied: its tensors that are saved as they are.
        saved: every tensor that it writes.
    """

    name: str
    quantized: list[tuple[str, nn.Module]] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)


def steps_of(model: nn.Module) -> list[Step]:
    """Every tensor that is saved, in steps; the order is the model's.

    Args:
        model: with quantization schemes, on any device. A tensor that is tied to another is copied once.
    """
    steps: dict[str, Step] = {}
    for name, module, layout in saved_by_module(model):
        layer = layer_of(name)
        key = name if layer is None else f"layer {layer}"
        step = steps.setdefault(key, Step(key))
        step.saved.update(layout)
        if is_packed(module):
            step.quantized.append((name, module))
            step.copied += [tensor for tensor in layout if tensor == f"{name}.bias"]
        else:
            step.copied += layout
    return list(steps.values())
