"""What a GGUF file will hold, and writing it.

`plan_export` finds out everything that the file will hold and refuses what cannot be done, without reading a weight; an
encoder makes the bytes of one tensor (`encode_plain` as `llama-quantize` does); `write_plan` writes the file tensor by
tensor.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.families import Family, GGUFTensor, family_of
from srd_modifier.gguf.ggml import GGMLType, quantize
from srd_modifier.gguf.importance import importance_by_tensor, read_imatrix
from srd_modifier.gguf.metadata import CalibrationText, Method, add_general
from srd_modifier.gguf.mixture import FileType, Override, tensor_types
from srd_modifier.gguf.vocabulary import Vocabulary, read_vocabulary
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.gguf.writer import Entry, head_bytes, write_gguf


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """Everything that a GGUF file will hold, before its weights are read.

    Attributes:
        weights: the model.
        family: what its tensors are to llama.cpp.
        tensors: those of the file, in its order.
        vocabulary: the tokenizer.
        file_type: the rule that gave the types, or the nearest to it, for `general.file_type`.
        mixture: what gave the types, in words.
        types: by tensor name.
        preferred_types: what the rule would have given if the rows of every tensor were whole blocks.
        importance: mean squared input by tensor name, `[in]` or `[experts, in]`; empty if none is used.
        method: how the encoder rounds; None is as `encode_plain` does.
        calibration: the text that calibration or importance are from.
    """

    weights: ModelWeights
    family: Family
    tensors: tuple[GGUFTensor, ...]
    vocabulary: Vocabulary
    file_type: FileType
    mixture: str
    types: Mapping[str, GGMLType]
    preferred_types: Mapping[str, GGMLType]
    importance: Mapping[str, Tensor]
    method: Method | None = None
    calibration: CalibrationText | None = None

    @property
    def entries(self) -> list[Entry]:
        """The tensors as they are written."""
        return [Entry(tensor.name, tensor.shape, self.types[tensor.name]) for tensor in self.tensors]

    @property
    def fallen_back(self) -> dict[str, tuple[GGMLType, GGMLType]]:
        """Tensors whose rows are not whole blocks of the type that the rule prefers: that type, and theirs."""
        pairs = {name: (preferred, self.types[name]) for name, preferred in self.preferred_types.items()}
        return {name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        weights: entries of all tensors.
        bits_per_weight: of all tensors together, scales and mins included, the head of the file not.
        quantized_bits_per_weight: the same over the tensors that the rule quantizes, those included that fall back to
            F16; None if there are none.
        types: how many tensors have each type.
        fallen_back: tensors by the type they should have had and the one they got instead.
        weighted: whether importance was used.
        method: how the weights were rounded.
        mixture: what gave the types.
        notes: where llama.cpp computes or tokenizes otherwise than Transformers, a sentence each.
        predicted_kld: the predicted mean divergence from the original, nats per token, where calibration measured what
            it takes.
    """

    path: Path
    bytes: int
    weights: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    types: dict[str, int]
    fallen_back: dict[str, tuple[str, str]]
    weighted: bool
    method: Method
    mixture: str
    notes: tuple[str, ...]
    predicted_kld: float | None = None


Encoder = Callable[[ExportPlan, GGUFTensor], Iterable[NDArray[np.uint8]]]


def plan_export(
    source: str | Path,
    *,
    file_type: FileType = FileType.Q4_K_M,
    overrides: Sequence[Override] = (),
    alpha: float | None = None,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
    imatrix: Path | None = None,
    use_importance: bool = True,
    calibrated: bool = False,
) -> ExportPlan:
    """Find out what the file will hold.

    The arguments are those of `export.export_gguf`; `calibrated` says that the importance will come from a calibration
    text, so that none is read.

    Raises:
        SRDError: the model or its vocabulary cannot be written; the message names what.
    """
    weights = ModelWeights.open(source, alpha=alpha, layer_alphas=layer_alphas, chunks=chunks)
    family = family_of(weights.config, str(weights.directory / "config.json"))
    tensors = tuple(family.tensors(weights))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    vocabulary = read_vocabulary(weights.directory, weights.config, rows=shapes["token_embd.weight"][0])
    importance: dict[str, Tensor] = {}
    if use_importance and file_type.is_quantized and not calibrated:
        importance = read_imatrix(imatrix, shapes) if imatrix else importance_by_tensor(tensors, weights.importance())
    shape = family.shape(weights.config)

    def types(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GGMLType]:
        return tensor_types(shapes, file_type, shape, overrides, weighted=calibrated or bool(importance))

    return ExportPlan(
        weights=weights,
        family=family,
        tensors=tensors,
        vocabulary=vocabulary,
        file_type=file_type,
        mixture=", ".join([file_type.value, *(f"{pattern}={ggml_type.value}" for pattern, ggml_type in overrides)]),
        types=types(shapes),
        preferred_types=types({name: (*size[:-1], 256 * size[-1]) for name, size in shapes.items()}),
        importance=importance,
    )


