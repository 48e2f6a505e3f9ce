"""Where a checkpoint's module lives in a model."""

from collections.abc import Callable

from compressed_tensors.offload import OffloadCache, update_offload_parameter
from torch import Tensor, nn

from srd_modifier.errors import CheckpointError


def find_weight(model: nn.Module, name: str) -> Tensor:
    """The weight `[out, in]` of the module that a checkpoint calls `name`; write to it with `store_weight`.

    A model without its head has names without the prefix (`layers.0...` for `model.layers.0...`), and Transformers
    stacks the experts of a mixture into one parameter: `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
    `down_proj` `[experts, hidden, intermediate]`.

    Raises:
        CheckpointError: the model has no such module.
    """
    module, parameter, part = _locate(model, name)
    return part(getattr(module, parameter))


def find_stack(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module and the name of its parameter in which an expert is stacked, or None for what is no such expert."""
    found = (_locate_expert(model, candidate) for candidate in _candidates(model, name))
    return next((expert[:2] for expert in found if expert is not None), None)


def store_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Copy `value` into the weight that `find_weight` finds, wherever its module keeps it.

    Raises:
        CheckpointError: the model has no such module, or one of another shape.
    """
    module, parameter, part = _locate(model, name)
    whole = getattr(module, parameter)
    place = part(whole)
    if place.shape != value.shape:
        raise CheckpointError(
            f"{name} is {list(value.shape)} in the checkpoint and {list(place.shape)} in {type(model).__name__}, which "
            "keeps it in a way that this version does not know"
        )
    place.copy_(value)
    if isinstance(module._parameters, OffloadCache):
        update_offload_parameter(module, parameter, whole)  # what was written to may be a copy


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str, Callable[[Tensor], Tensor]]:
    """The module that holds a weight, the name of the parameter, and how to get the weight out of it."""
    for candidate in _candidates(model, name):
        module = _submodule(model, candidate)
        if module is not None and isinstance(getattr(module, "weight", None), Tensor):
            return module, "weight", lambda weight: weight
        expert = _locate_expert(model, candidate)
        if expert is not None:
            return expert
    raise CheckpointError(f"the checkpoint has a residual for {name}, which {type(model).__name__} does not have")


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module that a checkpoint calls `name`, or None (a stacked expert is not a module of its own)."""
    found = (_submodule(model, candidate) for candidate in _candidates(model, name))
    return next((module for module in found if module is not None), None)


def _candidates(model: nn.Module, name: str) -> tuple[str, ...]:
    """What a model may call a module that the checkpoint calls `name`: with and without the prefix of its head."""
    prefix = getattr(model, "base_model_prefix", "")
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _locate_expert(model: nn.Module, name: str) -> tuple[nn.Module, str, Callable[[Tensor], Tensor]] | None:
    parts = name.rsplit(".", 2)
    if len(parts) != 3 or not parts[1].isdigit():
        return None
    container, expert, projection = _submodule(model, parts[0]), int(parts[1]), parts[2]
    stacked = {"down_proj": "down_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}.get(projection, "")
    parameter = getattr(container, stacked, None)
    if container is None or not isinstance(parameter, Tensor):
        return None
    if getattr(container, "is_transposed", False) or not getattr(container, "is_concatenated", True):
        raise CheckpointError(
            f"{name} is one of the experts that {type(model).__name__} stacks transposed or with gate and up "
            "interleaved, which this version does not correct; load plain W4 without srd_modifier"
        )
    half = parameter.shape[1] // 2
    rows = {"gate_proj": slice(half), "up_proj": slice(half, None)}.get(projection, slice(None))
    return container, stacked, lambda whole: whole[expert][rows]
