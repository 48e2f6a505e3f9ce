"""A trained model as an ordinary Transformers directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.atomic import new_directory
from srd_modifier.qat.exports._common import refuse_unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_dense(
    model: "PreTrainedModel",
    tokenizer: Any,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> None:
    """Write a model that any loader of Transformers takes.

    Args:
        model: trained and finished.
        tokenizer: saved beside it.
        output: the directory to make; it appears whole or not at all.
        dtype: of the weights. In bfloat16 a weight is its grid's value rounded to 8 bits.
        overwrite: replace an existing model directory.

    Raises:
        SRDError: the model is not finished, or the output is at fault.
    """
    refuse_unfinished(model)
    with new_directory(output, overwrite=overwrite) as staging:
        write_model(model, tokenizer, staging, dtype)


def write_model(
    model: "PreTrainedModel",
    tokenizer: Any,
    directory: Path,
    dtype: torch.dtype,
    packed: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Save weights, configuration and tokenizer; the model itself stays as it is.

    Args:
        model: trained and finished.
        tokenizer: of the model.
        directory: an empty one.
        dtype: of everything that is stored as it is.
        packed: by module, the tensors that are stored in the place of its weight, by suffix.
    """
    packed = packed or {}
    own_dtype = model.config.dtype
    try:
        model.save_pretrained(directory, state_dict=_state(model, dtype, packed))
    finally:
        model.config.dtype = own_dtype  # Transformers notes there what it believes to have saved
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _state(
    model: "PreTrainedModel", dtype: torch.dtype, packed: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors to store, by name. What is tied stays one tensor, by which Transformers knows it."""
    state: dict[str, Tensor] = {}
    converted: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module != name and module in packed:
            state |= {f"{module}.{suffix}": value for suffix, value in packed[module].items()}
            continue
        key = (tensor.data_ptr(), tensor.shape)
        if key not in converted:
            converted[key] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = converted[key]
    return state
