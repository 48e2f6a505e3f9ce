"""What every export asks of a trained model: that it is finished, and on its grids."""

import torch
from torch import Tensor, nn

from srd_modifier.errors import SRDError
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.linear import fake_quantized_modules


def refuse_unfinished(model: nn.Module) -> None:
    """Raise SRDError if a module of the model is still fake-quantized."""
    unfinished = fake_quantized_modules(model)
    if unfinished:
        raise SRDError(f"{next(iter(unfinished))} is still fake-quantized; call finish(model) before exporting it")


def weight_of(model: nn.Module, module: str) -> Tensor:
    """The weight of a module, float32 on the CPU.

    Raises:
        SRDError: there is no such module.
    """
    found = dict(model.named_modules()).get(module)
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor):
        raise SRDError(f"the model has no module {module} with a weight, of which there is a grid")
    return weight.detach().float().cpu()


def exact_levels(module: str, weight: Tensor, grid: Grid) -> Tensor:
    """The levels of a weight that lies on its grid, int8 `[out, in]`.

    Raises:
        SRDError: it does not.
    """
    levels = grid.levels(weight).to(torch.int8)
    if not torch.equal(grid.values(levels), weight):
        raise SRDError(
            f"{module}.weight is not on the grid that it is exported to; call finish(model) first, and keep it in "
            "float32 until it is exported"
        )
    return levels
