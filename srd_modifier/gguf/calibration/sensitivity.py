"""What an error in a model's outputs costs, measured by one pass forward and one backward, layer by layer.

The mean KL divergence that small errors cause is a quadratic form in them, whose matrix is the Fisher information: the
second moment of the gradients of `-log p(y)` for labels y that are sampled from the model itself. Here the gradient
goes back through one layer at a time, each computed once more from its saved input. In memory are one layer, and what
enters every layer: for the default of 8,192 tokens 32 kB per layer and hidden unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.errors import SRDError
from srd_modifier.gguf.calibration.layers import LayeredModel, Place

SENSITIVITY_TOKENS = 8192

_LOGITS = 2**25  # that are held at once


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What squared errors cost, per token of the text.

    Attributes:
        outputs: by matrix, float32 `[out]`: the mean squared gradient of each output. Where an expert sees few of
            the tokens, the mean is still over all of them.
        embedding: float32 `[hidden, hidden]`, second moment of the gradients of what is looked up in the embedding.
        logits: float32 `[vocabulary]`, the mean squared gradient of each product with the head: of `p (1 - p)`, unless
            a cap comes after it.
        head_inputs: float32 `[hidden, hidden]`, second moment of what the head multiplies.
        frequency: float32 `[vocabulary]`, the share of each token in the text.
        tokens: it was measured on.
    """

    outputs: dict[Place, Tensor]
    embedding: Tensor
    logits: Tensor
    head_inputs: Tensor
    frequency: Tensor
    tokens: int


def measure_sensitivity(
    model: LayeredModel,
    samples: Sequence[Sequence[int]],
    *,
    tokens: int = SENSITIVITY_TOKENS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure what errors cost.

    Where later layers read keys and values of an earlier one (Gemma 4), what they cost there is not counted.

    Args:
        model: the model.
        samples: token ids.
        tokens: samples are taken until there are so many.
        seed: of the labels.
        progress: called with (layers done, layers in all), where a layer counts forward and backward.

    Raises:
        SRDError: there are no samples, one does not fit the model, or the model gives NaN or infinity.
    """
    report = progress or (lambda done, total: None)
    chosen = _first(samples, tokens)
    count = sum(len(sample) for sample in chosen)
    with torch.no_grad():
        entrances = model.enter(chosen)
        hidden = [[entrance.hidden] for entrance in entrances]
        for number in range(model.layers):
            report(number, 2 * model.layers)
            layer = model.load_layer(number)
            for states, entrance in zip(hidden, entrances, strict=True):
                states.append(entrance.calls[number](layer, states[-1]))
            model.unload(layer)
        if not all(bool(torch.isfinite(states[-1]).all()) for states in hidden):
            raise SRDError(f"{model.weights.directory}: the model gives NaN or infinity")
    gradients, logits, head_inputs = _at_the_head(model, [states.pop() for states in hidden], seed)
    outputs: dict[Place, Tensor] = {}
    for number in reversed(range(model.layers)):
        report(2 * model.layers - 1 - number, 2 * model.layers)
        layer = model.load_layer(number)

        def add(place: Place, gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            squares = rows.square().sum(dim=0)
            outputs[place] = outputs[place] + squares if place in outputs else squares

        def seen(place: Place, inputs: Tensor, result: Tensor | None) -> None:
            if result is not None and result.requires_grad:
                result.register_hook(lambda gradient: add(place, gradient))

        for i, entrance in enumerate(entrances):
            with torch.enable_grad():
                entering = hidden[i].pop().detach().requires_grad_(True)
                with model.watch(model.path(number), layer, seen):
                    leaving = entrance.calls[number](layer, entering)
                (gradients[i],) = torch.autograd.grad(leaving, entering, gradients[i])
        model.unload(layer)
    report(2 * model.layers, 2 * model.layers)
    embedding = sum((_second_moment(gradient) for gradient in gradients), torch.zeros_like(head_inputs))
    ids = torch.cat([entrance.ids.flatten() for entrance in entrances])
    return Sensitivity(
        outputs={place: squares / count for place, squares in outputs.items()},
        embedding=embedding * (model.embedding_scale**2 / count),
        logits=logits / count,
        head_inputs=head_inputs / count,
        frequency=torch.bincount(ids, minlength=len(logits)).float() / count,
        tokens=count,
    )


def _at_the_head(model: LayeredModel, hidden: list[Tensor], seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the last layer's outputs, and sums over tokens: of `p (1 - p)`, and of `x x^T` for the head's x."""
    norm = model.load_norm()
    head = model.read_head()
    generator = torch.Generator().manual_seed(seed)
    logits_sum = torch.zeros(len(head), device=model.device)
    inputs_sum = torch.zeros(head.shape[1], head.shape[1], device=model.device)
    gradients = []
    for states in hidden:
        with torch.enable_grad():
            leaving = states.detach().requires_grad_(True)
            normed = norm(leaving)
        at_norm = torch.empty_like(normed)
        flat, flat_gradient = normed.detach().flatten(0, -2), at_norm.view(-1, at_norm.shape[-1])
        inputs_sum += flat.T @ flat
        for rows in torch.arange(len(flat)).split(max(1, _LOGITS // len(head))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with torch.enable_grad():
                inputs = flat[part].requires_grad_(True)
                logits = model.logits(inputs, head)
            probabilities = logits.detach().softmax(dim=-1)
            slope = model.slope(logits.detach())
            logits_sum += (probabilities * (1 - probabilities) * slope**2).sum(dim=0)
            uniform = torch.rand(len(probabilities), 1, generator=generator).to(model.device)
            labels = torch.searchsorted(probabilities.cumsum(dim=-1), uniform).clamp_(max=len(head) - 1)
            # of -log p(label) by the logits
            probabilities.scatter_add_(1, labels, torch.full_like(uniform, -1.0))
            (flat_gradient[part],) = torch.autograd.grad(logits, inputs, probabilities)
        (gradient,) = torch.autograd.grad(normed, leaving, at_norm)
        gradients.append(gradient)
    return gradients, logits_sum, inputs_sum


def _second_moment(gradient: Tensor) -> Tensor:
    rows = gradient.reshape(-1, gradient.shape[-1])
    return rows.T @ rows


def _first(samples: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    chosen: list[Sequence[int]] = []
    for sample in samples:
        if sum(map(len, chosen)) >= tokens:
            break
        chosen.append(sample)
    return chosen
