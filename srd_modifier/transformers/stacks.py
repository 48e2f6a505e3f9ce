"""Experts: a Linear each in the checkpoint, slices of two stacked parameters in the model.

Transformers stacks them while it reads, by conversions that it knows for some architectures. llm-compressor takes the
experts of every architecture apart, so that a checkpoint can have single experts where Transformers knows only the
stack (Gemma 4) or other names (Mixtral): it would then leave the stack at random values, with a warning.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import CheckpointError

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


def stacks(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that hold the experts of a layer as two stacked parameters."""
    return tuple(
        name
        for name, module in model.named_modules()
        if all(_is_stack(module._parameters.get(parameter)) for parameter in (_GATE_UP, _DOWN))
    )


def check_readable(model: nn.Module, base: BaseCheckpoint) -> None:
    """Refuse, before the weights are read, experts that Transformers cannot unpack.

    Raises:
        CheckpointError: experts have zero points, which its unpacking does not take.
    """
    # here, because every import of Transformers would otherwise import compressed-tensors
    from srd_modifier.transformers.weights import find_stack

    for module in base.quantized_modules:
        if f"{module}.weight_zero_point" in base and find_stack(model, module) is not None:
            raise CheckpointError(
                f"{base.directory}: {module} has zero points, with which Transformers cannot stack experts; quantize "
                "with a symmetric scheme"
            )


def _is_stack(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() == 3


def stacking(names: Iterable[str], known: Sequence[Any]) -> list[Any]:
    """Conversions from single experts to stacks, where none of the known conversions reads these experts' names.

    Args:
        names: of the modules with stacks, as `stacks` finds them.
        known: Transformers' own conversions for the model.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    read = tuple(pattern for conversion in _converters(known) for pattern in conversion.source_patterns)
    leaves = {name.rpartition(".")[2] for name in names if not f"{name}.*.down_proj.weight".endswith(read)}
    added = []
    for leaf in sorted(leaves):
        added += [
            WeightConverter(
                source_patterns=[f".{leaf}.*.gate_proj.weight", f".{leaf}.*.up_proj.weight"],
                target_patterns=f".{leaf}.{_GATE_UP}",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns=f".{leaf}.*.down_proj.weight",
                target_patterns=f".{leaf}.{_DOWN}",
                operations=[MergeModulelist(dim=0)],
            ),
        ]
    return added


def dense_experts(conversions: Sequence[Any]) -> list[Any]:
    """Those of the conversions that stack experts, for experts that the checkpoint has as they are."""
    return [
        conversion
        for conversion in _converters(conversions)
        if any("experts" in pattern for pattern in conversion.source_patterns)
    ]


def forget_decompression(model: nn.Module) -> None:
    """Let saving undo what loading the dense model would do: unpacking cannot be undone, nor what only we stack."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    loaded: Any = getattr(model, "_weight_conversions", None)
    if not loaded:
        return
    used = {tuple(conversion.target_patterns) for conversion in _converters(loaded)}
    known = _converters(get_model_conversion_mapping(model))
    renamings = [conversion for conversion in loaded if not _is_converter(conversion)]
    stacked = [conversion for conversion in known if tuple(conversion.target_patterns) in used]
    vars(model)["_weight_conversions"] = [*renamings, *stacked]


def _converters(conversions: Iterable[Any]) -> list[Any]:
    return [conversion for conversion in conversions if _is_converter(conversion)]


def _is_converter(conversion: Any) -> bool:
    from transformers.core_model_loading import WeightConverter

    return isinstance(conversion, WeightConverter)
