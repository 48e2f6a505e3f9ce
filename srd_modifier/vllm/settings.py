"""What a user can set when serving: `--hf-overrides '{"srd_config": {"alpha": 0.5, "compute": "merge"}}'`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from srd_modifier.checkpoint.config import given_settings, module_alphas
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import ConfigError

COMPUTES = ("auto", "merge", "int8", "split")
_SETTINGS = ("alpha", "layer_alphas", "chunks", "compute")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "layer_alphas": ((Mapping, NoneType), "an object of alphas by module name"),
    "chunks": ((list, tuple, str, NoneType), "a list of names"),
}


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is to be served.

    Attributes:
        alphas: of every corrected module, by its name in the checkpoint.
        compute: how corrected layers are computed, one of COMPUTES.
    """

    alphas: dict[str, float]
    compute: str

    @classmethod
    def read(cls, sidecar: Sidecar, given: Mapping[str, Any]) -> "Settings":
        """The settings in the `srd_config` that vLLM holds, whether the checkpoint's or the user's.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"srd_config is {given!r}, expected an object with {', '.join(_SETTINGS)}")
        values = given_settings(Path(sidecar.directory), given, _SETTINGS)
        for name, (kinds, expected) in _KINDS.items():
            if not isinstance(values.get(name), kinds):
                raise ConfigError(f"srd_config.{name} is {values[name]!r}, expected {expected}")
        compute = values.pop("compute", "auto")
        if compute not in COMPUTES:
            raise ConfigError(f"srd_config.compute is {compute!r}, expected one of {', '.join(COMPUTES)}")
        return cls(module_alphas(sidecar.config, sidecar.base.layers, **values), compute)
