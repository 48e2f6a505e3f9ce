"""What calibration shows of the modules' inputs: their mean squares, or their whole second moments."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.errors import RecipeError
from srd_modifier.residual.hessian import Hessian


@dataclass
class _Moment:
    """Sum over tokens: of `x x^T`, float32 `[in, in]`, or of `x^2`, float32 `[in]`."""

    total: Tensor
    tokens: int
    hessian: Hessian | None = None

    def mean_square(self) -> Tensor:
        total = self.total.diagonal() if self.total.dim() == 2 else self.total
        return total / self.tokens


class CalibrationInputs:
    """Sums over the calibration inputs of modules, by the modules' names.

    Modules that read the very same tensor (q, k and v; gate and up) share one second moment, which is the larger part
    of the work and of the memory.

    Args:
        second_moments: sum `x x^T` instead of `x^2`.
    """

    def __init__(self, *, second_moments: bool = False) -> None:
        self.second_moments = second_moments
        self._moments: dict[str, _Moment] = {}
        self._owners: dict[str, str] = {}
        self._released: dict[str, Tensor] = {}
        self._latest: tuple[weakref.ref[Tensor], int, str] | None = None

    @torch.no_grad()
    def add(self, name: str, inputs: Tensor) -> None:
        """Add a module's inputs `[..., in_features]`.

        Raises:
            RecipeError: the module shared its input with another one before, and does not now.
        """
        owner = self._owner(name, inputs)
        if self._owners.setdefault(name, owner) != owner:
            raise RecipeError(
                f"{name} reads the input of {self._owners[name]} in one calibration batch and another one in the next; "
                "error feedback cannot follow that, choose rounding: nearest"
            )
        if owner != name:
            self._moments[name] = self._moments[owner]
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        moment = self._moments.get(name)
        if moment is None:
            size = rows.shape[-1]
            shape = (size, size) if self.second_moments else (size,)
            moment = self._moments[name] = _Moment(torch.zeros(shape, device=rows.device), 0)
        if self.second_moments:
            moment.total.addmm_(rows.T, rows)
        else:
            moment.total.add_(rows.square().sum(dim=0))
        moment.tokens += len(rows)

    def mean_square(self, name: str) -> Tensor | None:
        """Mean squared input, float32 `[in]`; None if the module saw none."""
        if name in self._released:
            return self._released[name]
        moment = self._moments.get(name)
        return None if moment is None or moment.tokens == 0 else moment.mean_square()

    def hessian(self, name: str, device: torch.device) -> Hessian | None:
        """The module's second moment, prepared for feedback; None if it saw no input or moments were not summed.

        Raises:
            ValueError: the inputs were not finite.
        """
        moment = self._moments.get(name)
        if moment is None or moment.total.dim() != 2:
            return None
        if moment.hessian is None:
            moment.hessian = Hessian.prepare(moment.total.to(device) / max(moment.tokens, 1))
        return moment.hessian

    def release(self, name: str) -> None:
        """Keep no more than the mean square of a module that is quantized."""
        square = self.mean_square(name)
        if square is not None:
            self._released[name] = square.cpu()
        self._moments.pop(name, None)

    def mean_squares(self) -> dict[str, Tensor]:
        """The mean squared input of every module that saw one: float32 `[in]` on the CPU."""
        names = [*self._released, *(name for name in self._moments if name not in self._released)]
        return {name: square.cpu() for name in names if (square := self.mean_square(name)) is not None}

    def _owner(self, name: str, inputs: Tensor) -> str:
        """The first of the modules that read this very tensor one after the other."""
        if self._latest is not None:
            tensor, version, owner = self._latest
            if tensor() is inputs and version == inputs._version and owner != name and owner in self._moments:
                return owner
        self._latest = (weakref.ref(inputs), inputs._version, name)
        return name
