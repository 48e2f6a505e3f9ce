"""What is known of a model without reading a weight: its config, and the headers of its safetensors files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import read_model_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import SRDError

# what `srd quantize` saves again beside the weights, about as large as it was
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ModelSource:
    """A model by its metadata.

    Attributes:
        name: as it was given.
        directory: that holds config.json; the weights are there too only if `has_weights`.
        has_weights: whether the files of the weights are on this machine.
        dtypes: safetensors dtype name of every tensor.
        shapes: of every tensor.
        weight_bytes: of the files with weights, headers included.
        other_bytes: of the tokenizer's files.
    """

    name: str
    directory: Path
    has_weights: bool
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    weight_bytes: int
    other_bytes: int


def read_source(name: str) -> ModelSource:
    """Read the headers of a model directory, or ask the hub for those of a model that is not in the local cache.

    Of a hub model config.json is fetched, and the headers by requests for a part of each file.

    Raises:
        SRDError: there is no such model, it is quantized already, or the hub cannot be asked.
        CheckpointError: its files are damaged or are not safetensors.
    """
    directory = find_model(name)
    if read_model_config(directory).get("quantization_config") is not None:
        raise SRDError(f"{name} is quantized already; start from the original model")
    if as_path(name).is_dir() or any((directory / file).is_file() for file in _WEIGHTS):
        return _from_files(name, directory)
    return _from_hub(name, directory)


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def _from_files(name: str, directory: Path) -> ModelSource:
    base = BaseCheckpoint(directory)
    infos = {tensor: base.info(tensor) for tensor in base}
    return ModelSource(
        name=name,
        directory=directory,
        has_weights=True,
        dtypes={tensor: info.dtype for tensor, info in infos.items()},
        shapes={tensor: info.shape for tensor, info in infos.items()},
        weight_bytes=sum(path.stat().st_size for path in base.files),
        other_bytes=sum((directory / file).stat().st_size for file in _TOKENIZER_FILES if (directory / file).is_file()),
    )


def _from_hub(name: str, directory: Path) -> ModelSource:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    api = HfApi()
    try:
        metadata = api.get_safetensors_metadata(name)
        siblings = api.model_info(name, files_metadata=True).siblings or []
    except NotASafetensorsRepoError as error:
        raise SRDError(f"{name} has no safetensors files on the Hugging Face hub, so its shapes are unknown") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise SRDError(
            f"{name} is not in the local cache and the Hugging Face hub cannot be asked for its headers; "
            "connect to it, or give a model directory"
        ) from error
    tensors = {tensor: info for file in metadata.files_metadata.values() for tensor, info in file.tensors.items()}
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    return ModelSource(
        name=name,
        directory=directory,
        has_weights=False,
        dtypes={tensor: str(info.dtype) for tensor, info in tensors.items()},
        shapes={tensor: tuple(info.shape) for tensor, info in tensors.items()},
        weight_bytes=sum(sizes.get(file, 0) for file in metadata.files_metadata),
        other_bytes=sum(sizes.get(file, 0) for file in _TOKENIZER_FILES),
    )
