"""What a checkpoint is and what it costs, from its headers alone: `srd inspect`."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import IMPORTANCE, module_alphas, read_srd_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.checkpoint.sensitivity import read_sensitivity
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.selection.depth import CHUNKS, chunk_of


@dataclass(frozen=True)
class ChunkSummary:
    """The residual in one chunk of depth.

    Attributes:
        modules: corrected modules.
        of: quantized modules.
        bytes: of the residual.
    """

    modules: int
    of: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A W4A16 checkpoint, with or without a residual.

    Attributes:
        directory: the checkpoint.
        settings: alpha, layer alphas and default format; empty without a residual.
        base_digest: that the residual is bound to, or None.
        quantized_modules: modules with W4 weights.
        corrected_modules: those with a residual.
        formats: corrected modules by the width, group size, rounding and density of their residual.
        chunks: the residual by chunk of depth; `outside` are modules outside the decoder layers.
        base_bytes: of the files of the W4A16 model.
        residual_bytes: of the sidecar's tensors.
        bits_per_weight_w4: of the quantized weights, scales and zero points included; None if there are none.
        bits_per_weight: the same with the residual.
        has_importance: whether the mean squared inputs were saved.
        predicted_kld_w4: mean KL divergence from the original model that is predicted for plain W4, in nats per token;
            None where the sensitivity was not measured.
        predicted_kld: the same with the residual, at the checkpoint's own alphas.
    """

    directory: str
    settings: dict[str, Any]
    base_digest: str | None
    quantized_modules: int
    corrected_modules: int
    formats: dict[str, int]
    chunks: dict[str, ChunkSummary]
    base_bytes: int
    residual_bytes: int
    bits_per_weight_w4: float | None
    bits_per_weight: float | None
    has_importance: bool
    predicted_kld_w4: float | None
    predicted_kld: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def summarize(directory: Path | str) -> Summary:
    """Summarize a W4A16 or SRD checkpoint; the sidecar is checked as when it is loaded.

    Raises:
        CheckpointError: the directory holds no model, or its sidecar is damaged.
    """
    directory = as_path(directory)
    config = read_srd_config(directory)
    sidecar = None if config is None else Sidecar.open(directory, config)
    base = BaseCheckpoint(directory) if sidecar is None else sidecar.base
    entries = {} if sidecar is None else sidecar.entries
    weights, w4_bytes = base.quantized_size()
    sensitivity = read_sensitivity(directory)
    alphas = {} if config is None else module_alphas(config, base.layers)
    residual_bytes = sum(entry.bytes() for entry in entries.values())
    chunks = {}
    for chunk in (*CHUNKS, None):
        members = [module for module in base.quantized_modules if chunk_of(module, base.layers) == chunk]
        corrected = [module for module in members if module in entries]
        if members:
            size = sum(entries[module].bytes() for module in corrected)
            chunks[chunk or "outside"] = ChunkSummary(len(corrected), len(members), size)
    return Summary(
        directory=str(directory),
        settings={}
        if config is None
        else {"alpha": config.alpha, "layer_alphas": config.layer_alphas, **config.format.to_dict()},
        base_digest=None if config is None else config.base_digest,
        quantized_modules=len(base.quantized_modules),
        corrected_modules=len(entries),
        formats=dict(Counter(entry.format.label for entry in entries.values())),
        chunks=chunks,
        base_bytes=sum(path.stat().st_size for path in base.files),
        residual_bytes=residual_bytes,
        bits_per_weight_w4=8 * w4_bytes / weights if weights else None,
        bits_per_weight=8 * (w4_bytes + residual_bytes) / weights if weights else None,
        has_importance=(directory / IMPORTANCE).is_file(),
        predicted_kld_w4=None if sensitivity is None else sensitivity.predicted({}),
        predicted_kld=None if sensitivity is None else sensitivity.predicted(alphas),
    )
