"""Where a training starts: the grids of its weights, and the levels that they have on them.

`nearest_w4` searches scales and rounds to nearest. The others take what a post-training quantizer has made of the same
model: our own W4 with error feedback (`calibrated_w4`), any symmetric W4A16 checkpoint (`w4_checkpoint`), or the blocks
of a GGUF file (`gguf_file`; `calibrated_gguf` makes the file first).
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.gguf.blocks import LAYOUTS, Blocks, unpack
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import Family, GGUFTensor, family_of
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.weights import ModelWeights
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


@dataclass(frozen=True)
class GGUFStart(Start):
    """A start from the blocks of a GGUF file, which has to stay where it is until the trained file is written.

    Attributes:
        path: the file.
        model_name: directory or hub id of the model that it was made of.
    """

    path: Path = field(kw_only=True)
    model_name: str = field(kw_only=True)


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
    skeleton = _skeleton(find_model(model_name))
    modules = trainable_modules(skeleton, ignore)
    _check_group_size(modules, group_size)
    head = skeleton.get_output_embeddings()
    heads = [name for name, module in skeleton.named_modules() if module is head]
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


def gguf_file(path: Path, model_name: str, *, ignore: Iterable[str] = ()) -> GGUFStart:
    """The blocks of a GGUF file: what is trained keeps its scales and mins, what is not its values.

    Args:
        path: a file of the same model, calibrated, or of `llama-quantize`.
        model_name: directory or hub id of the unquantized model.
        ignore: names or `re:` patterns of modules that keep the file's values, as embedding and head do.

    Raises:
        MissingExtraError: gguf is not installed.
        CheckpointError: the file is missing, damaged, of another model, or of a type whose blocks cannot be packed.
        SRDError: the model cannot be written as GGUF at all.
        ConfigError: nothing in it can be trained.
    """
    file = GGUFFile(path)
    weights = ModelWeights.open(model_name)
    trainable = trainable_modules(_skeleton(weights.directory), ignore)
    family = family_of(weights.config, str(weights.directory / "config.json"))
    file_type_of(file)
    tensors = family.tensors(weights)
    _check_same_model(file, family, tensors, weights)
    start = GGUFStart({}, {}, path=path, model_name=model_name)
    for tensor in tensors:
        if not file.is_quantized(tensor.name):
            continue
        piece = tensor.pieces[0]
        blocks = stored_blocks(file, tensor.name)
        grid = grid_of(blocks, stored_type(file, tensor.name))
        if piece.module not in trainable:
            start.values[piece.source] = piece.to_hugging_face(grid.values(blocks.levels))
            continue
        minimum = None if grid.minimum is None else piece.to_hugging_face(grid.minimum)
        start.grids[piece.module] = Grid(piece.to_hugging_face(grid.scale), grid.low, grid.high, minimum)
        start.levels[piece.module] = piece.to_hugging_face(blocks.levels)
    if not start.grids:
        raise ConfigError(f"{path}: none of the Linear modules is quantized, so there is no grid to train on")
    return start


def calibrated_gguf(
    model_name: str,
    samples: Sequence[Sequence[int]] | None,
    file_type: FileType,
    folder: Path,
    *,
    ignore: Iterable[str] = (),
    source: str = "training text",
) -> GGUFStart:
    """Make a GGUF file of a model and start from its blocks.

    Args:
        model_name: directory or hub id of the unquantized model.
        samples: token ids to calibrate on; None leaves the rounding to ggml.
        file_type: which types its tensors get.
        folder: where the file is made, as `start.gguf`; it has to stay there until the trained file is written.
        ignore: as for `gguf_file`.
        source: what to call the samples in the file's metadata.

    Raises:
        SRDError: as for `gguf_file` and `export_gguf`.
        ConfigError: the type is not quantized, or nothing in the model can be trained.
        MissingExtraError: a library of the `gguf` extra is not installed.
    """
    from srd_modifier.gguf.calibration.text import Calibration

    if not file_type.is_quantized:
        raise ConfigError(f"{file_type.value} is not quantized, so there is no grid to train on")
    trainable_modules(_skeleton(find_model(model_name)), ignore)  # refused before the work, not after it
    path = folder / "start.gguf"
    calibration = None if samples is None else Calibration(source, samples=samples)
    export_gguf(model_name, path, file_type=file_type, calibration=calibration)
    return gguf_file(path, model_name, ignore=ignore)


def stored_type(file: GGUFFile, name: str) -> GGMLType:
    """The type of a tensor of a file.

    Raises:
        CheckpointError: this version cannot write it.
    """
    stored = file.tensors[name].tensor_type.name
    if stored not in GGMLType.__members__:
        known = ", ".join(member.value for member in LAYOUTS)
        raise CheckpointError(
            f"{file.path}: {name} is of type {stored}, whose blocks cannot be trained, only those of {known}"
        )
    return GGMLType[stored]


def file_type_of(file: GGUFFile) -> FileType:
    """The rule that gave a file's types, by its `general.file_type`.

    Raises:
        CheckpointError: this version does not know it.
    """
    if file.file_type not in FileType.__members__:
        known = ", ".join(FileType.__members__)
        raise CheckpointError(f"{file.path} is of file type {file.file_type}, only {known} can be written again")
    return FileType[file.file_type]


def stored_bytes(file: GGUFFile, name: str) -> Tensor:
    """The bytes of a matrix in a file, uint8 `[out, row_bytes]`."""
    stored = file.tensors[name]
    data = np.fromfile(file.path, np.uint8, stored.n_bytes, offset=stored.start)
    return torch.from_numpy(data).view(-1, stored.row_bytes)


def stored_blocks(file: GGUFFile, name: str) -> Blocks:
    """The blocks of a quantized matrix in a file, in the file's order of rows.

    Raises:
        CheckpointError: its type is none that can be packed again.
    """
    return unpack(stored_bytes(file, name), stored_type(file, name))


def grid_of(blocks: Blocks, ggml_type: GGMLType) -> Grid:
    """The grid that the scales and mins of blocks make, in their order of rows."""
    layout = LAYOUTS[ggml_type]
    minimum = blocks.group_mins() if layout.has_min else None
    return Grid(blocks.group_scales(), layout.low, layout.high, minimum)


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


def _check_same_model(file: GGUFFile, family: Family, tensors: Sequence[GGUFTensor], weights: ModelWeights) -> None:
    """Raise CheckpointError unless a file has the tensors of a model, and its norms and biases."""
    if file.architecture != family.architecture:
        raise _another_model(file, weights, f"its architecture is {file.architecture}, expected {family.architecture}")
    expected = {tensor.name: tensor for tensor in tensors}
    different = sorted(expected.keys() ^ file.tensors.keys())
    if different:
        owner = "the model" if different[0] in expected else "the file"
        raise _another_model(file, weights, f"only {owner} has {different[0]}")
    for name, tensor in expected.items():
        shape = tuple(reversed(file.tensors[name].shape))
        if shape != tensor.shape:
            raise _another_model(file, weights, f"{name} is {list(shape)}, expected {list(tensor.shape)}")
    for name, tensor in expected.items():
        if len(tensor.shape) == 1 and tensor.pieces and not file.is_quantized(name):
            own = tensor.read(weights).float()
            if not torch.allclose(file.tensor(name), own, rtol=1e-2, atol=1e-6):
                raise _another_model(file, weights, f"{name} has other values")


def _another_model(file: GGUFFile, weights: ModelWeights, reason: str) -> CheckpointError:
    return CheckpointError(f"{file.path} was not made of {weights.directory}: {reason}")


def _skeleton(directory: Path) -> Any:
    """The model of a directory without weights: names and shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise SRDError(f"cannot load {directory}: {' '.join(str(error).split())}") from error
