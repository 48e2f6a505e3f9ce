"""What the error of a matrix does to the model: its predicted share of the mean KL divergence, in nats per token.

An error E costs `1/2 sum_r g_r (E H E^T)_rr`, with H the second moment of the inputs and g the mean squared gradient
of the outputs. An embedding is looked up: its row for a token costs `1/2 f e F e^T`, with f the token's frequency and
F the second moment of the gradients of what was looked up. One that serves as the head too pays both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.gguf.calibration.layers import LayeredModel, Place
from srd_modifier.gguf.calibration.sensitivity import Sensitivity
from srd_modifier.gguf.families import GGUFTensor
from srd_modifier.residual.hessian import Hessian


@dataclass(frozen=True, eq=False)
class Damage:
    """The cost of errors in a model's matrices.

    Attributes:
        sensitivity: of the model.
        embedding: place of the embedding.
        head: place of the matrix that gives the logits, the embedding's if it serves as both.
        costs: by tensor and number of the piece, what a squared error of each output costs, float32 `[out]` in the
            order of the GGUF tensor.
    """

    sensitivity: Sensitivity
    embedding: Place
    head: Place
    costs: dict[tuple[str, int], Tensor]

    @classmethod
    def of_model(cls, model: LayeredModel, sensitivity: Sensitivity) -> "Damage":
        """The costs of every matrix that the sensitivity covers."""
        costs = {}
        for place, occupants in model.places.items():
            for tensor, number, part in occupants if place in sensitivity.outputs else ():
                own = sensitivity.outputs[place][part if place.expert is None else part[1:]]
                rows = tensor.pieces[number].rows
                costs[tensor.name, number] = own if rows is None else own[rows.to(own.device)]
        return cls(sensitivity, model.embedding, model.head, costs)

    def moment_outside(self, place: Place) -> Tensor:
        """What stands for the second moment of the inputs of the embedding, or of the head: `[hidden, hidden]`.

        In one that serves as both, an error costs as an input and as an output. Frequent tokens are mostly those
        that are often predicted, so that one mixture does for all rows.
        """
        found = self.sensitivity
        if place != self.embedding:
            return found.head_inputs
        return found.embedding + found.head_inputs * found.logits.sum() if place == self.head else found.embedding

    def of(self, tensor: GGUFTensor, number: int, error: Tensor, hessian: Hessian) -> float:
        """The cost of an error `[out, in]`, in the order of the GGUF tensor.

        Args:
            tensor: of the file.
            number: of its piece.
            error: dequantized minus original weight.
            hessian: of the inputs; not used outside the layers, where the sensitivity has what it takes.
        """
        found = self.sensitivity
        total = torch.zeros((), device=error.device)
        if tensor.name == "token_embd.weight":
            total = total + ((error @ found.embedding) * error).sum(dim=1) @ found.frequency
        if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and self.head == self.embedding):
            total = total + ((error @ found.head_inputs) * error).sum(dim=1) @ found.logits
        cost = self.costs.get((tensor.name, number))
        if cost is not None:
            total = total + hessian.quadratic(error) @ cost
        return 0.5 * float(total)
