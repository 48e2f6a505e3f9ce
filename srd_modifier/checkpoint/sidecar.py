"""The sidecar of a checkpoint: verified when opened, decoded module by module."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import IMPORTANCE, SENSITIVITY, VERSION, SRDConfig, read_json, read_srd_config
from srd_modifier.checkpoint.extents import as_path
from srd_modifier.checkpoint.shards import DTYPE_NAMES, Shard
from srd_modifier.checkpoint.writer import METADATA_KEY, ResidualEntry, records_digest
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.residual import EncodedResidual, ResidualFormat, add_decoded_


@dataclass(frozen=True)
class Sidecar:
    """The residual of a checkpoint.

    `Sidecar.open` has verified all that does not need the tensors' bytes; those are checked against their digest
    as they are read.

    Attributes:
        directory: the checkpoint.
        config: its srd_config.
        base: its W4A16 weights.
        entries: shape and format by module.
    """

    directory: Path
    config: SRDConfig
    base: BaseCheckpoint
    entries: dict[str, ResidualEntry]
    _shards: dict[str, Shard]
    _digests: dict[str, dict[str, str]]

    @classmethod
    def open(cls, directory: Path | str, config: SRDConfig | None = None) -> "Sidecar":
        """Open the sidecar of a checkpoint and verify it.

        Version, promised and present tensors, shapes, dtypes, and the base's fingerprint are all compared.

        Args:
            directory: the checkpoint.
            config: its srd_config, if it has been read already.

        Raises:
            CheckpointError: anything is missing, extra, damaged or of another base; the message names the file
                and the module.
        """
        directory = as_path(directory)
        config = config or read_srd_config(directory)
        if config is None:
            raise CheckpointError(f"{directory / 'config.json'} has no srd_config: this is not an SRD checkpoint")
        index_path = directory / config.sidecar
        index = read_json(index_path)
        weight_map = _check_weight_map(index_path, index, config)
        shards, records = _open_shards(index_path.parent, weight_map)
        entries, digests = {}, {}
        for module in config.modules:
            shard = shards[f"{module}.weight_d8"]
            entries[module], digests[module] = _entry(shard, module, records.get(module))
            _check_format(index_path, index, config, module, entries[module].format)
            _check_tensors(shard, module, entries[module], shards, weight_map)
        _check_nothing_extra(index_path, weight_map, entries)
        base = BaseCheckpoint(directory)
        _check_base(directory, base, config, entries)
        _check_binding(index_path, index, config, records)
        return cls(directory, config, base, entries, shards, digests)

    def encoded(self, module: str, device: torch.device | str = "cpu") -> EncodedResidual:
        """The stored residual of a module.

        Raises:
            CheckpointError: its bytes do not match their digest; the message names file and tensor.
        """
        tensors = {suffix: self._read(module, suffix).to(device) for suffix in self.entries[module].layout()}
        return EncodedResidual(tensors["weight_d8"], tensors["weight_d8_scale"], tensors.get("weight_d8_mask"))

    def correct(
        self, module: str, alpha: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """`W4 + alpha * residual` of a module: `[out, in]` of `dtype`, computed in float32 and rounded once.

        With alpha 0 it is what every loader computes that casts the checkpoint to `dtype`, bit for bit.

        Raises:
            CheckpointError: the residual does not match its digest.
        """
        if alpha == 0:
            return self.base.dequantize(module, device, scale_dtype=dtype).to(dtype)
        weight = self.base.dequantize(module, device)
        encoded = self.encoded(module, device)
        return add_decoded_(weight, encoded, self.entries[module].format, key=module, alpha=alpha).to(dtype)

    def release(self) -> None:
        """Give back the memory that reading residual and base has filled; tensors stay valid."""
        self.base.release()
        for shard in self._shards.values():
            shard.release()

    def files(self) -> list[Path]:
        """Every file of the sidecar, importance and sensitivity included."""
        paths = {shard.path for shard in self._shards.values()}
        paths.add(self.directory / self.config.sidecar)
        guides = (self.directory / name for name in (IMPORTANCE, SENSITIVITY))
        paths.update(path for path in guides if path.is_file())
        return sorted(paths)

    def verify(self) -> None:
        """Read everything: the base against its full digest, every residual tensor against its own.

        Raises:
            CheckpointError: something was changed; the message names file and tensor.
        """
        if self.base.digest() != self.config.base_digest:
            raise CheckpointError(
                f"{self.base.files[0]}: the base weights do not match srd_config.base_digest; "
                "they were changed after the residual was made"
            )
        for module in self.entries:
            self.encoded(module)

    def _read(self, module: str, suffix: str) -> Tensor:
        name = f"{module}.{suffix}"
        shard = self._shards[name]
        if hashlib.sha256(shard.view(name)).hexdigest() != self._digests[module][suffix]:
            raise CheckpointError(f"{shard.path}: {name} does not match its digest; the file is damaged")
        return shard.tensor(name)


def _check_weight_map(index_path: Path, index: dict[str, Any], config: SRDConfig) -> dict[str, str]:
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise CheckpointError(f"{index_path} has no weight_map or no metadata")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{index_path}: version is {metadata.get('version')!r}, this srd-modifier reads {VERSION}"
        )
    for module in config.modules:
        for suffix in ("weight_d8", "weight_d8_scale"):
            if f"{module}.{suffix}" not in weight_map:
                raise CheckpointError(f"{index_path}: {module}.{suffix} is missing, srd_config promises it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index_path}: {name} points to {file!r}, expected a file name in the same folder")
    return weight_map


def _open_shards(folder: Path, weight_map: dict[str, str]) -> tuple[dict[str, Shard], dict[str, dict[str, Any]]]:
    """The shard of every tensor, and the metadata records of every module."""
    files = {name: Shard.open(folder / name) for name in sorted(set(weight_map.values()))}
    for path in sorted(folder.glob("residual*.safetensors")):
        if path.name not in files:
            raise CheckpointError(f"{path} is not in the index; it belongs to another sidecar or is left over")
    shards: dict[str, Shard] = {}
    records: dict[str, dict[str, Any]] = {}
    for file, shard in files.items():
        for name in shard.tensors:
            if name not in weight_map:
                raise CheckpointError(f"{shard.path}: {name} is extra, the index does not have it")
            if weight_map[name] != file:
                raise CheckpointError(f"{shard.path}: {name} is a duplicate, the index has it in {weight_map[name]}")
            shards[name] = shard
        for module, record in _records(shard).items():
            place = weight_map.get(f"{module}.weight_d8")
            if place != file:
                known = f"the index has it in {place}" if place else "the index does not have it"
                raise CheckpointError(f"{shard.path}: the metadata of {module} is extra, {known}")
            records[module] = record
    for name, file in weight_map.items():
        if name not in shards:
            raise CheckpointError(f"{folder / file}: {name} is missing, the index promises it there")
    return shards, records


def _records(shard: Shard) -> dict[str, dict[str, Any]]:
    try:
        metadata = json.loads(shard.metadata[METADATA_KEY])
        version, modules = metadata["version"], metadata["modules"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{shard.path} has no srd metadata: it is not a residual file") from None
    if version != VERSION:
        raise CheckpointError(f"{shard.path}: version is {version!r}, this srd-modifier reads {VERSION}")
    if not isinstance(modules, dict):
        raise CheckpointError(f"{shard.path} has malformed srd metadata: modules is not an object")
    return modules


def _entry(shard: Shard, module: str, record: dict[str, Any] | None) -> tuple[ResidualEntry, dict[str, str]]:
    try:
        if record is None:
            raise KeyError(module)
        out_features, in_features = record["shape"]
        if not all(type(size) is int and size > 0 for size in (out_features, in_features)):
            raise ValueError(f"shape is {record['shape']!r}")
        entry = ResidualEntry(out_features, in_features, ResidualFormat.from_dict(record["format"]))
        digests = {suffix: str(record["sha256"][suffix]) for suffix in entry.layout()}
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{shard.path}: the metadata of {module} is malformed: {error}") from error
    return entry, digests


def _check_format(
    index_path: Path, index: dict[str, Any], config: SRDConfig, module: str, found: ResidualFormat
) -> None:
    try:
        own = index["metadata"].get("formats", {}).get(module)
        expected = config.format if own is None else ResidualFormat.from_dict(own)
    except (AttributeError, ConfigError, TypeError) as error:
        raise CheckpointError(f"{index_path}: the format of {module} is malformed: {error}") from error
    if found != expected:
        raise CheckpointError(f"{index_path}: {module} is {found} in its shard, expected {expected}")


def _check_tensors(
    shard: Shard, module: str, entry: ResidualEntry, shards: dict[str, Shard], weight_map: dict[str, str]
) -> None:
    for suffix, (dtype, shape) in entry.layout().items():
        name = f"{module}.{suffix}"
        if name not in weight_map:
            raise CheckpointError(f"{shard.path}: {name} is missing")
        info = shards[name].tensors[name]
        if info.dtype != DTYPE_NAMES[dtype] or info.shape != shape:
            raise CheckpointError(
                f"{shards[name].path}: {name} is {info.dtype} {list(info.shape)}, "
                f"expected {DTYPE_NAMES[dtype]} {list(shape)}"
            )


def _check_nothing_extra(index_path: Path, weight_map: dict[str, str], entries: dict[str, ResidualEntry]) -> None:
    promised = {f"{module}.{suffix}" for module, entry in entries.items() for suffix in entry.layout()}
    extra = sorted(set(weight_map) - promised)
    if extra:
        raise CheckpointError(f"{index_path}: {extra[0]} is extra, srd_config does not cover it")


def _check_base(directory: Path, base: BaseCheckpoint, config: SRDConfig, entries: dict[str, ResidualEntry]) -> None:
    for module, entry in entries.items():
        if f"{module}.weight_packed" not in base:
            raise CheckpointError(f"{directory}: {module} has a residual but no weight_packed in the base")
        if base.weight_shape(module) != (entry.out_features, entry.in_features):
            raise CheckpointError(
                f"{base.path_of(module + '.weight_packed')}: {module} is {list(base.weight_shape(module))}, "
                f"its residual is for {[entry.out_features, entry.in_features]}"
            )
    if base.fingerprint() != config.base_fingerprint:
        raise CheckpointError(
            f"{base.files[0]}: the sidecar in {directory / 'srd'} belongs to another base (fingerprint differs); "
            "copy base and sidecar from the same checkpoint"
        )


def _check_binding(
    index_path: Path, index: dict[str, Any], config: SRDConfig, records: dict[str, dict[str, Any]]
) -> None:
    """srd_config names the base, the index names both the base and the residual: none can be exchanged alone."""
    if index["metadata"].get("base_digest") != config.base_digest:
        raise CheckpointError(
            f"{index_path}: the sidecar belongs to another base than srd_config (base_digest differs); "
            "copy base and sidecar from the same checkpoint"
        )
    if index["metadata"].get("residual_digest") != records_digest(records):
        raise CheckpointError(
            f"{index_path}: the residual files are not those of this index (residual_digest differs); they were "
            "changed or belong to another checkpoint"
        )
