"""Where a checkpoint's module lives in a model."""

from torch import Tensor, nn

from srd_modifier.errors import CheckpointError


def find_weight(model: nn.Module, name: str) -> Tensor:
    """The weight `[out, in]` of the module that a checkpoint calls `name`, as a view that can be written to.

    A model without its head has names without the prefix (`layers.0...` for `model.layers.0...`), and Transformers
    stacks the experts of a mixture into one parameter: `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
    `down_proj` `[experts, hidden, intermediate]`.

    Raises:
        CheckpointError: the model has no such module.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        module = _submodule(model, candidate)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        expert = _expert_view(model, candidate)
        if expert is not None:
            return expert
    raise CheckpointError(f"the checkpoint has a residual for {name}, which {type(model).__name__} does not have")


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module that a checkpoint calls `name`, or None (a stacked expert is not a module of its own)."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((found for candidate in candidates if (found := _submodule(model, candidate)) is not None), None)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _expert_view(model: nn.Module, name: str) -> Tensor | None:
    parts = name.rsplit(".", 2)
    if len(parts) != 3 or not parts[1].isdigit():
        return None
    container, expert, projection = _submodule(model, parts[0]), int(parts[1]), parts[2]
    if container is None:
        return None
    stacked_name = {"down_proj": "down_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}.get(
        projection, ""
    )
    parameter = getattr(container, stacked_name, None)
    if not isinstance(parameter, Tensor):
        return None
    stacked = parameter[expert]
    if projection != "down_proj":
        half = len(stacked) // 2
        return stacked[:half] if projection == "gate_proj" else stacked[half:]
    return stacked
