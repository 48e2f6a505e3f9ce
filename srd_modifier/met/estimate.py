"""The inventory of a model that nobody has quantized yet, from its config.json alone.

Transformers builds the model without memory for its weights, and every Linear weight of the decoder layers counts as
W4A16 with a residual, in the layout that llm-compressor and this package would save. What is given up against a
measurement: headers are left out, and a recipe that quantizes less (or more: towers) takes other bytes. Weights whose
columns the group does not divide, and routers, count as they are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.config import read_json
from srd_modifier.errors import ConfigError
from srd_modifier.met.inventory import Inventory, Part, architecture, read_experts
from srd_modifier.met.measured import is_expert, require_experts, require_layers
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.depth import count_layers, layer_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BASE_GROUP_SIZE = 128
"""Columns per scale in llm-compressor's `W4A16`, which most recipes use."""

_BITS = 4
_SHAPE_BYTES = 16  # weight_shape: two int64
_ROUTER = re.compile(r"\.(?:gate|router|shared_expert_gate)(?:\.|$)")


def estimate_model(path: Path, *, group_size: int, residual: ResidualFormat | None) -> Inventory:
    """The inventory that a model would have once it is quantized.

    Args:
        path: a config.json, or a directory with one.
        group_size: columns that share a scale of the 4-bit weights; -1 is one scale per row.
        residual: of every quantized weight; None is plain W4A16.

    Raises:
        CheckpointError: the config is missing or damaged, or has no layers.
        ConfigError: the group size is out of range, or Transformers cannot build the model.
    """
    if group_size < 1 and group_size != -1:
        raise ConfigError(f"group size is {group_size}, expected a number of columns such as 128, or -1 for the row")
    path = path / "config.json" if path.is_dir() else path
    config = read_json(path)
    model = _build(config, path)
    dtype = _dtype(config)
    base: list[Part] = []
    corrected: list[Part] = []
    undivided = 0
    for name, tensor in _tensors(model):
        layer, expert = layer_of(name), is_expert(name)
        matrices = _matrices(model, name, tensor) if layer is not None else []
        if group_size != -1 and any(columns % group_size for _, columns in matrices):
            matrices = []
            undivided += 1
        if not matrices:
            size = dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize
            base.append(Part(name, layer, tensor.numel() * size, expert))
            continue
        base.append(Part(name, layer, sum(_w4_bytes(*shape, group_size, dtype) for shape in matrices), expert))
        if residual is not None:
            corrected.append(Part(name, layer, sum(residual.bytes(*shape) for shape in matrices), expert))
    return Inventory(
        kind="config",
        architecture=architecture(config),
        layers=require_layers(count_layers(part.name for part in base), path),
        experts=require_experts(tuple(base), read_experts(config), path),
        base=tuple(base),
        residual=tuple(corrected),
        assumed={
            "bits": _BITS,
            "group_size": group_size,
            "undivided": undivided,
            "dtype": str(dtype).removeprefix("torch."),
            "residual": residual
            and {name: getattr(residual, name) for name in ("bits", "group_size", "density", "scale_dtype")},
        },
    )


def _build(config: dict[str, Any], path: Path) -> "PreTrainedModel":
    """The model on the meta device, where tensors have shapes and no memory."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    # what a quantized model's config says of its packing does not change the shapes of the original
    values = {name: value for name, value in config.items() if name not in ("quantization_config", "srd_config")}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"{path}: model_type is {model_type!r}, which this version of Transformers does not know")
    try:
        model_class = getattr(transformers, architecture(config), transformers.AutoModelForCausalLM)
        settings: PretrainedConfig = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        with torch.device("meta"):
            if hasattr(model_class, "config_class"):
                return model_class(settings)
            return model_class.from_config(settings)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        KeyError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: Transformers cannot build such a model: {reason}") from error


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """What the weights would be saved in; bfloat16 where the config does not say."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        dtype = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return torch.bfloat16


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is saved: parameters, those that are tied once, and buffers that are part of the state."""
    yield from model.named_parameters()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if name not in parameters)


def _matrices(model: nn.Module, name: str, tensor: Tensor) -> list[tuple[int, int]]:
    """The Linear weights in a tensor, as rows and columns; none in one that quantization leaves alone.

    llm-compressor takes the stacked experts of Transformers apart: one Linear for each matrix of each expert.
    """
    module_name, _, own = name.rpartition(".")
    module = model.get_submodule(module_name)
    if _ROUTER.search(module_name):
        return []
    if isinstance(module, nn.Linear) and own == "weight":
        return [(module.out_features, module.in_features)]
    if not is_expert(name) or tensor.dim() != 3:
        return []
    experts, rows, columns = tensor.shape
    if getattr(module, "is_transposed", False):
        rows, columns = columns, rows
    parts = 2 if "gate_up" in own else 1
    return [(rows // parts, columns)] * (experts * parts)


def _w4_bytes(rows: int, columns: int, group_size: int, dtype: torch.dtype) -> int:
    """Bytes of a symmetric W4A16 weight: codes in int32, scales, shape."""
    groups = 1 if group_size == -1 else columns // group_size
    return rows * 4 * -(-columns * _BITS // 32) + rows * groups * dtype.itemsize + _SHAPE_BYTES
