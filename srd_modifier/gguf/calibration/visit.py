"""Every matrix of a model with its inputs, in the order in which they are used.

Every calibration sample runs through the model twice: as it is, and as it becomes while one weight after the other is
replaced. Within a layer, those that read the same input are visited together, so that each sees inputs from weights
that are already replaced (GPTQ, Frantar et al. 2022, in its "true sequential" order). The inputs of the original model
are there to compare with (GPTAQ, Li et al. 2025, arXiv:2504.02692).

In memory are one layer (twice), the hidden states of all samples (twice), the inputs of its matrices in bfloat16
and the moments of one stage.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from srd_modifier.errors import SRDError
from srd_modifier.gguf.calibration.layers import Call, LayeredModel, Occupant, Place
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.residual.hessian import DAMPING, SHRINKAGE, Hessian

PRIOR = 1 / 3
"""Tokens per input column for which it is taken that inputs do not go together, beside those that were seen. Where
there are few tokens for many columns, as for rare experts and in down projections, feedback would else follow what
these few happen to have in common: on tiny-llama, 2,048 tokens of other text give 17 % less divergence for it, and
16,384 tokens 2 % less."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a matrix's inputs x, and of the inputs y that the original model gives it.

    Attributes:
        second: float32 `[in, in]`, the mean of `x x^T` over tokens.
        cross: float32 `[in, in]`, the mean of `y x^T`; None where it was not taken.
        original_squares: float32 `[in]`, the mean of `y^2`; where it was not taken, of `x^2`.
        tokens: how many inputs there were.
    """

    second: Tensor
    cross: Tensor | None
    original_squares: Tensor
    tokens: int

    def hessian(self) -> Hessian:
        """The second moment, prepared for rounding; see `PRIOR`."""
        prior = PRIOR * len(self.second) / self.tokens / 2
        return Hessian.prepare(self.second, shrinkage=SHRINKAGE + prior, damping=DAMPING + prior)


Replace = Callable[[GGUFTensor, int, Tensor, Moments | None], Tensor | None]
"""Called for each matrix with the tensor of the file, the number of its piece, the weight float32 `[out, in]` in GGUF
order, and the moments of its inputs: one object for matrices that share them, None for an embedding and where no token
came by. It gives the weight to go on with, in the same order, or None to leave it as it is. What it gives may be
written to the weight that it was called with, which is good during the call only."""

Progress = Callable[[int, int], None]


@torch.no_grad()
def visit_in_order(
    model: LayeredModel, samples: Sequence[Sequence[int]], replace: Replace, progress: Progress | None = None
) -> None:
    """Visit the embedding, the layers' matrices in the order of use, and a head of its own, replacing each.

    Args:
        model: the model.
        samples: token ids.
        replace: what becomes of each matrix.
        progress: called with (layers done, layers in all).

    Raises:
        SRDError: there are no samples, one does not fit the model, or the model gives NaN or infinity.
    """
    batches = [_Batch(hidden, hidden, calls, calls) for _, hidden, calls in model.enter(samples)]

    def replace_outside(decoder: nn.Module) -> None:
        for place, occupants in model.places.items():
            if ".layers." not in place.parameter and place.parameter.startswith("model."):
                parameter = decoder.get_parameter(place.parameter.removeprefix("model."))
                _offer(parameter, occupants, None, replace)

    for batch, (_, hidden, calls) in zip(batches, model.enter(samples, replace_outside), strict=True):
        # arguments of their own as well: layers may leave keys and values in them for later ones
        batch.current, batch.current_calls = hidden, calls
    for number in range(model.layers):
        if progress is not None:
            progress(number, model.layers)
        _visit_layer(model, number, batches, replace)
    if model.head != model.embedding:
        norm = model.load_norm()
        total: _Sum | None = None
        for batch in batches:
            total = _add(total, norm(batch.current), norm(batch.original))
        assert total is not None
        (occupant,) = model.places[model.head]
        replace(occupant.tensor, occupant.number, model.read_head(), total.moments())
    if progress is not None:
        progress(model.layers, model.layers)


@torch.no_grad()
def visit_unchanged(
    model: LayeredModel, samples: Sequence[Sequence[int]], look: Replace, progress: Progress | None = None
) -> None:
    """Show `look` every matrix with its inputs in the model as it is, without `cross`; what it gives is ignored.

    Arguments and errors as in `visit_in_order`; the embedding is not shown.
    """
    batches = [_Batch(hidden, hidden, calls, calls) for _, hidden, calls in model.enter(samples)]
    for number in range(model.layers):
        if progress is not None:
            progress(number, model.layers)
        layer = model.load_layer(number)
        path = model.path(number)
        places = model.places_in(path)
        sums: dict[Place, _Sum] = {}
        for batch in batches:
            inputs: dict[Place, Tensor] = {}
            with model.watch(path, layer, partial(_keep, inputs)):
                batch.current = batch.calls[number](layer, batch.current)
            _refuse_infinity(model, number, batch.current)
            _sum_up(sums, inputs, {})
        for place, occupants in places.items():
            moments = sums[place].moments() if place in sums else None
            for tensor, piece, index in occupants:
                rows = tensor.pieces[piece].rows
                weight = layer.get_parameter(place.parameter.removeprefix(f"{path}."))[index]
                look(tensor, piece, weight if rows is None else weight[rows.to(weight.device)], moments)
        model.unload(layer)


@dataclass
class _Batch:
    """Samples of one length, on their way through the layers of both models; hidden states and calls of each."""

    original: Tensor
    current: Tensor
    calls: list[Call]
    current_calls: list[Call]


@dataclass
class _Sum:
    second: Tensor
    cross: Tensor | None
    original_squares: Tensor
    tokens: int = 0
    mean: Moments | None = None

    def moments(self) -> Moments:
        """The means, one object for all matrices that share them; in the place of the sums, which are done with."""
        if self.mean is None:
            second = self.second.div_(self.tokens)
            if self.cross is None:
                self.mean = Moments(second, None, second.diagonal(), self.tokens)
            else:
                squares = self.original_squares.div_(self.tokens)
                self.mean = Moments(second, self.cross.div_(self.tokens), squares, self.tokens)
        return self.mean


class _Enough(Exception):  # noqa: N818, no error: all that was wanted has been seen
    pass


def _visit_layer(model: LayeredModel, number: int, batches: list[_Batch], replace: Replace) -> None:
    layer = model.load_layer(number)
    current = copy.deepcopy(layer)
    path = model.path(number)
    places = model.places_in(path)
    originals = [_run_original(model, layer, number, batch) for batch in batches]
    model.unload(layer)
    stages = _stages(model, current, path, batches[0].current, batches[0].current_calls[number])
    # a matrix that is used in another way than in a product is replaced without moments
    used = {name for stage in stages for name in stage}
    stages.append(list(dict.fromkeys(place.parameter for place in places if place.parameter not in used)))
    for stage in stages:
        sums: dict[Place, _Sum] = {}
        for batch, original in zip(batches, originals, strict=True):
            inputs = _inputs(model, current, path, stage, batch.current, batch.current_calls[number])
            _sum_up(sums, inputs, original)
        for place, occupants in places.items():
            if place.parameter in stage:
                parameter = current.get_parameter(place.parameter.removeprefix(f"{path}."))
                _offer(parameter, occupants, sums[place].moments() if place in sums else None, replace)
    for batch in batches:
        batch.current = batch.current_calls[number](current, batch.current)


def _run_original(model: LayeredModel, layer: nn.Module, number: int, batch: _Batch) -> dict[Place, Tensor]:
    """Bring a batch through a layer of the original model, and keep what its matrices see."""
    found: dict[Place, Tensor] = {}
    halves: dict[int, Tensor] = {}

    def seen(place: Place, inputs: Tensor, outputs: Tensor | None) -> None:
        # experts choose their tokens, so that the two models do not see the same ones
        if outputs is None and place.expert is None:
            # bfloat16 for all tokens at once: its rounding averages out in the sums
            if id(inputs) not in halves:
                halves[id(inputs)] = inputs.bfloat16()
                kept.append(inputs)
            found[place] = halves[id(inputs)]

    kept: list[Tensor] = []  # or the id of an input that is gone could be another's
    with model.watch(model.path(number), layer, seen):
        batch.original = batch.calls[number](layer, batch.original)
    _refuse_infinity(model, number, batch.original)
    return found


def _keep(found: dict[Place, Tensor], place: Place, inputs: Tensor, outputs: Tensor | None) -> None:
    found[place] = inputs


def _refuse_infinity(model: LayeredModel, number: int, hidden: Tensor) -> None:
    if not bool(torch.isfinite(hidden).all()):
        raise SRDError(f"{model.weights.directory}: the model gives NaN or infinity in layer {number}")


def _offer(parameter: Tensor, occupants: Sequence[Occupant], moments: Moments | None, replace: Replace) -> None:
    for tensor, number, index in occupants:
        piece = tensor.pieces[number]
        matrix = parameter[index]
        weight = matrix if piece.rows is None else matrix[piece.rows.to(matrix.device)]
        new = replace(tensor, number, weight, moments)
        if new is not None:
            matrix.copy_(piece.to_hugging_face(new.to(matrix.device)))


def _stages(model: LayeredModel, layer: nn.Module, path: str, hidden: Tensor, call: Call) -> list[list[str]]:
    """The layer's parameters in the order of use, those with the same input together."""
    stages: list[list[str]] = []
    latest: Tensor | None = None

    def seen(place: Place, inputs: Tensor, outputs: Tensor | None) -> None:
        nonlocal latest
        if outputs is None and not any(place.parameter in stage for stage in stages):
            if latest is not inputs:
                stages.append([])
            stages[-1].append(place.parameter)
        latest = inputs

    with model.watch(path, layer, seen):
        call(layer, hidden)
    return stages


