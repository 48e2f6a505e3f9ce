"""What a model directory holds, read from the headers of its files: the facts that a card may state."""

import mmap
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import read_model_config, read_srd_config
from srd_modifier.checkpoint.sizes import CheckpointSize, measure
from srd_modifier.checkpoint.summary import Summary, summarize
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.gguf.header import DamageError, read_header
from srd_modifier.gguf.reader import GGUFFile

_RECIPE = "recipe.yaml"
_ADAPTER_ENDING = "-lora.gguf"  # of what `srd export gguf --residual-lora` writes beside its file


class Kind(str, Enum):
    """What the directory is for Transformers."""

    SRD = "W4A16 with a residual"
    W4A16 = "W4A16"
    DENSE = "dense"
    NONE = "no checkpoint"


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file with a model in it.

    Attributes:
        path: the file.
        mixture: which types its tensors have, by llama.cpp's name or as a budget; `None` where the file does not say.
        size: what it costs.
        made: how this package made it, by the file's own keys `srd.*`; empty if it did not.
        adapter: what the file lost, as a LoRA adapter beside it; `None` where there is none.
    """

    path: Path
    mixture: str | None
    size: CheckpointSize
    made: dict[str, str]
    adapter: Path | None


@dataclass(frozen=True)
class Contents:
    """What a card is written about.

    Attributes:
        directory: where everything is.
        kind: what Transformers loads from it.
        config: of its config.json; empty without a checkpoint.
        summary: of its checkpoint, `None` without one.
        base_size: of the checkpoint without a residual, `None` without a checkpoint.
        size: of the whole checkpoint.
        gguf: its GGUF models.
        recipe: the text of its recipe, `None` where there is none.
        modifiers: of the recipe, by name, in their order.
    """

    directory: Path
    kind: Kind
    config: dict[str, Any]
    summary: Summary | None
    base_size: CheckpointSize | None
    size: CheckpointSize | None
    gguf: tuple[GGUFModel, ...]
    recipe: str | None
    modifiers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the directory."""
        return self.directory.resolve().name

    @property
    def is_quantized(self) -> bool:
        """Whether its checkpoint is; without a checkpoint, its GGUF files are taken for it."""
        return self.kind is not Kind.DENSE


def read_contents(directory: Path) -> Contents:
    """Look into a directory.

    Raises:
        SRDError: it is no directory, holds no model, or a checkpoint of a kind that no card can be written about.
        CheckpointError: a file is damaged.
        MissingExtraError: it holds GGUF files, and gguf is not installed.
    """
    if not directory.is_dir():
        raise SRDError(f"{directory}: there is no such directory")
    gguf = tuple(model for path in sorted(directory.glob("*.gguf")) if (model := _read_gguf(path)) is not None)
    if not (directory / "config.json").is_file():
        if not gguf:
            raise SRDError(
                f"{directory} has neither config.json nor a GGUF file with a model, so there is nothing to describe"
            )
        return Contents(directory, Kind.NONE, {}, None, None, None, gguf, None, ())
    config = read_model_config(directory)
    kind = _kind(directory, config)
    recipe = None if kind is Kind.DENSE else _read_recipe(directory / _RECIPE)
    return Contents(
        directory=directory,
        kind=kind,
        config=config,
        summary=summarize(directory),
        base_size=measure(directory, corrected=()),
        size=measure(directory),
        gguf=gguf,
        recipe=recipe,
        modifiers=() if recipe is None else _modifiers(recipe, directory / _RECIPE),
    )


def _kind(directory: Path, config: dict[str, Any]) -> Kind:
    if read_srd_config(directory) is not None:
        return Kind.SRD
    if BaseCheckpoint(directory).quantized_modules:
        return Kind.W4A16
    quantization = config.get("quantization_config")
    if quantization is None:
        return Kind.DENSE
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise SRDError(
        f"{directory / 'config.json'}: the weights are quantized by {method!r} without packed int4; a card is written "
        "for dense, W4A16 and SRD checkpoints and GGUF files"
    )


def _read_gguf(path: Path) -> GGUFModel | None:
    """A model; `None` for an adapter, an importance matrix or another part of a model."""
    require("gguf", extra="gguf")
    if _general_type(path) != "model":
        return None
    file = GGUFFile(path)
    own = {key.removeprefix("srd."): str(value) for key, value in file.metadata.items() if key.startswith("srd.")}
    adapter = path.with_name(path.stem + _ADAPTER_ENDING)
    is_adapter = adapter.is_file() and _general_type(adapter) == "adapter"
    return GGUFModel(
        path,
        own.get("mixture", _file_type(file)),
        file.size,
        own if "library" in own else {},
        adapter if is_adapter else None,
    )


def _general_type(path: Path) -> Any:
    """What a file holds; one that is damaged counts as a model, whose reader will say what is wrong."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_header(data)[0].get("general.type", "model")
    except (DamageError, OSError, ValueError):  # a file of no bytes cannot be mapped
        return "model"


def _file_type(file: GGUFFile) -> str | None:
    """llama.cpp's name of the file's mixture, such as Q4_K_M."""
    number = file.metadata.get("general.file_type")
    names = {int(member): member.name for member in import_module("gguf").LlamaFileType}
    name = names.get(number) if isinstance(number, int) else None
    return None if name is None else name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _read_recipe(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _modifiers(recipe: str, path: Path) -> tuple[str, ...]:
    import yaml

    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return tuple(_find_modifiers(values))


def _find_modifiers(values: Any) -> list[str]:
    """Names at any depth of stages and groups."""
    if not isinstance(values, dict):
        return []
    found: list[str] = []
    for name, inner in values.items():
        found += [str(name)] if str(name).endswith("Modifier") else _find_modifiers(inner)
    return found
