"""`srd/sensitivity.json`: how much of the model's divergence each quantized module is predicted to cause.

The damage of an error E in one module's weight is its share of the mean KL divergence per token,
`1/2 sum_r (E H E^T)_rr g_r`. It is a quadratic form, so three numbers give it at every alpha: that of the W4 error,
that of the corrected error, and the form between the two.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.config import SENSITIVITY, SRDConfig, read_json, read_srd_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.errors import CheckpointError, ConfigError

SENSITIVITY_VERSION = 1
METHODS = ("gradient", "forward")


@dataclass(frozen=True, kw_only=True)
class ModuleSensitivity:
    """The predicted damage of one quantized module, in nats per token.

    Attributes:
        w4: damage of the W4 weight.
        corrected: damage with the whole residual (alpha 1); None for a module without one.
        mixed: the bilinear form between the two errors, of either sign; None for a module without a residual.
        output: mean over the rows of what a unit of squared error in an output costs, where it was measured.

    Raises:
        ConfigError: a number is not finite, or negative where only `mixed` may be.
    """

    w4: float
    corrected: float | None = None
    mixed: float | None = None
    output: float | None = None

    def __post_init__(self) -> None:
        _check_number("w4", self.w4)
        for name in ("corrected", "output"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if self.mixed is not None:
            _check_number("mixed", self.mixed, negative=True)
        if (self.corrected is None) != (self.mixed is None):
            missing, present = ("corrected", "mixed") if self.corrected is None else ("mixed", "corrected")
            raise ConfigError(f"{missing} is missing, expected it beside {present}")

    def damage(self, alpha: float) -> float:
        """The damage with this share of the residual; without a residual it is that of W4 at every alpha."""
        if self.corrected is None or self.mixed is None:
            return self.w4
        rest = 1 - alpha
        damage = rest * rest * self.w4 + 2 * alpha * rest * self.mixed + alpha * alpha * self.corrected
        return max(0.0, damage)  # the form has no negative values; the three rounded numbers might give one

    @property
    def removed(self) -> float:
        """What the whole residual takes off the damage; 0 without a residual."""
        return 0.0 if self.corrected is None else self.w4 - self.corrected

    def to_dict(self) -> dict[str, float]:
        """The numbers that there are, for JSON."""
        values = {"w4": self.w4, "corrected": self.corrected, "mixed": self.mixed, "output": self.output}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModuleSensitivity":
        """The numbers that `to_dict` gave.

        Raises:
            ConfigError: one is missing, unknown or out of range.
        """
        _check_names(values, required=("w4",), optional=("corrected", "mixed", "output"))
        for name, value in values.items():
            _check_number(name, value, negative=name == "mixed")  # null is no number either: absent is written absent
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The predicted damage of every quantized module.

    Attributes:
        method: `gradient` or `forward`, how it was measured.
        tokens: calibration tokens it was measured on.
        modules: by module name, in the model's order.

    Raises:
        ConfigError: the method is unknown or the tokens are no positive number.
    """

    method: str
    tokens: int
    modules: dict[str, ModuleSensitivity]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}, expected one of {METHODS}")
        if type(self.tokens) is not int or self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens!r}, expected a whole number of at least 1")

    def predicted(self, alphas: Mapping[str, float]) -> float:
        """The model's predicted divergence from the original: mean KL divergence, nats per token.

        Args:
            alphas: share of the residual by module; a module that is not in it counts as plain W4.

        Raises:
            ConfigError: a module is not among those that were measured.
        """
        unknown = next((module for module in alphas if module not in self.modules), None)
        if unknown is not None:
            raise ConfigError(f"alphas has {unknown!r}, which is not among the modules of the sensitivity")
        return math.fsum(module.damage(alphas.get(name, 0.0)) for name, module in self.modules.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        modules = {name: module.to_dict() for name, module in self.modules.items()}
        return {"method": self.method, "tokens": self.tokens, "modules": modules}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sensitivity":
        """The sensitivity that `to_dict` gave.

        Raises:
            ConfigError: a field is missing, unknown or out of range; the message names it.
        """
        _check_names(values, required=("method", "tokens", "modules"))
        if not isinstance(values["modules"], dict):
            raise ConfigError("modules is not an object")
        modules = {}
        for name, numbers in values["modules"].items():
            if not isinstance(numbers, dict):
                raise ConfigError(f"modules[{name!r}] is {numbers!r}, expected an object")
            try:
                modules[name] = ModuleSensitivity.from_dict(numbers)
            except ConfigError as error:
                raise ConfigError(f"modules[{name!r}].{error}") from error
        return cls(method=values["method"], tokens=values["tokens"], modules=modules)

    def check_covers(self, corrected: Collection[str]) -> None:
        """Raise ConfigError unless exactly these modules have the numbers of a residual."""
        for name in corrected:
            if name not in self.modules or self.modules[name].corrected is None:
                raise ConfigError(f"modules[{name!r}].corrected is missing, the module has a residual")
        known = set(corrected)
        extra = next(
            (name for name, module in self.modules.items() if module.corrected is not None and name not in known), None
        )
        if extra is not None:
            raise ConfigError(f"modules[{extra!r}].corrected is extra, the module has no residual")


def read_sensitivity(directory: Path | str) -> Sensitivity | None:
    """The sensitivity of a checkpoint, or None where it has none.

    Raises:
        CheckpointError: the file belongs to another checkpoint or is not valid; the message names file and field.
    """
    directory = as_path(directory)
    path = directory / SENSITIVITY
    config = read_srd_config(directory)
    if config is None or not path.is_file():
        return None
    values = read_json(path)
    try:
        version = values.pop("version", None)
        if version != SENSITIVITY_VERSION:
            raise ConfigError(f"version is {version!r}, this srd-modifier reads {SENSITIVITY_VERSION}")
        for name in ("base_digest", "residual_digest"):
            if name not in values:
                raise ConfigError(f"{name} is missing")
        _check_binding(path, directory, config, values.pop("base_digest"), values.pop("residual_digest"))
        sensitivity = Sensitivity.from_dict(values)
        sensitivity.check_covers(config.modules)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return sensitivity


def sensitivity_file(sensitivity: Sensitivity, *, base_digest: str, residual_digest: str) -> dict[str, Any]:
    """What the file holds: the sensitivity, bound to the base and the residual that it was measured on."""
    return {
        "version": SENSITIVITY_VERSION,
        "base_digest": base_digest,
        "residual_digest": residual_digest,
        **sensitivity.to_dict(),
    }


def _check_binding(path: Path, directory: Path, config: SRDConfig, base_digest: Any, residual_digest: Any) -> None:
    index = read_json(directory / config.sidecar).get("metadata")
    expected = index.get("residual_digest") if isinstance(index, dict) else None
    for name, found, wanted in (
        ("base_digest", base_digest, config.base_digest),
        ("residual_digest", residual_digest, expected),
    ):
        if found != wanted:
            raise CheckpointError(
                f"{path} belongs to another checkpoint ({name} differs); copy it from the same checkpoint or remove it"
            )


def _check_names(values: Mapping[str, Any], *, required: Collection[str], optional: Collection[str] = ()) -> None:
    missing = next((name for name in required if name not in values), None)
    if missing is not None:
        raise ConfigError(f"{missing} is missing")
    unknown = sorted(values.keys() - {*required, *optional})
    if unknown:
        raise ConfigError(f"{unknown[0]} is unknown, expected {', '.join((*required, *optional))}")


def _check_number(name: str, value: object, *, negative: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        finite = number and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # JSON has whole numbers that no float holds
        finite = False
    if not finite or (not negative and value < 0):  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}, expected a {'finite number' if negative else 'number of at least 0'}")
