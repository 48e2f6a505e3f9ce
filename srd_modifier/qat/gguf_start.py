"""A training that starts from the blocks of a GGUF file, and ends in the same blocks with other levels.

`gguf_file` reads a file that somebody made of the model; `calibrated_gguf` makes it first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.gguf.blocks import LAYOUTS, Blocks, unpack
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import Family, GGUFTensor, family_of
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.start import Start, skeleton, trainable_modules


@dataclass(frozen=True)
class GGUFStart(Start):
    """A start from the blocks of a GGUF file, which has to stay where it is until the trained file is written.

    Attributes:
        path: the file.
        model_name: directory or hub id of the model that it was made of.
    """

    path: Path = field(kw_only=True)
    model_name: str = field(kw_only=True)


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
    trainable = trainable_modules(skeleton(weights.directory), ignore)
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
    trainable_modules(skeleton(find_model(model_name)), ignore)  # refused before the work, not after it
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
