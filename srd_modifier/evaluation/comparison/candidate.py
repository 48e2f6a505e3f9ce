"""What can be scored: everything that `evaluation.load` reads, and servers by their address."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from srd_modifier.checkpoint.config import SRDConfig, read_json, read_srd_config
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import CheckpointSize, measure
from srd_modifier.checkpoint.summary import summarize
from srd_modifier.errors import ConfigError
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.evaluation.load import (
    LoadedModel,
    corrected_modules,
    find_files,
    load,
    load_tokenizer,
    resolve_device,
)
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.tasks.base import Subject
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.selection.depth import check_chunks

_LABEL = re.compile(r"(?P<label>[^=/\\]+)=(?P<rest>.+)")
_SETTING = re.compile(r"(?P<rest>.+)@(?P<name>alpha|chunks)=(?P<value>[^@]+)")
ADDRESSES = ("http://", "https://")
"""What the name of a server begins with."""


@dataclass(frozen=True)
class Candidate:
    """A model to score.

    Attributes:
        model: directory, GGUF file, container, hub id, or address of a server.
        label: what its row is called.
        family: rows of one family are drawn as one line.
        alpha: share of the residual to apply, `None` for the checkpoint's own.
        chunks: chunks of depth whose residual to apply, `None` for all.
        read: reads the Transformers model itself, for formats that `evaluation.load` does not know; `model` is then the
            directory or file that identifies it.
        tokenizer: where the tokenizer of such a model is, `None` for beside it.
        bytes_on_disk: of the files that hold its weights, where `evaluation.load` cannot say.
        format: in words, `None` to find out.
        notes: for footnotes.
    """

    model: str
    label: str
    family: str = ""
    alpha: float | None = None
    chunks: tuple[str, ...] | None = None
    read: Callable[[], Any] | None = None
    tokenizer: str | None = None
    bytes_on_disk: int | None = None
    format: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """`[LABEL=]MODEL[@alpha=A][@chunks=NAME+NAME]`, as the command line has it.

        >>> Candidate.parse("half=out/tiny-srd@alpha=0.5@chunks=early+reasoning").chunks
        ('early', 'reasoning')

        Raises:
            ConfigError: alpha is no number from 0 to 1, or a chunk is unknown.
        """
        found = None if text.startswith(ADDRESSES) else _LABEL.fullmatch(text)
        label, rest = (found["label"], found["rest"]) if found and "@" not in found["label"] else (None, text)
        settings: dict[str, str] = {}
        while match := _SETTING.fullmatch(rest):
            if match["name"] in settings:
                raise ConfigError(f"{text}: @{match['name']} is given twice")
            settings[match["name"]], rest = match["value"], match["rest"]
        alpha = None if "alpha" not in settings else _alpha(text, settings["alpha"])
        chunks = None if "chunks" not in settings else check_chunks(settings["chunks"].split("+"))
        shown = [rest if rest.startswith(ADDRESSES) else Path(rest).name or Path(rest).resolve().name or rest]
        shown += [] if alpha is None else [f"alpha {alpha:g}"]
        shown += [] if chunks is None else ["+".join(chunks)]
        return cls(rest, label or ", ".join(shown), alpha=alpha, chunks=chunks)

    @property
    def is_server(self) -> bool:
        """Whether it runs behind an address."""
        return self.model.startswith(ADDRESSES)


@dataclass(frozen=True)
class Described:
    """A candidate whose files were found, but not loaded.

    Attributes:
        candidate: as it was named.
        path: of its files, `None` for a server.
        digest: over its files, `None` for a server.
        format: in words, such as `bfloat16`, `W4A16 + D8 g64`, `GGUF Q4_K_M`.
        config: of its residual, `None` where it has none.
    """

    candidate: Candidate
    path: Path | None
    digest: str | None
    format: str
    config: SRDConfig | None = None

    def open(self, *, dtype: torch.dtype, device: str, batch_size: int | None = None) -> Subject:
        """Load the model, or connect to the server.

        Raises:
            SRDError: It cannot be loaded, or the server does not answer.
        """
        candidate = self.candidate
        if self.path is None:
            from srd_modifier.evaluation.servers import connect

            return Subject(connect(candidate.model))
        if candidate.read is not None:
            model = candidate.read().to(resolve_device(device)).eval()
            tokenizer = load_tokenizer(candidate.tokenizer or candidate.model)
            loaded = LoadedModel(candidate.label, model, self.path, tokenizer)
        else:
            loaded = load(candidate.model, alpha=candidate.alpha, chunks=candidate.chunks, dtype=dtype, device=device)
        return Subject(LocalScorer(loaded, batch_size=batch_size), loaded)

    @property
    def size(self) -> CheckpointSize | None:
        """What it costs on disk as it is applied, `None` for a server."""
        candidate = self.candidate
        if self.path is None:
            return None
        if candidate.bytes_on_disk is not None:
            return CheckpointSize(candidate.bytes_on_disk, math.nan, 0, 0)
        if self.path.is_file():
            return GGUFFile(self.path).size
        if self.config is None:
            return measure(self.path)
        return measure(self.path, corrected=self._corrected)

    @property
    def family(self) -> str:
        """What it is drawn as, where nobody said: the kind of file it is."""
        if self.candidate.family:
            return self.candidate.family
        if self.config is not None:
            return "W4A16 + residual" if self.residual_bytes else "W4A16"
        return "GGUF" if self.format.startswith("GGUF ") else self.format

    @property
    def residual_bytes(self) -> int | None:
        """Codes, scales and masks of the residual as it is applied, `None` for a model without one."""
        if self.config is None or self.path is None:
            return None
        entries = Sidecar.open(self.path, self.config).entries
        return sum(entries[module].bytes() for module in self._corrected)

    @cached_property
    def _corrected(self) -> frozenset[str]:
        """Modules whose residual is applied."""
        if self.config is None or self.path is None:
            return frozenset()
        chosen = self.candidate
        return corrected_modules(self.path, self.config, alpha=chosen.alpha, chunks=chosen.chunks)

    @property
    def alpha(self) -> float | None:
        """Share of the residual that is applied, `None` for a model without one."""
        if self.config is None:
            return None
        return self.config.alpha if self.candidate.alpha is None else self.candidate.alpha


def describe(candidate: Candidate) -> Described:
    """Find a candidate's files and what they are.

    Raises:
        SRDError: There is no such model, or its files are damaged.
    """
    if candidate.is_server:
        if candidate.alpha is not None or candidate.chunks is not None:
            raise ConfigError(f"{candidate.model}: what a server applies is set where it is started, leave @ out")
        return Described(candidate, None, None, candidate.format or "server")
    if candidate.read is not None and Path(candidate.model).suffix != ".gguf":
        path = Path(candidate.model)
        return Described(candidate, path, model_digest(path), candidate.format or candidate.family)
    path = find_files(candidate.model, fetch_weights=True)
    if path.suffix == ".gguf":
        _refuse_settings(candidate)
        file = GGUFFile(path)
        return Described(candidate, path, model_digest(path), candidate.format or f"GGUF {file.file_type}")
    config = read_json(path / "config.json")
    words = str(config.get("dtype") or config.get("torch_dtype") or "dense")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "quantized"))
        words = _scheme(quantization) if method == "compressed-tensors" else method
    srd_config = read_srd_config(path)
    if srd_config is not None:
        # what cannot be applied is said here, before anything is scored
        corrected_modules(path, srd_config, alpha=candidate.alpha, chunks=candidate.chunks)
        formats = list(summarize(path).formats)
        words = f"W4A16 + {' + '.join(formats)}" if len(formats) < 3 else "W4A16 + residuals"
    else:
        _refuse_settings(candidate)
    return Described(candidate, path, model_digest(path), candidate.format or words, srd_config)


def _refuse_settings(candidate: Candidate) -> None:
    if candidate.alpha is not None or candidate.chunks is not None:
        raise ConfigError(f"{candidate.model} has no residual, leave @alpha and @chunks out")


def _scheme(quantization: dict[str, Any]) -> str:
    """Bits of weights and activations in a configuration of compressed-tensors, such as `W4A16`."""
    groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
    schemes = {f"W{_bits(group.get('weights'))}A{_bits(group.get('input_activations'))}" for group in groups}
    return " + ".join(sorted(schemes)) or "compressed-tensors"


def _bits(arguments: Any) -> int:
    return int(arguments["num_bits"]) if isinstance(arguments, dict) and "num_bits" in arguments else 16


def _alpha(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise ConfigError(f"{text}: alpha is {value}, expected a number from 0 to 1")
    return alpha
