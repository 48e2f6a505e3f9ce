"""Where a training starts: the grids of its weights, and the levels that they have on them.

`nearest_w4` searches scales and rounds to nearest. The others take what a post-training quantizer has made of the same
model: our own W4 with error feedback (`calibrated_w4`), or any symmetric W4A16 checkpoint (`w4_checkpoint`). Blocks of
GGUF files are in `gguf_start`.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.qat.grid import Grid, search_grid
from srd_modifier.selection.patterns import matches_any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_W4_LEVELS = (-8, 7)

# of W4 alone, the least divergence in docs/quality.md
_BALANCE = 0.25


@dataclass(frozen=True)
class Start:
    """The weights of a model as training finds them.

    Attributes:
        grids: of the Linear modules that are trained on a grid, by module name.
        levels: of their weights, int8 `[out, in]`, by module name.
        values: weights that are stored quantized but stay as they are, float32 by parameter name.
    """

    grids: dict[str, Grid]
    levels: dict[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """The width of the narrowest grid, at which a schedule has to end."""
        return min(grid.bits for grid in self.grids.values())

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Pull the weights of a model into the cells of their levels, put `values` in, and freeze those.

        Args:
            model: the original model, in float32: a narrower dtype would move weights out of their cells.

        Raises:
            ConfigError: the model has another module or shape than the start, or is not in float32.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        weights = {f"{module}.weight": levels for module, levels in self.levels.items()}
        for name, given in {**weights, **self.values}.items():
            _check_parameter(name, parameters.get(name), given)
        for module, grid in self.grids.items():
            weight = parameters[f"{module}.weight"]
            weight.copy_(grid.to(weight.device).pull(weight, self.levels[module].to(weight.device)))
        for name, values in self.values.items():
            parameters[name].copy_(values)
            parameters[name].requires_grad_(False)


@torch.no_grad()
def nearest_w4(
    model: "PreTrainedModel",
    *,
    group_size: int = 64,
    ignore: Iterable[str] = (),
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Start:
    """Every Linear module rounded to nearest, with the scales that lose least.

    Args:
        model: the original model.
        group_size: columns per scale.
        ignore: names or `re:` patterns of modules that stay in full precision; the head always does.
        scale_dtype: in which the scales will be stored.

    Raises:
        ConfigError: no Linear module is left, the group size does not divide their columns, or the model is a mixture
            whose experts are no Linear modules.
        CheckpointError: a weight has NaN or infinite entries.
    """
    modules = trainable_modules(model, ignore)
    _check_group_size(modules, group_size)
    grids, levels = {}, {}
    for name, module in modules.items():
        weight = module.weight.float()
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            raise CheckpointError(f"{name}.weight has NaN or infinite entries; the model cannot be quantized")
        grids[name] = search_grid(weight, group_size=group_size, scale_dtype=scale_dtype)
        levels[name] = grids[name].levels(weight).to(torch.int8)
    return Start(grids, levels)


def calibrated_w4(
    model_name: str,
    samples: Sequence[Sequence[int]],
    *,
    group_size: int = 64,
    ignore: Iterable[str] = (),
    seed: int = 0,
    folder: Path | None = None,
) -> Start:
    """W4 with error feedback, as a recipe with `base_rounding: feedback` makes it.

    Args:
        model_name: a directory or hub id.
        samples: token ids of the calibration text.
        group_size: columns per scale.
        ignore: names or `re:` patterns of modules that stay in full precision; the head always does.
        seed: of everything random.
        folder: where the checkpoint waits, about 0.6 bytes per weight; None is the system's temporary directory.

    Raises:
        MissingExtraError: llm-compressor is not installed.
        ConfigError: as for `nearest_w4`.
        SRDError: the model or the samples are at fault.
    """
    from srd_modifier.quantizing import quantize

    ignore = list(ignore)
    model = skeleton(find_model(model_name))
    modules = trainable_modules(model, ignore)
    _check_group_size(modules, group_size)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    modifier = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [*heads, *ignore],
        "base_rounding": "feedback",
        "balance": _BALANCE,
        "correct": {"targets": [next(iter(modules))]},  # it keeps one residual at least
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix=".srd-qat-", dir=folder) as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        # JSON is YAML
        recipe.write_text(json.dumps({"quant_stage": {"quant_modifiers": {"SRDModifier": modifier}}}), encoding="utf-8")
        quantize(model_name, recipe, Path(scratch) / "w4", dataset=samples, seed=seed)
        return w4_checkpoint(Path(scratch) / "w4")


def w4_checkpoint(directory: Path) -> Start:
    """The codes and scales of a W4A16 checkpoint on disk, whoever made it.

    Scales are rounded to bfloat16, in which they will be stored again.

    Raises:
        CheckpointError: there is no such checkpoint, or its codes are not symmetric int4 in groups.
    """
    base = BaseCheckpoint(directory)
    if not base.quantized_modules:
        raise CheckpointError(f"{directory} has no 4-bit weights; start from a compressed-tensors W4A16 checkpoint")
    grids, levels = {}, {}
    for module in base.quantized_modules:
        if f"{module}.weight_zero_point" in base:
            raise CheckpointError(
                f"{base.path_of(f'{module}.weight_zero_point')}: {module} has zero points, and only symmetric W4 can "
                "be trained; quantize with symmetric: true"
            )
        values = base.dequantize(module)
        scale = base.tensor(f"{module}.weight_scale").float()
        # a product of code and scale, divided by the scale, is the code again
        levels[module] = Grid(scale, *_W4_LEVELS).levels(values).to(torch.int8)
        grids[module] = Grid(scale.bfloat16().float(), *_W4_LEVELS)
    return Start(grids, levels)


def trainable_modules(model: "PreTrainedModel", ignore: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The Linear modules of a model but for its head and those that `ignore` names.

    Raises:
        ConfigError: there are none, or the model is a mixture whose experts are no Linear modules.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            raise ConfigError(
                f"{name} holds the experts of a mixture in one tensor, which would stay in full precision; only models "
                "of Linear modules can be trained for quantization"
            )
    ignore = list(ignore)
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not matches_any(name, ignore)
    }
    if not found:
        raise ConfigError(f"no Linear module is left to quantize: the head stays as it is, and {ignore} is ignored")
    return found


def _check_group_size(modules: dict[str, nn.Linear], group_size: int) -> None:
    if group_size < 1:
        raise ConfigError(f"group size is {group_size}, expected at least 1")
    odd = [name for name, module in modules.items() if module.in_features % group_size]
    if odd:
        raise ConfigError(
            f"groups of {group_size} do not divide the {modules[odd[0]].in_features} columns of {odd[0]} "
            f"({len(odd)} modules in all); choose another group size, or ignore them"
        )


def _check_parameter(name: str, parameter: nn.Parameter | None, given: Tensor) -> None:
    if parameter is None:
        raise ConfigError(f"the model has no {name}, the start is one of another model")
    if parameter.shape != given.shape:
        raise ConfigError(
            f"{name} is {list(parameter.shape)} in the model and {list(given.shape)} in the start; they are not of "
            "the same model"
        )
    if parameter.dtype != torch.float32:
        raise ConfigError(f"{name} is {parameter.dtype}; load the model with dtype=torch.float32 to train it")


def skeleton(directory: Path) -> Any:
    """The model of a directory without weights: names and shapes.

    Raises:
        SRDError: config.json is missing or describes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise SRDError(f"cannot load {directory}: {' '.join(str(error).split())}") from error
