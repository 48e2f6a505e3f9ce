"""What a quantization is made of, so that nothing else continues it."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from srd_modifier.checkpoint.base import BaseCheckpoint

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

_LIBRARIES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "srd-modifier")


def task_of(directory: Path, recipe: "Recipe", others: Mapping[str, str] | None = None) -> dict[str, str]:
    """Model, recipe and versions by field, as a journal keeps them.

    Args:
        directory: of the model, which has safetensors files.
        recipe: as it is parsed.
        others: further fields.

    Raises:
        CheckpointError: the model cannot be read.
    """
    return {
        "model": BaseCheckpoint(directory).fingerprint(),
        "config.json": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        "recipe": hashlib.sha256(recipe.yaml().encode()).hexdigest(),
        **(others or {}),
        **{f"version of {library}": version(library) for library in _LIBRARIES},
    }