def _inputs(
    model: LayeredModel, layer: nn.Module, path: str, stage: list[str], hidden: Tensor, call: Call
) -> dict[Place, Tensor]:
    """The inputs of a stage's matrices; the layer is computed no further than it takes."""
    found: dict[Place, Tensor] = {}
    # which experts are used is known only when all of them are through
    countable = all(place.expert is None for place in model.places_in(path) if place.parameter in stage)

    def seen(place: Place, inputs: Tensor, outputs: Tensor | None) -> None:
        if place.parameter in stage:
            found[place] = inputs
            if countable and len(found) == len(stage):
                raise _Enough

    if stage:
        with model.watch(path, layer, seen), suppress(_Enough):
            call(layer, hidden)
    return found


def _sum_up(sums: dict[Place, _Sum], inputs: dict[Place, Tensor], originals: dict[Place, Tensor]) -> None:
    """Add a batch's inputs; matrices with the same input share one sum."""
    shared: dict[int, _Sum] = {}
    for place, rows in inputs.items():
        if id(rows) not in shared:
            shared[id(rows)] = _add(sums.get(place), rows, originals.get(place))
        sums[place] = shared[id(rows)]


def _add(total: _Sum | None, inputs: Tensor, original: Tensor | None) -> _Sum:
    rows = inputs.reshape(-1, inputs.shape[-1])
    if total is None:
        second = torch.zeros(rows.shape[-1], rows.shape[-1], device=rows.device)
        cross = None if original is None else torch.zeros_like(second)
        total = _Sum(second, cross, torch.zeros(rows.shape[-1], device=rows.device))
    total.second.addmm_(rows.T, rows)
    if original is not None and total.cross is not None:
        original_rows = original.reshape(-1, original.shape[-1]).float()
        total.cross.addmm_(original_rows.T, rows)
        total.original_squares.add_(original_rows.square().sum(dim=0))
    total.tokens += len(rows)
    return total
