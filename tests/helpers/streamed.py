"""Recipes of round-to-nearest, and what the tests of streamed quantization compare."""

from pathlib import Path
from typing import Any

import yaml

GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def scheme(*targets: str, **changes: Any) -> dict[str, Any]:
    """Settings of a quantizer: 4 bits, symmetric groups of 32, without the head; `changes` are to its weights."""
    weights = {name: value for name, value in {**GROUPS, **changes}.items() if value is not None}
    return {
        "config_groups": {"group_0": {"targets": list(targets) or ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def srd(*targets: str, weights: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Settings of an SRDModifier that quantizes by itself."""
    return {**scheme(*targets, **(weights or {})), "residual_group_size": 32, **settings}


def write_recipe(path: Path, *modifiers: tuple[str, dict[str, Any]]) -> Path:
    """A recipe of modifiers by their names, which may come twice: each has a stage of its own."""
    stages = {
        f"stage{number}_stage": {"quant_modifiers": {name: settings}}
        for number, (name, settings) in enumerate(modifiers)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones included."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def differing(first: Path, second: Path) -> list[str]:
    """Names of the files that are in one directory only, or have other bytes."""
    one, other = contents(first), contents(second)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
