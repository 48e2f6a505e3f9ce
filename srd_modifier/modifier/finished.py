"""What a calibration has finished, on the disk, so that a killed one can be resumed.

What a layer is calibrated on comes out of the layers before it. A resumed calibration therefore runs the data through
the finished layers once more, with their quantized weights put back bit for bit; it sums no inputs there, and
quantizes and encodes nothing.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srd_modifier.checkpoint.atomic import flush
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.checkpoint.writer import tensor_bytes
from srd_modifier.errors import CheckpointError
from srd_modifier.evaluation.digest import file_digest
from srd_modifier.modifier.candidates import file_of
from srd_modifier.resuming.journal import another
from srd_modifier.resuming.workplace import Workplace
from srd_modifier.selection.sensitivity import OutputSensitivity

# steps that are no modules, whose names have no spaces
_DATA = "calibration data"
_SENSITIVITY = "output sensitivity"
_BASE = "base"
_MEAN_SQUARE = "mean_square"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedStep:
    """A line of the journal.

    Attributes:
        step: the first of the modules that were quantized together, or what else was done.
        digest: SHA-256 of its file and of the details, or of the data.
        details: of the modules, by name: the fields of `FinishedModule` that are no tensors.
    """

    step: str
    digest: str
    details: dict[str, Any]

    @classmethod
    def parse(cls, line: Any) -> "FinishedStep":
        """A line as it was written.

        Raises:
            TypeError: it is something else.
        """
        step = cls(**line)
        if not isinstance(step.step, str) or not isinstance(step.digest, str) or not isinstance(step.details, dict):
            raise TypeError
        return step


@dataclass
class FinishedModule:
    """What calibration made of one module.

    Attributes:
        base: its quantized weight (`base_state`).
        mean_square: of its inputs, float32 `[in_features]`; None if it saw none.
        encoded: whether what was lost in it was looked at.
        residual: SHA-256 of what was stored of its residual, by part.
        base_digests: SHA-256 of the base tensors that the residual was taken against, by name.
        damage: predicted, if it was.
        candidates: the damages that are left by the formats that a budget chooses from.
    """

    base: dict[str, Tensor]
    mean_square: Tensor | None = None
    encoded: bool = False
    residual: dict[str, str] = field(default_factory=dict)
    base_digests: dict[str, str] = field(default_factory=dict)
    damage: ModuleSensitivity | None = None
    candidates: list[ModuleSensitivity] = field(default_factory=list)

    def details(self) -> dict[str, Any]:
        """All but the tensors, as JSON has it."""
        return {
            "encoded": self.encoded,
            "residual": self.residual,
            "base_digests": self.base_digests,
            "damage": None if self.damage is None else self.damage.to_dict(),
            "candidates": [damage.to_dict() for damage in self.candidates],
        }

    @classmethod
    def restored(cls, details: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "FinishedModule":
        """The module from its details and from its tensors, by name in the file."""
        damage = details["damage"]
        return cls(
            base={name.removeprefix(f"{_BASE}."): tensor for name, tensor in tensors.items() if name != _MEAN_SQUARE},
            mean_square=tensors.get(_MEAN_SQUARE),
            encoded=details["encoded"],
            residual=details["residual"],
            base_digests=details["base_digests"],
            damage=None if damage is None else ModuleSensitivity.from_dict(damage),
            candidates=[ModuleSensitivity.from_dict(candidate) for candidate in details["candidates"]],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name in the file."""
        tensors = {f"{_BASE}.{name}": tensor for name, tensor in self.base.items()}
        return tensors if self.mean_square is None else tensors | {_MEAN_SQUARE: self.mean_square}


