"""The steps of a streamed quantization: what is in memory together."""

from dataclasses import dataclass, field

from torch import nn

from srd_modifier.planning.modules import direct_tensors, packed_layout
from srd_modifier.selection.depth import layer_of


@dataclass
class Step:
    """A decoder layer, or a module outside the layers.

    Attributes:
        name: "layer 3", or the module's.
        quantized: its modules that are quantized, by name.
        copied: its tensors that are saved as they are.
    """

    name: str
    quantized: list[tuple[str, nn.Module]] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)

    def saved(self) -> set[str]:
        """Every tensor that it writes; to be asked before its modules are packed."""
        packed = {f"{name}.{suffix}" for name, module in self.quantized for suffix in packed_layout(module)}
        return packed | set(self.copied)


def steps_of(model: nn.Module) -> list[Step]:
    """Every tensor that is saved, in steps; the order is the model's.

    Args:
        model: with quantization schemes, on any device. A tensor that is tied to another is copied once.
    """
    steps: dict[str, Step] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        tensors = direct_tensors(module)
        if not tensors:
            continue
        layer = layer_of(name)
        key = name if layer is None else f"layer {layer}"
        step = steps.setdefault(key, Step(key))
        packed = getattr(module, "quantization_scheme", None) is not None
        if packed:
            step.quantized.append((name, module))
        for suffix, tensor in tensors.items():
            if id(tensor) not in seen and (suffix == "bias" or not packed):
                seen.add(id(tensor))
                step.copied.append(f"{name}.{suffix}" if name else suffix)
    return list(steps.values())
