"""Bytes on disk, and bits per weight of the weights that quantization covers."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import IMPORTANCE, read_json, read_srd_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.selection.depth import layer_of


@dataclass(frozen=True)
class CheckpointSize:
    """What a checkpoint costs.

    Attributes:
        bytes_on_disk: of the files that hold weights, headers included: the base, and the residual where all of it
            is used; where only a part is, the tensors of that part.
        bits_per_weight: bits of the quantized Linear weights over their number: codes, scales, zero points,
            shapes, residual codes, residual scales and masks. For a dense model, of its decoder layers' matrices.
        quantized_weights: number of those weights.
        total_weights: number of all weights, embeddings and norms included.
    """

    bytes_on_disk: int
    bits_per_weight: float
    quantized_weights: int
    total_weights: int

    @property
    def total_bits_per_weight(self) -> float:
        """Bits on disk over all weights."""
        return 8 * self.bytes_on_disk / self.total_weights if self.total_weights else math.nan


def measure(directory: Path | str, *, corrected: Collection[str] | None = None) -> CheckpointSize:
    """Measure a dense, W4A16 or SRD model directory from its headers.

    Of a model that another library packed only the bytes on disk are known; its bits per weight are NaN.

    Args:
        directory: the model.
        corrected: modules whose residual is used; None is all that the sidecar has, an empty collection is plain W4.
    """
    directory = as_path(directory)
    base = BaseCheckpoint(directory)
    total = sum(path.stat().st_size for path in base.files)
    if base.quantized_modules:
        weights, size = base.quantized_size()
        quantized = set(base.quantized_modules)
        others = (name for name in base if name.rpartition(".")[0] not in quantized)
        all_weights = weights + sum(math.prod(base.info(name).shape) for name in others)
    elif "quantization_config" in read_json(directory / "config.json"):
        weights = size = all_weights = 0  # packed in a way that the shapes of its tensors do not tell
    else:
        all_weights = sum(math.prod(base.info(name).shape) for name in base)
        matrices = [base.info(name) for name in base if layer_of(name) is not None and len(base.info(name).shape) >= 2]
        weights = sum(math.prod(info.shape) for info in matrices)
        size = sum(info.end - info.start for info in matrices)
    if read_srd_config(directory) is not None and (corrected is None or corrected):
        sidecar = Sidecar.open(directory)
        used = set(sidecar.entries) if corrected is None else sidecar.entries.keys() & set(corrected)
        tensors = sum(sidecar.entries[module].bytes() for module in used)
        size += tensors
        # a part of the residual has no files of its own
        total += tensors if len(used) < len(sidecar.entries) else _residual_files(sidecar)
    return CheckpointSize(total, 8 * size / weights if weights else math.nan, weights, all_weights)


def _residual_files(sidecar: Sidecar) -> int:
    """Bytes of the files with residual tensors; not of the index, as that of the base is not counted either."""
    shards = [path for path in sidecar.files() if path.suffix == ".safetensors"]
    return sum(path.stat().st_size for path in shards if path != sidecar.directory / IMPORTANCE)