class FinishedSteps:
    """The finished steps of one calibration: a file for each, and a line of the journal.

    Args:
        place: where the quantization lies until it is whole.
    """

    def __init__(self, place: Workplace[FinishedStep]) -> None:
        self.directory = place.directory
        self._files = place.directory / "calibrated"
        self._journal = place.journal
        self._done = {step.step: step for step in place.done}
        self._kept: set[str] = set()
        self._step_of: dict[str, str] = {}
        self._checked = self._found = False

    def check_data(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Note what is calibrated on, or compare it; once.

        Raises:
            CheckpointError: it was other data.
        """
        if self._checked:
            return
        self._checked = True
        digest = hashlib.sha256()
        for batch in batches:
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor))
        found = self._done.get(_DATA)
        if found is None:
            self._note(FinishedStep(_DATA, digest.hexdigest(), {}))
        elif found.digest != digest.hexdigest():
            raise another(self.directory, "set of calibration data")

    def sensitivity(self) -> OutputSensitivity | None:
        """What was measured before the calibration, if it was."""
        step = self._done.get(_SENSITIVITY)
        if step is None or not self._is_intact(step):
            return None
        return OutputSensitivity(self._tensors(_SENSITIVITY), step.details["tokens"], step.details["method"])

    def keep_sensitivity(self, output: OutputSensitivity) -> None:
        """Put what was measured on the disk."""
        details = {"tokens": output.tokens, "method": output.method}
        self._keep(_SENSITIVITY, output.values, details)

    def find(self, holds: Callable[[str, FinishedModule], bool]) -> None:
        """Find the steps that are on the disk as they were written, once; the others are done again.

        Args:
            holds: whether the disk holds what was stored of the residual of a module, which comes without its tensors.
        """
        if self._found:
            return
        self._found = True
        for step in self._done.values():
            if step.step in (_DATA, _SENSITIVITY):
                continue
            if self._is_intact(step) and all(
                holds(name, FinishedModule.restored(details, {})) for name, details in step.details.items()
            ):
                self._step_of |= dict.fromkeys(step.details, step.step)
            else:
                _log.warning("%s was written, but its bytes are not what was written; it is done again", step.step)

    @property
    def is_resumed(self) -> bool:
        """Whether any step was found."""
        return bool(self._step_of)

    def has(self, module: str) -> bool:
        """Whether a module belongs to a step that was found."""
        return module in self._step_of

    def read(self, modules: Collection[str]) -> dict[str, FinishedModule] | None:
        """Modules that were quantized together, by name; None if they were not found."""
        steps = {self._step_of.get(module) for module in modules} - {None}
        if not steps:
            return None
        (step,) = steps
        assert step is not None
        details = self._done[step].details
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in details}
        for key, tensor in self._tensors(step).items():
            name, _, part = key.rpartition("/")
            tensors[name][part] = tensor
        return {name: FinishedModule.restored(details[name], tensors[name]) for name in modules}

    def is_kept(self, step: str) -> bool:
        """Whether this process has finished the step."""
        return step in self._kept

    def keep(self, step: str, modules: Mapping[str, FinishedModule]) -> None:
        """Put a step on the disk; residuals must be there already.

        Raises:
            CheckpointError: the disk is full.
        """
        tensors = {f"{name}/{part}": tensor for name, one in modules.items() for part, tensor in one.tensors().items()}
        self._keep(step, tensors, {name: one.details() for name, one in modules.items()})

    def _keep(self, step: str, tensors: Mapping[str, Tensor], details: dict[str, Any]) -> None:
        path = self._path(step)
        try:
            self._files.mkdir(exist_ok=True)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        flush(path)
        self._note(FinishedStep(step, _digest(path, details), details))

    def _note(self, step: FinishedStep) -> None:
        self._journal.add(step)
        self._kept.add(step.step)

    def _is_intact(self, step: FinishedStep) -> bool:
        path = self._path(step.step)
        return path.is_file() and _digest(path, step.details) == step.digest

    def _tensors(self, step: str) -> dict[str, Tensor]:
        with safe_open(self._path(step), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    def _path(self, step: str) -> Path:
        return file_of(self._files, step)


def _digest(path: Path, details: Mapping[str, Any]) -> str:
    return hashlib.sha256((file_digest(path) + json.dumps(details, sort_keys=True)).encode()).hexdigest()
