"""A trained model as an SRD checkpoint: the trained W4, and what is between it and the original weights."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srd_modifier.checkpoint.atomic import new_directory
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
from srd_modifier.errors import ConfigError
from srd_modifier.qat.exports.w4a16 import check_w4, write_w4a16
from srd_modifier.qat.grid import Grid
from srd_modifier.residual import ResidualFormat, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Originals = Mapping[str, Tensor] | Callable[[str], Tensor]


def export_srd(
    model: "PreTrainedModel",
    grids: Mapping[str, Grid],
    originals: Originals,
    tokenizer: Any,
    output: Path,
    *,
    fmt: ResidualFormat | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> None:
    """Write a W4A16 checkpoint with a residual that leads from the trained weights back to the original ones.

    At alpha 0 it is the trained model, bit for bit. At alpha 1 every trained Linear module has its original weight, to
    the precision of the residual; whatever else was trained, such as norms, stays trained.

    Args:
        model: trained and finished.
        grids: of its modules, as `finish` returns them.
        originals: the weight `[out, in]` that the residual leads to, by module name.
        tokenizer: saved beside it.
        output: the directory to make; it appears whole or not at all.
        fmt: of the residual, by default int8 in groups of 64; any rounding but `feedback`.
        alpha: the checkpoint's own, from 0 to 1.
        dtype: of the scales and of everything that is not quantized.
        overwrite: replace an existing model directory.

    Raises:
        ConfigError: the grids are not those of W4A16, their groups are not all of one size, alpha is out of range, or
            an original weight is missing, not finite or of another shape.
        SRDError: the model is not finished, or the output is at fault.
    """
    fmt = fmt or ResidualFormat()
    check_w4(model, grids, dtype)
    with new_directory(output, overwrite=overwrite) as staging:
        write_w4a16(model, grids, tokenizer, staging, dtype)
        with tempfile.TemporaryDirectory(prefix=".srd-residual-", dir=staging.parent) as folder:
            _write_sidecar(BaseCheckpoint(staging), list(grids), originals, fmt, Path(folder))
            attach_sidecar(staging, sorted(Path(folder).iterdir()), modules=grids, fmt=fmt, alpha=alpha)


def _write_sidecar(
    base: BaseCheckpoint, modules: list[str], originals: Originals, fmt: ResidualFormat, folder: Path
) -> None:
    entries = {module: ResidualEntry(*base.weight_shape(module), fmt) for module in modules}
    writer = SidecarWriter(folder, entries)
    try:
        for module in modules:
            trained = base.dequantize(module)
            residual = _original(originals, module, trained.shape) - trained
            try:
                writer.write(module, encode(residual, fmt, key=module))
            except ValueError as error:
                raise ConfigError(f"{module}: {error}") from error
        writer.finish(fmt)
    finally:
        writer.close()


def _original(originals: Originals, module: str, shape: torch.Size) -> Tensor:
    if isinstance(originals, Mapping):
        if module not in originals:
            raise ConfigError(f"there is no original weight of {module}, to which its residual would lead")
        weight = originals[module]
    else:
        weight = originals(module)
    if weight.shape != shape:
        raise ConfigError(f"the original weight of {module} is {list(weight.shape)}, expected {list(shape)}")
    return weight.detach().float().cpu()
