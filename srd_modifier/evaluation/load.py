"""Turn what the user names into a model that can be scored.

A name is a GGUF file, scored from its own bytes, or a directory, a hub id or a container of one of three kinds, told
apart by `config.json`: a plain Transformers model, a compressed-tensors checkpoint (both through
`AutoModelForCausalLM`), or a checkpoint with a residual, which has a top-level `srd_config` and goes through
`srd_modifier.transformers.load_corrected`. A container may also hold a GGUF file alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import SRDConfig, module_alphas, read_srd_config
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.checkpoint.sizes import CheckpointSize, measure
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.evaluation.containers import names_container, open_container
from srd_modifier.evaluation.gguf import LlamaCppTokenizer, build_model
from srd_modifier.evaluation.scores import NamedModel
from srd_modifier.gguf.reader import GGUFFile


@dataclass(frozen=True)
class LoadedModel(NamedModel):
    """A model ready to be scored: in evaluation mode, on its device, under the name the user gave.

    Attributes:
        path: The directory of its files, for a hub id the snapshot in the local cache, for a container the root in it;
            or the GGUF file, for a container a copy of it.
        tokenizer: The tokenizer beside it, or in the file.
        alpha: Share of the residual that is applied, `None` for a model without one.
        chunks: The chunks whose residual is applied, `None` for all or for a model without one.
        corrected: Modules whose residual is applied with an alpha above 0, `None` for a model without one.
        gguf: The file it was made of, `None` for a directory.
    """

    path: Path
    tokenizer: Any
    alpha: float | None = None
    chunks: tuple[str, ...] | None = None
    corrected: frozenset[str] | None = None
    gguf: GGUFFile | None = None

    @property
    def size(self) -> CheckpointSize:
        """What it costs on disk, with the residual of the corrected modules only."""
        return measure(self.path, corrected=self.corrected) if self.gguf is None else self.gguf.size

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens that the configuration allows, `None` where it names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embedding: token ids must lie below this."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load(
    name: str,
    *,
    alpha: float | None = None,
    chunks: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: A directory, a Hugging Face hub id, or a file whose name ends in `.gguf` or `.axm`. A container is
            verified before it is used, with the key in the environment where there is one.
        alpha: For a checkpoint with a residual, the share of it to apply; `None` takes the checkpoint's own.
        chunks: For a checkpoint with a residual, the chunks of depth to apply it to; `None` for all.
        dtype: What the weights are computed in.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.

    Raises:
        SRDError: Nothing can be loaded under this name, weights are missing, the tokenizer is missing, the device
            is not there, or `alpha` or `chunks` were given for a model without a residual.
    """
    target = resolve_device(device)
    path = find_files(name)
    if path.suffix == ".gguf":
        _refuse_residual_options(name, "a GGUF file holds none", alpha=alpha, chunks=chunks)
        file = GGUFFile(path)
        model = build_model(file, dtype)
        return LoadedModel(name, model.to(target).eval(), file.path, LlamaCppTokenizer(file), gguf=file)
    srd_config = read_srd_config(path)
    if srd_config is None:
        _refuse_residual_options(name, "config.json has no srd_config", alpha=alpha, chunks=chunks)
        tokenizer = _load_tokenizer(name)
        model = _load_plain(name, dtype)
        return LoadedModel(name, model.to(target).eval(), path, tokenizer)
    corrected = corrected_modules(path, srd_config, alpha=alpha, chunks=chunks)
    tokenizer = _load_tokenizer(name)
    model = _load_residual(name if names_container(name) else path, alpha=alpha, chunks=chunks, dtype=dtype)
    return LoadedModel(
        name,
        model.to(target).eval(),
        path,
        tokenizer,
        alpha=srd_config.alpha if alpha is None else alpha,
        chunks=None if chunks is None else tuple(chunks),
        corrected=corrected,
    )


def find_files(name: str, *, fetch_weights: bool = False) -> Path:
    """The directory of a model's files, or its GGUF file; of a container, what is in it.

    Args:
        name: As of `load`.
        fetch_weights: As of `find_model`.

    Raises:
        SRDError: There is no such model.
        CheckpointError: The container was changed, or config.json is damaged.
    """
    if names_container(name):
        return open_container(name)
    if Path(name).suffix == ".gguf":
        return Path(name)
    return find_model(name, fetch_weights=fetch_weights)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that `load` gives with a model, without the model.

    Raises:
        SRDError: There is none under this name.
    """
    path = open_container(name) if names_container(name) else Path(name)
    if path.suffix == ".gguf":
        return LlamaCppTokenizer(GGUFFile(path))
    return _load_tokenizer(name)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; any other name is taken as it is.

    Raises:
        SRDError: CUDA was asked for and is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SRDError("device cuda was asked for, but this installation of torch finds no CUDA device")
    return torch.device(device)


def corrected_modules(
    directory: Path, config: SRDConfig, *, alpha: float | None, chunks: Sequence[str] | None
) -> frozenset[str]:
    """Modules whose residual is applied with an alpha above 0, when a checkpoint is loaded like this."""
    layers = BaseCheckpoint(directory).layers
    alphas = module_alphas(config, layers, alpha=alpha, chunks=chunks)
    return frozenset(module for module, value in alphas.items() if value > 0)


def _refuse_residual_options(name: str, reason: str, *, alpha: float | None, chunks: Sequence[str] | None) -> None:
    given = [option for option, value in (("alpha", alpha), ("chunks", chunks)) if value is not None]
    if given:
        raise SRDError(f"{name} has no residual ({reason}), so {' and '.join(given)} cannot be applied")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SRDError(f"{name}: no tokenizer could be loaded, are its files beside config.json?") from error


def _load_plain(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{name}: the model cannot be loaded: {_first_line(error)}") from error
    # Transformers fills these with random numbers and only warns; a score of that means nothing.
    made_up = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if made_up:
        raise CheckpointError(
            f"{name}: {len(made_up)} weights are missing or have the wrong shape: {', '.join(made_up[:5])}"
            + (", ..." if len(made_up) > 5 else "")
        )
    return model


def _load_residual(source: Path | str, *, alpha: float | None, chunks: Sequence[str] | None, dtype: torch.dtype) -> Any:
    from srd_modifier.transformers import load_corrected

    return load_corrected(source, alpha=alpha, chunks=None if chunks is None else list(chunks), dtype=dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
