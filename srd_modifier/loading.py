"""The model that is quantized whole, and its tokenizer: in memory, or, where that is too small, partly on the disk."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import SRDError

# what calibration may need beside the weights; llm-compressor's own reserve
_RESERVE_BYTES = 5 * 10**9


@contextmanager
def loaded_model(name: str, parent: Path, *, max_memory: int | None = None) -> Iterator[Any]:
    """Load a model for `oneshot`, for as long as it is quantized and saved.

    Weights that memory has no room for stay on the disk, in the model's own files where nothing changed them, and are
    brought in for the decoder layer that is calibrated; llm-compressor does that, and nothing in the result differs.

    Args:
        name: a directory or hub id.
        parent: where a folder for weights that change on the disk is made, and removed again.
        max_memory: bytes of memory that the weights may take; None is what is free, less 5 GB.

    Raises:
        SRDError: there is no such model, or it is quantized already.
    """
    from transformers import AutoModelForCausalLM

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise SRDError(f"{name} has no config.json: this is not a model directory")
    limit = room_for_weights() if max_memory is None else max_memory
    with ExitStack() as stack:
        try:
            if _weight_bytes(name) <= limit:
                model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
            else:
                folder = tempfile.TemporaryDirectory(prefix=".srd-offload-", dir=parent, ignore_cleanup_errors=True)
                model = _offloaded(name, limit, stack.enter_context(folder))
        except (OSError, ValueError, SafetensorError) as error:
            raise SRDError(f"cannot load {name}: {' '.join(str(error).split())}") from error
        if getattr(model.config, "quantization_config", None) is not None:
            raise SRDError(f"{name} is quantized already; start from the original model")
        yield model


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        SRDError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SRDError(f"cannot load {name}: {' '.join(str(error).split())}") from error


def room_for_weights() -> int:
    """Bytes of memory that the weights of a model may take now, where nothing else is asked for."""
    import psutil

    return max(0, int(psutil.virtual_memory().available) - _RESERVE_BYTES)


def _offloaded(name: str, limit: int, folder: str) -> Any:
    from compressed_tensors.offload import load_offloaded_model
    from transformers import AutoModelForCausalLM

    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map="auto_offload", max_memory={"cpu": limit}, offload_folder=folder
        )


def _weight_bytes(name: str) -> int:
    """Bytes of the model's safetensors files; 0 where it has none, which Transformers then loads as it can."""
    try:
        directory = find_model(name, fetch_weights=True)
    except SRDError:
        return 0  # Transformers has the message
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
