"""Residuals that wait on the disk: until the budget has chosen one of several per module, or until they are sent."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from srd_modifier.checkpoint.atomic import flush
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.checkpoint.writer import ResidualEntry
from srd_modifier.errors import CheckpointError
from srd_modifier.evaluation.digest import file_digest
from srd_modifier.residual import EncodedResidual, ResidualFormat

DEFAULT_CANDIDATES: tuple[ResidualFormat, ...] = (
    *(ResidualFormat(bits=bits, group_size=128, rounding="feedback") for bits in (1, 2, 3, 4)),
    *(ResidualFormat(bits=bits, group_size=64, rounding="feedback") for bits in (4, 5, 6, 8)),
    ResidualFormat(bits=4, group_size=128, density=0.125, rounding="feedback"),
)
"""What a budget chooses from. A narrow code earns its scale better in wide groups: at 2 bits everywhere, groups of 128
instead of 64 raise the divergence by 3 to 13 % and save an eighth of a bit per weight, for which a budget between 5 and
5.5 bits has 14 % less (tiny-llama)."""


@dataclass(frozen=True)
class StoredCandidate:
    """One way to store a module's residual, and what it leaves of the damage."""

    format: ResidualFormat
    sensitivity: ModuleSensitivity


def file_of(directory: Path, module: str) -> Path:
    """The file of a module in a directory; a module's name may be no file's."""
    return directory / f"{hashlib.sha256(module.encode()).hexdigest()[:32]}.safetensors"


class ResidualSpool:
    """Encoded residuals, one or more of each module, in a file per module.

    Args:
        directory: an existing one, for nothing else.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, module: str, encoded: Sequence[EncodedResidual]) -> None:
        """Store the residuals of a module.

        Raises:
            CheckpointError: the disk is full.
        """
        tensors = {
            f"{i}.{suffix}": tensor.cpu().contiguous()
            for i, one in enumerate(encoded)
            for suffix, tensor in one.tensors().items()
        }
        try:
            save_file(tensors, self._path(module))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the residual of {module} to {self._directory}: {error}") from error

    def get(self, module: str, number: int, suffixes: Iterable[str]) -> EncodedResidual:
        """One residual of a module, whose tensors have these suffixes."""
        with safe_open(self._path(module), framework="pt") as file:
            return EncodedResidual(*(file.get_tensor(f"{number}.{suffix}") for suffix in suffixes))

    def _path(self, module: str) -> Path:
        return file_of(self._directory, module)


class CandidateStore(ResidualSpool):
    """The candidates of every module, and what each of them leaves of the damage.

    Args:
        directory: an existing one, for nothing else.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.candidates: dict[str, list[StoredCandidate]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}

    def write(
        self,
        module: str,
        shape: tuple[int, int],
        candidates: Sequence[StoredCandidate],
        encoded: Sequence[EncodedResidual],
    ) -> None:
        """Store the candidates of a module whose weight is `[out, in]`.

        Raises:
            CheckpointError: the disk is full.
        """
        self.candidates[module] = list(candidates)
        self.shapes[module] = shape
        self.put(module, encoded)

    def digest(self, module: str) -> str:
        """SHA-256 of a module's file, which is on the disk then."""
        flush(self._path(module))
        return file_digest(self._path(module))

    def restore(self, module: str, shape: tuple[int, int], candidates: Sequence[StoredCandidate], digest: str) -> bool:
        """Take a module as stored, if its file has this digest; False if it has another, or is missing."""
        path = self._path(module)
        if not path.is_file() or file_digest(path) != digest:
            return False
        self.candidates[module] = list(candidates)
        self.shapes[module] = shape
        return True

    def read(self, module: str, number: int) -> EncodedResidual:
        """One candidate of a module."""
        return self.get(module, number, self.entry(module, number).layout())

    def entry(self, module: str, number: int) -> ResidualEntry:
        """Shape and format of one candidate."""
        return ResidualEntry(*self.shapes[module], self.candidates[module][number].format)
