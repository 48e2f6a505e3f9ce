"""The bytes of a whole model, calibrated: first what errors cost, then the types if there is a budget, then the codes.

The bytes wait on disk until the file is written, because the order of the file is not that of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.blocks import LAYOUTS, pack
from srd_modifier.gguf.calibration.budget import candidate_types, measure_candidates, spend_on_types
from srd_modifier.gguf.calibration.damage import Damage
from srd_modifier.gguf.calibration.layers import LayeredModel
from srd_modifier.gguf.calibration.search import quantize_calibrated
from srd_modifier.gguf.calibration.sensitivity import measure_sensitivity
from srd_modifier.gguf.calibration.visit import Moments, visit_in_order
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.gguf.writer import Entry, padded_bytes
from srd_modifier.residual.hessian import Hessian

CROSS_SHARE = 0.6
"""Share of the correction for errors of earlier layers that is applied: 1 would be best on the calibration text, on
other text of tiny-llama 0.5 to 0.7 are, by 10 % of the divergence against 0."""

Report = Callable[[str, int, int], None]


@dataclass
class CalibratedTensors:
    """What calibration made of a model.

    Attributes:
        types: of every tensor, by name.
        mean_squares: mean squared input in the original model by tensor, float32 `[in]` or `[experts, in]`, as an
            imatrix holds it.
        tokens: of the calibration text.
        predicted: the predicted divergence from the original, nats per token.
        folder: where the bytes wait.
        files: by tensor and number of the piece.
    """

    types: dict[str, GGMLType]
    tokens: int
    folder: Path
    predicted: float = 0.0
    mean_squares: dict[str, Tensor] = field(default_factory=dict)
    files: dict[tuple[str, int], Path] = field(default_factory=dict)

    def data(self, tensor: GGUFTensor) -> Iterator[NDArray[np.uint8]] | None:
        """The bytes of a tensor in pieces `[out, row_bytes]`; None for one that was left to the plain encoder."""
        if (tensor.name, 0) not in self.files:
            return None
        return (np.load(self.files[tensor.name, number]) for number in range(len(tensor.pieces)))


def calibrate(
    weights: ModelWeights,
    tensors: Sequence[GGUFTensor],
    types: Mapping[str, GGMLType],
    samples: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_bytes: int | None = None,
    fixed: Sequence[str] = (),
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> CalibratedTensors:
    """Choose types, if there is a budget, and codes.

    Args:
        weights: the model.
        tensors: of the file.
        types: of every tensor.
        samples: token ids of the calibration text.
        folder: an empty directory for the bytes.
        max_bytes: that the data of all tensors may take in the file; `types` are then only for those that have no
            choice.
        fixed: names of tensors that keep their type in any case.
        device: where it is computed.
        report: called with what is going on, and (layers done, layers in all).

    Raises:
        ConfigError: `max_bytes` is too small.
        SRDError: a sample does not fit the model, or the model or a weight has NaN or infinity.
        MissingExtraError: accelerate, or scipy for a budget, is not installed.
    """

    def progress(what: str) -> Callable[[int, int], None] | None:
        return None if report is None else lambda done, total: report(what, done, total)

    model = LayeredModel(weights, tensors, device)
    sensitivity = measure_sensitivity(model, samples, progress=progress("Measuring sensitivity"))
    damage = Damage.of_model(model, sensitivity)
    chosen = dict(types)
    if max_bytes is not None:
        choosable = [
            tensor.name
            for tensor in tensors
            if types[tensor.name] in LAYOUTS and tensor.name not in fixed and _is_watched(model, damage, tensor)
        ]
        damages = measure_candidates(model, samples, choosable, damage, progress("Comparing types"))
        entries = {tensor.name: tensor for tensor in tensors}
        sizes = {
            name: {own: padded_bytes(Entry(name, entries[name].shape, own)) for own in candidates}
            for name, candidates in damages.items()
        }
        rest = sum(padded_bytes(Entry(t.name, t.shape, types[t.name])) for t in tensors if t.name not in damages)
        best, _ = spend_on_types(damages, sizes, max_bytes, rest)
        chosen |= best
    result = CalibratedTensors(chosen, sum(map(len, samples)), folder)
    encoder = _Encoder(model, damage, result)
    visit_in_order(model, samples, encoder.replace, progress("Quantizing"))
    return result


def _is_watched(model: LayeredModel, damage: Damage, tensor: GGUFTensor) -> bool:
    """Whether it is known what this tensor's errors cost, and some candidate fits its rows."""
    outside = {model.places[place][0].tensor.name for place in (model.embedding, model.head)}
    known = tensor.name in outside or any((tensor.name, number) in damage.costs for number in range(len(tensor.pieces)))
    return known and bool(candidate_types(tensor.shape[-1]))


class _Encoder:
    """Quantizes matrix after matrix as they are visited, and puts the bytes away."""

    def __init__(self, model: LayeredModel, damage: Damage, result: CalibratedTensors) -> None:
        self.model = model
        self.damage = damage
        self.result = result
        self.outside = {
            occupants[0].tensor.name: place
            for place, occupants in model.places.items()
            if place in (model.embedding, model.head)
        }
        self.prepared: tuple[Moments, Hessian] | None = None

    def replace(self, tensor: GGUFTensor, number: int, weight: Tensor, moments: Moments | None) -> Tensor | None:
        """Quantize a weight `[out, in]`; gives what the file will stand for."""
        ggml_type = self.result.types[tensor.name]
        self._note_importance(tensor, number, moments)
        if ggml_type not in LAYOUTS:
            return None
        try:
            if moments is not None:
                hessian = self._hessian(moments)
                target = _corrected(weight, moments, hessian)
            elif tensor.name in self.outside:
                hessian = Hessian.prepare(self.damage.moment_outside(self.outside[tensor.name]))
                target = weight
            elif len(tensor.pieces) > 1:
                # an expert that no token reached: all its inputs count alike
                hessian = Hessian.prepare(torch.zeros(weight.shape[1], weight.shape[1], device=weight.device))
                target = weight
            else:
                return None
            blocks = quantize_calibrated(target, ggml_type, hessian)
        except ValueError as error:
            source = tensor.pieces[number].source
            raise CheckpointError(f"{self.model.weights.path_of(source)}: {source}: {error}") from error
        path = self.result.folder / f"{tensor.name}.{number}.npy"
        np.save(path, pack(blocks, ggml_type).cpu().numpy())
        self.result.files[tensor.name, number] = path
        new = blocks.dequantize()
        if moments is not None or tensor.name in self.outside:
            self.result.predicted += self.damage.of(tensor, number, new - weight, hessian)
        return new

    def _hessian(self, moments: Moments) -> Hessian:
        if self.prepared is None or self.prepared[0] is not moments:
            self.prepared = moments, moments.hessian()
        return self.prepared[1]

    def _note_importance(self, tensor: GGUFTensor, number: int, moments: Moments | None) -> None:
        if moments is None:
            return
        squares = moments.original_squares.cpu()
        if len(tensor.pieces) == 1:
            self.result.mean_squares[tensor.name] = squares
        else:
            unreached = torch.ones(len(tensor.pieces), len(squares))
            self.result.mean_squares.setdefault(tensor.name, unreached)[number] = squares


def _corrected(weight: Tensor, moments: Moments, hessian: Hessian) -> Tensor:
    """The weight that gives, for the inputs as they are by now, more nearly what the original gives for its own."""
    if moments.cross is None:
        return weight
    wanted = weight @ (moments.cross - moments.second)
    return weight + CROSS_SHARE * torch.linalg.solve(hessian.regularized, wanted.T).T