def encode_plain(plan: ExportPlan, tensor: GGUFTensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor as `llama-quantize` would make them, one piece at a time.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for the type; the message names tensor and file.
    """
    ggml_type = plan.types[tensor.name]
    importance = plan.importance.get(tensor.name)
    for number, part in enumerate(tensor.parts(plan.weights)):
        own = importance if importance is None or importance.dim() == 1 else importance[number]
        try:
            yield quantize(part.reshape(-1, tensor.shape[-1]), ggml_type, own)
        except ValueError as error:
            source = tensor.pieces[number].source
            raise CheckpointError(f"{plan.weights.path_of(source)}: {source}: {error}") from error


def write_plan(
    plan: ExportPlan, output: Path, *, encode: Encoder = encode_plain, overwrite: bool = False
) -> ExportSummary:
    """Write the file.

    Args:
        plan: what it holds.
        output: the file to make.
        encode: makes the bytes of one tensor, in pieces.
        overwrite: replace an existing file.

    Raises:
        SRDError: a weight cannot be encoded, or the output is at fault. There is no file then.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def data(entry: Entry) -> Iterator[NDArray[np.uint8]]:
        yield from encode(plan, tensors[entry.name])
        plan.weights.release()

    add_metadata = partial(_add_metadata, plan)
    write_gguf(output, plan.family.architecture, add_metadata, plan.entries, data, overwrite=overwrite)
    return _summary(plan, output)


def head_bytes_of(plan: ExportPlan) -> int:
    """Bytes of the file before the first tensor's data; the types of tensors do not change them."""
    return head_bytes(plan.family.architecture, partial(_add_metadata, plan), plan.entries)


def _add_metadata(plan: ExportPlan, writer: Any) -> None:
    import gguf

    add_general(
        writer,
        weights=plan.weights,
        shapes={tensor.name: tensor.shape for tensor in plan.tensors},
        method=_method(plan),
        mixture=plan.mixture,
        importance=plan.importance,
        calibration=plan.calibration,
    )
    writer.add_file_type(plan.file_type.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    plan.family.add_hyperparameters(writer, plan.weights.config)
    plan.vocabulary.add_to(writer)


def _method(plan: ExportPlan) -> Method:
    return plan.method or (Method.WEIGHT_ERROR if plan.file_type.is_quantized else Method.CONVERSION)


def _summary(plan: ExportPlan, output: Path) -> ExportSummary:
    entries = plan.entries
    whole = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
    quantized = [entry for entry in entries if plan.preferred_types[entry.name] not in whole]
    return ExportSummary(
        path=output,
        bytes=output.stat().st_size,
        weights=sum(entry.weights for entry in entries),
        bits_per_weight=_bits(entries),
        quantized_bits_per_weight=_bits(quantized) if quantized else None,
        types=dict(Counter(entry.ggml_type.value for entry in entries).most_common()),
        fallen_back={name: (old.value, new.value) for name, (old, new) in plan.fallen_back.items()},
        weighted=bool(plan.importance),
        method=_method(plan),
        mixture=plan.mixture,
        notes=(*plan.family.notes(plan.weights.config), *plan.vocabulary.differences),
    )


def _bits(entries: Sequence[Entry]) -> float:
    return 8 * sum(entry.nbytes for entry in entries) / sum(entry.weights for entry in entries)
