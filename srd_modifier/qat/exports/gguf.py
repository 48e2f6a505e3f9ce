"""A trained model as a GGUF file: on the blocks that it was trained on, or converted anew.

`export_trained_gguf` writes the file again that training started from, with the trained levels in its blocks. For any
other type, `export_converted_gguf` lets ggml round the trained weights.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from srd_modifier.checkpoint.atomic import refuse_existing_file
from srd_modifier.errors import SRDError
from srd_modifier.gguf.blocks import pack
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.metadata import CalibrationText, Method
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import ExportPlan, ExportSummary, encode_plain, plan_export, write_plan
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.qat.exports._common import exact_levels, refuse_unfinished
from srd_modifier.qat.exports.dense import export_dense
from srd_modifier.qat.gguf_start import GGUFStart, file_type_of, grid_of, stored_blocks, stored_bytes, stored_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_trained_gguf(model: nn.Module, start: GGUFStart, output: Path, *, overwrite: bool = False) -> ExportSummary:
    """Write a GGUF file whose weights are the trained ones, bit for bit, on the blocks of the file they started from.

    Scales and mins are those of the start's file, and so is every byte of the quantized tensors that were not trained.
    What is not quantized, such as norms, is the trained model's. Vocabulary and model card are those of the directory
    that the start was made of, so that the file is as large as the start's.

    Args:
        model: trained and finished, in float32.
        start: what it was trained from.
        output: the file to make; it appears whole or not at all.
        overwrite: replace an existing file.

    Raises:
        SRDError: the model is not finished, a weight is not on its blocks, the start's file is gone, or the output
            is at fault.
        MissingExtraError: a library of the `gguf` extra is not installed.
    """
    refuse_unfinished(model)
    refuse_existing_file(output, overwrite=overwrite)
    file = GGUFFile(start.path)
    plan = plan_export(start.model_name, file_type=file_type_of(file), use_importance=False)
    own = {field.name: getattr(plan.weights, field.name) for field in fields(plan.weights)}
    plan = replace(
        plan,
        weights=_TrainedWeights(**own, trained=model.state_dict()),
        types={tensor.name: stored_type(file, tensor.name) for tensor in plan.tensors},
        mixture=str(file.metadata.get("srd.mixture", file.file_type)),
        method=Method.TRAINED,
        calibration=_calibration_text(file),
    )

    def encode(plan: ExportPlan, tensor: GGUFTensor) -> Iterator[NDArray[np.uint8]]:
        if not file.is_quantized(tensor.name):
            yield from encode_plain(plan, tensor)
        elif tensor.pieces[0].module in start.grids:
            yield _trained_bytes(file, tensor, tensor.read(plan.weights))
        else:
            yield _untrained_bytes(file, tensor, tensor.read(plan.weights))

    return write_plan(plan, output, encode=encode, overwrite=overwrite)


def export_converted_gguf(
    model: "PreTrainedModel", tokenizer: Any, output: Path, file_type: FileType, *, overwrite: bool = False
) -> ExportSummary:
    """Write a trained model as a GGUF file of any type, rounded by ggml as `llama-quantize` does.

    Args:
        model: trained and finished.
        tokenizer: of the model.
        output: the file to make; the model is named after it.
        file_type: which types its tensors get.
        overwrite: replace an existing file.

    Raises:
        SRDError: the model is not finished, cannot be written as GGUF, or the output is at fault.
        MissingExtraError: a library of the `gguf` extra is not installed.
    """
    refuse_unfinished(model)
    refuse_existing_file(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".srd-qat-", dir=output.parent) as folder:
            dense = Path(folder) / output.stem
            # of bfloat16 ggml would see other weights than those that were trained
            export_dense(model, tokenizer, dense, dtype=torch.float32)
            return export_gguf(dense, output, file_type=file_type, overwrite=overwrite)
    except OSError as error:
        raise SRDError(f"cannot write {output}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _TrainedWeights(ModelWeights):
    """The directory of the original model, with the weights of the trained one."""

    trained: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        if name not in self.trained:
            raise SRDError(f"the trained model has no {name}, which {self.directory} has")
        return self.trained[name].detach().float().cpu()


def _trained_bytes(file: GGUFFile, tensor: GGUFTensor, weight: Tensor) -> NDArray[np.uint8]:
    """The blocks of a file with the levels of a trained weight `[out, in]`, whose rows are in the file's order."""
    ggml_type = stored_type(file, tensor.name)
    blocks = stored_blocks(file, tensor.name)
    module = tensor.pieces[0].source.removesuffix(".weight")
    levels = exact_levels(module, weight, grid_of(blocks, ggml_type))
    return pack(replace(blocks, levels=levels), ggml_type).numpy()


def _untrained_bytes(file: GGUFFile, tensor: GGUFTensor, weight: Tensor) -> NDArray[np.uint8]:
    """The bytes of a file as they are, if they are what the model computes with."""
    if not torch.equal(stored_blocks(file, tensor.name).dequantize(), weight):
        raise SRDError(
            f"{tensor.pieces[0].source} is not what {file.path} stores, though it is not trained on a grid; "
            "apply(model) of the start puts it there and freezes it"
        )
    return stored_bytes(file, tensor.name).numpy()


def _calibration_text(file: GGUFFile) -> CalibrationText | None:
    """The text that the scales of a file were calibrated on, where it says so."""
    values = [file.metadata.get(f"srd.calibration.{key}") for key in ("text", "sha256", "tokens")]
    if any(value is None for value in values):
        return None
    name, sha256, tokens = values
    return CalibrationText(name=str(name), sha256=str(sha256), tokens=int(str(tokens)))
