"""The model that `srd quantize` would load, without weights: modules, shapes and dtypes on torch's meta device."""

from typing import Any

import torch

from srd_modifier.checkpoint.shards import DTYPES
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.planning.source import ModelSource


def build_skeleton(source: ModelSource) -> Any:
    """Build the model from its config.json, experts as separate Linear modules as llm-compressor makes them.

    Raises:
        SRDError: Transformers does not know the architecture.
        CheckpointError: config.json and the files disagree on a shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or stored_dtype(source))
    except (OSError, ValueError) as error:
        raise SRDError(f"cannot load {source.name}: {' '.join(str(error).split())}") from error
    for name, parameter in model.named_parameters():
        stored = source.shapes.get(name)
        if stored is not None and stored != tuple(parameter.shape):
            raise CheckpointError(
                f"{source.name}: {name} is {list(stored)} in the file, {list(parameter.shape)} by config.json"
            )
    _linearize_experts(model)
    return model.eval()


def stored_dtype(source: ModelSource) -> torch.dtype:
    """What Transformers takes where config.json names no dtype: that of the first floating-point tensor."""
    found = (DTYPES[name] for name in source.dtypes.values() if name in DTYPES)
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _linearize_experts(model: Any) -> None:
    """As llm-compressor's `linearize_moe`, which would copy the weights that there are none of."""
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes

    for name, experts in get_non_linearized_moes(model):
        with torch.device("meta"):
            linear = LinearExperts2D.get_linear_experts_cls(type(experts))(getattr(experts, "config", model.config))
        model.set_submodule(name, linear)
