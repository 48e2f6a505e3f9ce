"""`srd_config`, the settings that config.json carries, and the alpha that each module gets from them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.depth import check_chunks, chunk_of
from srd_modifier.selection.patterns import pattern_value

VERSION = 2
CONFIG_KEY = "srd_config"
SIDECAR_INDEX = "srd/residual.safetensors.index.json"
IMPORTANCE = "srd/importance.safetensors"
SENSITIVITY = "srd/sensitivity.json"


@dataclass(frozen=True, kw_only=True)
class SRDConfig:
    """The residual of a whole checkpoint.

    Attributes:
        modules: the corrected modules, in the model's order.
        format: of each module's residual, unless the index gives the module its own.
        alpha: share of the residual that is added, 0 to 1.
        layer_alphas: alpha by module name or `re:` pattern; the first match counts.
        base_digest: SHA-256 over the base weights' names, dtypes, shapes and bytes.
        base_fingerprint: the same over samples of the bytes, quick enough for every load.
        sidecar: the sidecar's index, relative to the checkpoint.
    """

    modules: tuple[str, ...]
    format: ResidualFormat
    base_digest: str
    base_fingerprint: str
    alpha: float = 1.0
    layer_alphas: dict[str, float] = field(default_factory=dict)
    sidecar: str = SIDECAR_INDEX

    def __post_init__(self) -> None:
        for name in ("base_digest", "base_fingerprint", "sidecar"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"srd_config.{name} is {getattr(self, name)!r}, expected text")
        repeated = next((module for module, count in Counter(self.modules).items() if count > 1), None)
        if repeated is not None:
            raise ConfigError(f"srd_config.modules has {repeated} twice")
        check_alphas(self.alpha, self.layer_alphas)
        if Path(self.sidecar).is_absolute() or ".." in Path(self.sidecar).parts:
            raise ConfigError(f"srd_config.sidecar is {self.sidecar!r}, expected a path inside the checkpoint")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {
            "version": VERSION,
            "alpha": self.alpha,
            "layer_alphas": dict(self.layer_alphas),
            **self.format.to_dict(),
            "sidecar": self.sidecar,
            "base_digest": self.base_digest,
            "base_fingerprint": self.base_fingerprint,
            "modules": list(self.modules),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SRDConfig":
        """The settings that `to_dict` gave.

        Raises:
            ConfigError: the version is unknown, or a field is missing, unknown or out of range.
        """
        rest = dict(values)
        version = rest.pop("version", None)
        if version != VERSION:
            older = isinstance(version, int) and version < VERSION
            remedy = "quantize again with this srd-modifier" if older else "upgrade srd-modifier"
            raise ConfigError(f"srd_config.version is {version!r}, this srd-modifier reads {VERSION}; {remedy}")
        # a default in the place of a missing field would be another checkpoint
        names = cls.__dataclass_fields__.keys() - {"format"}
        missing = sorted((names | ResidualFormat.__dataclass_fields__.keys()) - rest.keys())
        if missing:
            raise ConfigError(f"srd_config.{missing[0]} is missing")
        own = {name: rest.pop(name) for name in names}
        modules, layer_alphas = own["modules"], own["layer_alphas"]
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise ConfigError("srd_config.modules is not a list of module names")
        if not isinstance(layer_alphas, dict):
            raise ConfigError(f"srd_config.layer_alphas is {layer_alphas!r}, expected an object")
        own["modules"] = tuple(modules)
        return cls(format=ResidualFormat.from_dict(rest), **own)


def check_alphas(alpha: float, layer_alphas: Mapping[str, float] | None = None) -> None:
    """Raise ConfigError unless every alpha is a number from 0 to 1."""
    for name, value in {"alpha": alpha, **{f"layer_alphas[{k!r}]": v for k, v in (layer_alphas or {}).items()}}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} is {value!r}, expected a number from 0 to 1")


def module_alphas(
    config: SRDConfig,
    layers: int,
    *,
    alpha: float | None = None,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
) -> dict[str, float]:
    """Alpha of every corrected module.

    Args:
        config: of the checkpoint.
        layers: decoder layers of the model, to place the chunks.
        alpha: replaces the checkpoint's alpha and its layer alphas.
        layer_alphas: replaces the checkpoint's layer alphas.
        chunks: only modules in these chunks of depth are corrected; the others get 0. None is all modules,
            those outside the decoder layers included.
    """
    if layer_alphas is None:
        layer_alphas = config.layer_alphas if alpha is None else {}
    if alpha is None:
        alpha = config.alpha
    check_alphas(alpha, layer_alphas)
    chosen = None if chunks is None else check_chunks(chunks)
    return {
        module: pattern_value(module, layer_alphas, alpha)
        if chosen is None or chunk_of(module, layers) in chosen
        else 0.0
        for module in config.modules
    }


def given_settings(directory: Path, given: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
    """The settings that a user gives a library in the place of the checkpoint's `srd_config`.

    Args:
        directory: the checkpoint.
        given: what the library has as `srd_config`: the checkpoint's own, which has a version, perhaps with single
            fields changed; or only what the user gave.
        allowed: the names of what can be set when loading.

    Raises:
        ConfigError: another field is set.
        CheckpointError: config.json is damaged.
    """
    settings = dict(given)
    if "version" in given:
        stored = read_model_config(directory).get(CONFIG_KEY, {})
        settings = {name: value for name, value in given.items() if name not in stored or stored[name] != value}
    for name in settings:
        if name not in allowed:
            raise ConfigError(f"srd_config.{name} cannot be set when loading, only {', '.join(allowed)}")
    return settings


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    return read_json(directory / "config.json")


def read_srd_config(directory: Path) -> SRDConfig | None:
    """The srd_config of a checkpoint, or None where config.json has none.

    Raises:
        CheckpointError: it is not valid; the message names the file and the field.
    """
    values = read_model_config(directory).get(CONFIG_KEY)
    if values is None:
        return None
    try:
        return SRDConfig.from_dict(values)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
