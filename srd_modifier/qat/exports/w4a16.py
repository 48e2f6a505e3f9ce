"""A trained model as a plain compressed-tensors W4A16 checkpoint, whose codes are the trained levels."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.atomic import new_directory
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.qat.exports._common import exact_levels, refuse_unfinished, weight_of
from srd_modifier.qat.exports.dense import write_model
from srd_modifier.qat.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "pack-quantized"
_BITS = 4
_LEVELS = (-8, 7)


def export_w4a16(
    model: "PreTrainedModel",
    grids: Mapping[str, Grid],
    tokenizer: Any,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> None:
    """Write a W4A16 checkpoint that Transformers and vLLM load without this package.

    What a loader makes of codes and scales is bit for bit the trained weight, rounded to `dtype`.

    Args:
        model: trained and finished.
        grids: of its modules, as `finish` returns them.
        tokenizer: saved beside it.
        output: the directory to make; it appears whole or not at all.
        dtype: of the scales and of everything that is not quantized.
        overwrite: replace an existing model directory.

    Raises:
        ConfigError: the grids are not those of W4A16, or their groups are not all of one size.
        SRDError: the model is not finished, or the output is at fault.
    """
    check_w4(model, grids, dtype)
    with new_directory(output, overwrite=overwrite) as staging:
        write_w4a16(model, grids, tokenizer, staging, dtype)


def write_w4a16(
    model: "PreTrainedModel", grids: Mapping[str, Grid], tokenizer: Any, directory: Path, dtype: torch.dtype
) -> None:
    """Fill an empty directory; arguments and errors as those of `export_w4a16`."""
    from compressed_tensors.compressors import ModelCompressor

    group_size = check_w4(model, grids, dtype)
    packed = {name: _packed(name, weight_of(model, name), grid.to("cpu"), dtype) for name, grid in grids.items()}
    write_model(model, tokenizer, directory, dtype, packed)
    unquantized = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in grids
    ]
    ModelCompressor(quantization_config=_configuration(group_size, unquantized)).update_config(str(directory))
    written = BaseCheckpoint(directory)
    renamed = next((name for name in grids if f"{name}.weight_packed" not in written), None)
    if renamed is not None:
        raise CheckpointError(
            f"{directory}: {renamed} is not among the saved tensors; the architecture renames its modules when it is "
            "saved, which this version does not follow"
        )


def check_w4(model: nn.Module, grids: Mapping[str, Grid], dtype: torch.dtype) -> int:
    """The group size of a finished model's grids, if a W4A16 checkpoint can store them.

    Raises:
        ConfigError: it cannot; the message names the first module at fault.
        SRDError: the model is not finished.
    """
    refuse_unfinished(model)
    sizes: dict[int, str] = {}
    for name, grid in grids.items():
        if (grid.low, grid.high) != _LEVELS or grid.minimum is not None:
            raise ConfigError(
                f"{name} was trained on a grid of levels {grid.low} to {grid.high}"
                f"{'' if grid.minimum is None else ' with mins'}, which W4A16 cannot store; export it as GGUF"
            )
        if not torch.equal(grid.scale.to(dtype).float(), grid.scale):
            raise ConfigError(
                f"{name} was trained with scales that are no {str(dtype).removeprefix('torch.')} numbers, as W4A16 "
                "stores them; search or learn them in that dtype"
            )
        sizes.setdefault(weight_of(model, name).shape[1] // grid.scale.shape[1], name)
    if len(sizes) != 1:
        found = ", ".join(f"{size} ({name})" for size, name in sizes.items()) or "no grid"
        raise ConfigError(f"a W4A16 checkpoint needs one group size for all modules, got {found}")
    return next(iter(sizes))


def _packed(name: str, weight: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(exact_levels(name, weight, grid), _BITS),
        "weight_scale": grid.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def _configuration(group_size: int, unquantized: list[str]) -> Any:
    """What config.json says of the quantization, in the words of llm-compressor."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    weights = QuantizationArgs(num_bits=_BITS, type="int", symmetric=True, strategy="group", group_size=group_size)
    return QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, format=_FORMAT)},
        format=_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=unquantized,
    )
