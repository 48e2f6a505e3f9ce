"""A whole policy file: built from what was measured or estimated, and read back."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.config import read_json
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.met.estimate import BASE_GROUP_SIZE, estimate_model
from srd_modifier.met.inventory import Inventory, Part
from srd_modifier.met.measured import measure_checkpoint, measure_gguf
from srd_modifier.met.policy import Policy
from srd_modifier.met.schema import FORMAT, VERSION
from srd_modifier.met.speed import DEFAULT_SPEED
from srd_modifier.met.sums import budgets, check_met, layer_chunks
from srd_modifier.residual import ResidualFormat
from srd_modifier.selection.depth import CHUNKS

_DEFAULT_RESIDUAL = ResidualFormat()


def build_met(path: Path, *, policy: Policy | None = None, storage_speed: float = DEFAULT_SPEED) -> dict[str, Any]:
    """The policy file of a model, its bytes measured; the same model gives the same file.

    Args:
        path: a dense, W4A16 or SRD model directory, or a GGUF file, which has no residual to load.
        policy: the chunks of every intent; None is the default policy, also where the directory has a `met.json`.
        storage_speed: bytes per second that the load times are for.

    Returns:
        What `met.json` holds, ready for JSON; the schema is `met.schema.json`.

    Raises:
        CheckpointError: the model is missing, damaged, or has no layers.
        ConfigError: the speed is less than a byte per second.
        MissingExtraError: gguf is not installed.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such directory or GGUF file")
    return _document(measure_checkpoint(path) if path.is_dir() else measure_gguf(path), policy, storage_speed)


def estimate_met(
    config: Path,
    *,
    group_size: int = BASE_GROUP_SIZE,
    residual: ResidualFormat | None = _DEFAULT_RESIDUAL,
    policy: Policy | None = None,
    storage_speed: float = DEFAULT_SPEED,
) -> dict[str, Any]:
    """The policy file that a model would have once it is quantized; `measured` is false.

    Args:
        config: a config.json, or a directory with one; no weights are needed.
        group_size: columns that share a scale of the 4-bit weights; -1 is one scale per row.
        residual: of every Linear weight of the decoder layers; None is plain W4A16.
        policy: the chunks of every intent; None is the default policy.
        storage_speed: bytes per second that the load times are for.

    Returns:
        As `build_met`, with `source.assumed` for the settings.

    Raises:
        CheckpointError: the config is missing or damaged, or has no layers.
        ConfigError: the group size or the speed is out of range, or Transformers knows no such model.
    """
    return _document(estimate_model(config, group_size=group_size, residual=residual), policy, storage_speed)


def read_met(path: Path) -> dict[str, Any]:
    """A policy file, checked: its schema, and that its sums close.

    Raises:
        CheckpointError: it is missing, damaged, contradicts itself, or is of another version.
    """
    met = read_json(path)
    check_met(met, str(path))
    return met


def encode_met(met: dict[str, Any]) -> bytes:
    """A policy file as it is written: JSON in UTF-8, the same bytes for the same policy."""
    return (json.dumps(met, indent=2, allow_nan=False) + "\n").encode()


def _document(inventory: Inventory, policy: Policy | None, storage_speed: float) -> dict[str, Any]:
    if not 1 <= storage_speed < 2**63:
        raise ConfigError(f"storage speed is {storage_speed!r}, expected a byte per second or more")
    layers = layer_chunks(inventory.layers)
    chunks = {name: _chunk(inventory, name, layers) for name in CHUNKS}
    pinned = [part for part in inventory.base if part.layer is None]
    experts = inventory.experts
    base, residual = _bytes(inventory.base), _bytes(inventory.residual)
    header = inventory.header_bytes
    met: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "measured": inventory.assumed is None,
        "source": {
            "kind": inventory.kind,
            "files": dict(sorted(inventory.files.items())),
            "assumed": inventory.assumed,
        },
        "files": {
            "base_bytes": base,
            "residual_bytes": residual,
            "header_bytes": header,
            "total_bytes": base + residual + header,
        },
        "model": {
            "architecture": inventory.architecture,
            "layers": inventory.layers,
            "experts": experts
            and {
                "count": experts.count,
                "active": experts.active,
                "active_fraction": experts.active / experts.count,
            },
        },
        "chunks": chunks,
        "layers": layers,
        "pinned": {
            "tensors": sorted(part.name for part in pinned),
            "bytes": _bytes(pinned),
            "residual_bytes": _bytes(part for part in inventory.residual if part.layer is None),
        },
        "hydration": {intent: list(names) for intent, names in (policy or Policy.default()).intents.items()},
        "storage": {"bytes_per_second": int(storage_speed)},
    }
    met["budgets"] = budgets(met)
    check_met(met, "the policy")
    return met


def _chunk(inventory: Inventory, name: str, layers: list[str]) -> dict[str, Any]:
    base, residual = (
        [part for part in parts if part.layer is not None and layers[part.layer] == name]
        for parts in (inventory.base, inventory.residual)
    )
    return {
        "layers": [layer for layer, own in enumerate(layers) if own == name],
        "depth": list(CHUNKS[name]),
        "base_bytes": _bytes(base),
        "residual_bytes": _bytes(residual),
        "expert_base_bytes": _bytes(part for part in base if part.expert),
        "expert_residual_bytes": _bytes(part for part in residual if part.expert),
    }


def _bytes(parts: Iterable[Part]) -> int:
    return sum(part.bytes for part in parts)
