"""Where the files of a model lie: what the user names is a directory, or a hub id in the local cache."""

import re
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.config import read_srd_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.errors import SRDError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# what a model directory holds besides weights in other frameworks' formats
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "srd/*"]


def find_model(
    name: str | Path,
    *,
    fetch_weights: bool = False,
    revision: str | None = None,
    cache_directory: str | Path | None = None,
) -> Path:
    """The directory with the model's config.json; for a hub id its snapshot in the local cache.

    Args:
        name: A directory, or a Hugging Face hub id.
        fetch_weights: For a hub id, whether the weights must be there when this returns. Transformers fetches those
            of a plain model itself, but not a residual, so a checkpoint with one is always fetched whole.
        revision: Of a hub id: branch, tag or commit; None is the main branch.
        cache_directory: Where hub models are kept; None is the Hugging Face cache.

    Raises:
        SRDError: There is no such model.
        CheckpointError: Its config.json is damaged.
    """
    path = as_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SRDError(f"{name}: the directory has no config.json, so it is not a model")
        return path
    if path.exists():
        remedy = "; unpack the container with `srd axm extract`" if path.suffix == ".axm" else ""
        raise SRDError(f"{name} is a file, expected a model directory or a hub id{remedy}")
    if not _HUB_ID.fullmatch(str(name)):
        raise SRDError(f"{name}: there is no such directory")
    return _find_snapshot(str(name), fetch_weights, revision=revision, cache_dir=cache_directory)


def find_safetensors(name: str) -> Path:
    """The directory of a model whose weights are in safetensors files on this machine.

    Raises:
        SRDError: There is no such model, or it has none.
        CheckpointError: Its config.json is damaged.
    """
    directory = find_model(name, fetch_weights=True)
    if not any(directory.glob("model*.safetensors")):
        raise SRDError("it has no safetensors files")
    return directory


def _find_snapshot(hub_id: str, fetch_weights: bool, **where: Any) -> Path:
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    try:
        directory = Path(cached_file(hub_id, "config.json", **where)).parent
        if fetch_weights or read_srd_config(directory) is not None:
            directory = Path(snapshot_download(hub_id, allow_patterns=_MODEL_FILES, **where))
    except (OSError, ValueError) as error:
        raise SRDError(
            f"{hub_id}: there is no such directory, and no such model could be fetched from the Hugging Face hub"
        ) from error
    return directory
