"""What calibration shows of the modules' inputs: their mean squares, or their whole second moments.

One batch's sum is float32, and the sum of these float64: 29 more bits, so that the mean, which is float32 again, does
not depend on the order of the batches, nor on the processes that they were divided among.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.distributed import Ranks
from srd_modifier.errors import RecipeError
from srd_modifier.residual.hessian import Hessian

# rows of a second moment that are summed at a time: what a batch adds to them stays in the cache
_BLOCK_ROWS = 256


@dataclass
class _Moment:
    """Sum over tokens: of `x x^T`, `[in, in]` of which the upper triangle counts, or of `x^2`, `[in]`; float64."""

    total: Tensor
    tokens: int
    hessian: Hessian | None = None

    @classmethod
    def empty(cls, size: int, device: torch.device, *, second_moments: bool) -> "_Moment":
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which that device does not have
        return cls(torch.zeros((size, size) if second_moments else (size,), dtype=dtype, device=device), 0)

    def add(self, rows: Tensor) -> None:
        """Add the inputs of some tokens: float32 `[tokens, in]`."""
        self.tokens += len(rows)
        if self.total.dim() == 1:
            self.total.add_(rows.square().sum(dim=0))
            return
        for start in range(0, rows.shape[1], _BLOCK_ROWS):
            left, right = rows[:, start : start + _BLOCK_ROWS], rows[:, start:]
            added = torch.zeros(left.shape[1], right.shape[1], device=rows.device).addmm_(left.T, right)
            self.total[start : start + _BLOCK_ROWS, start:].add_(added)

    def square_sums(self) -> Tensor:
        """Sum of `x^2`: float64 `[in]`."""
        return self.total.diagonal() if self.total.dim() == 2 else self.total

    def mean_square(self) -> Tensor:
        return (self.square_sums() / self.tokens).float()

    def mean(self) -> Tensor:
        """The second moment, float32 `[in, in]`."""
        upper = (self.total / max(self.tokens, 1)).float().triu_()
        return upper.add_(upper.triu(1).T)


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
        """Add a module's inputs `[..., in_features]` of one batch.

        Raises:
            RecipeError: the module shared its input with another one before, and does not now.
        """
        owner = self._owner(name, inputs)
        if self._owners.setdefault(name, owner) != owner:
            raise _another_input(name, self._owners[name])
        if owner != name:
            self._moments[name] = self._moments[owner]
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        moment = self._moments.get(name)
        if moment is None:
            moment = _Moment.empty(rows.shape[-1], rows.device, second_moments=self.second_moments)
            self._moments[name] = moment
        moment.add(rows)

    def shared(self, names: Iterable[str], ranks: Ranks) -> dict[str, list[str]]:
        """The modules by the input that they read: those that share a second moment under the first one's name.

        Args:
            names: of the modules; those that saw no input, in any process, are alone.
            ranks: the processes, which may have seen inputs of different modules.

        Raises:
            RecipeError: modules shared an input in one process and not in another.
        """
        names = list(names)
        owners: dict[str, str] = {}
        for part in ranks.gather({name: self._owners[name] for name in names if name in self._owners}):
            for name, owner in part.items():
                if owners.setdefault(name, owner) != owner:
                    raise _another_input(name, owner if owners[name] == name else owners[name])
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(owners.get(name, name), []).append(name)
        return groups

    @torch.no_grad()
    def gather(
        self, groups: dict[str, list[str]], ranks: Ranks, *, owner: Callable[[str], int], device: torch.device
    ) -> None:
        """Add up what the processes have seen of some modules.

        Every process has the mean squares afterwards, and one of them, which will quantize the modules, the second
        moment.

        Args:
            groups: the modules, as `shared` gives them.
            ranks: the processes.
            owner: the process that gets the second moment of a group.
            device: for the sums of modules that only other processes have seen.
        """
        if ranks.size == 1:
            return
        mine = {name: self._moments[members[0]] for name, members in groups.items() if members[0] in self._moments}
        seen = ranks.gather({name: (len(moment.total), moment.tokens) for name, moment in mine.items()})
        for name, members in groups.items():
            found = [part[name] for part in seen if name in part]
            if not found:
                continue  # no token came by, in any process
            moment = mine.get(name) or _Moment.empty(found[0][0], device, second_moments=self.second_moments)
            if any(other is moment for key, other in self._moments.items() if key not in members):
                # another quantizer's modules share it, whose turn comes later
                moment = _Moment(moment.total.clone(), 0)
            moment.tokens = sum(tokens for _, tokens in found)
            squares = moment.square_sums().clone()
            ranks.sum(squares)
            if self.second_moments:
                ranks.sum(moment.total, owner=owner(name))
            for member in members:
                if moment.tokens:
                    self._released[member] = (squares / moment.tokens).float().cpu()
                if self.second_moments and owner(name) == ranks.rank:
                    self._moments[member] = moment
                else:
                    self._moments.pop(member, None)

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
            moment.hessian = Hessian.prepare(moment.mean().to(device))
        return moment.hessian

    def release(self, name: str) -> None:
        """Keep no more than the mean square of a module that is quantized."""
        square = self.mean_square(name)
        if square is not None:
            self._released[name] = square.cpu()
        self._moments.pop(name, None)

    def restore(self, name: str, mean_square: Tensor) -> None:
        """Take the mean square of a module that was quantized before: float32 `[in]`."""
        self._released[name] = mean_square

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


def _another_input(name: str, owner: str) -> RecipeError:
    return RecipeError(
        f"{name} reads the input of {owner} in one calibration batch and another one in the next; "
        "error feedback cannot follow that, choose rounding: nearest"
    )
