"""Base and sidecar bound together in one directory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from srd_modifier.checkpoint.atomic import link_or_copy
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import (
    CONFIG_KEY,
    IMPORTANCE,
    SENSITIVITY,
    SIDECAR_INDEX,
    SRDConfig,
    read_json,
    read_model_config,
)
from srd_modifier.checkpoint.sensitivity import Sensitivity, sensitivity_file
from srd_modifier.checkpoint.writer import INDEX_NAME
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import ResidualFormat


def attach_sidecar(
    directory: Path,
    files: Iterable[Path],
    *,
    modules: Iterable[str],
    fmt: ResidualFormat,
    alpha: float = 1.0,
    layer_alphas: Mapping[str, float] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    base_digests: Mapping[str, str] | None = None,
    sensitivity: Sensitivity | None = None,
) -> SRDConfig:
    """Put a written sidecar beside the W4A16 model in `directory`, and srd_config into its config.json.

    Args:
        directory: a complete W4A16 checkpoint.
        files: of a finished `SidecarWriter`; linked where the file system allows it.
        modules: the corrected modules, in the model's order.
        fmt: the default format of the residuals.
        alpha: written to srd_config.
        layer_alphas: written to srd_config.
        importance: mean squared input by module, float32 `[in_features]`.
        base_digests: SHA-256 of the base tensors that the residuals were taken against, by name.
        sensitivity: the predicted damage of every quantized module.

    Raises:
        CheckpointError: a base tensor on disk is not the one its residual was taken against.
        ConfigError: the sensitivity is that of other residuals.
    """
    modules = tuple(modules)
    if sensitivity is not None:
        sensitivity.check_covers(modules)
    base = BaseCheckpoint(directory)
    digests = base.tensor_digests()
    for name, digest in (base_digests or {}).items():
        if name not in digests:
            raise CheckpointError(
                f"{directory}: {name} is not among the saved tensors; the architecture renames its modules when it is "
                "saved, which this version does not follow"
            )
        if digests[name] != digest:
            raise CheckpointError(
                f"{directory}: {name} was saved with other bytes than its residual was computed from; "
                "the model was changed between calibration and saving"
            )
    folder = (directory / SIDECAR_INDEX).parent
    folder.mkdir()
    base_digest = base.combine(digests)
    for file in files:
        if file.name == INDEX_NAME:
            # binds the sidecar to the base, as srd_config binds the base to the model
            index = read_json(file)
            index["metadata"]["base_digest"] = base_digest
            _write_json(folder / file.name, index)
            if sensitivity is not None:
                residual_digest = index["metadata"]["residual_digest"]
                values = sensitivity_file(sensitivity, base_digest=base_digest, residual_digest=residual_digest)
                _write_json(directory / SENSITIVITY, values)
        else:
            link_or_copy(file, folder / file.name)
    if importance:
        save_file({f"{name}.importance": value for name, value in importance.items()}, directory / IMPORTANCE)
    config = SRDConfig(
        modules=modules,
        format=fmt,
        alpha=alpha,
        layer_alphas=dict(layer_alphas or {}),
        base_digest=base_digest,
        base_fingerprint=base.fingerprint(),
    )
    model_config = read_model_config(directory)
    model_config[CONFIG_KEY] = config.to_dict()
    _write_json(directory / "config.json", model_config)
    return config


def _write_json(path: Path, value: Any) -> None:
    # not atomic and not flushed: the directory is not in its place yet
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
