"""SRD checkpoints of any model in plain torch: what serves them has no llm-compressor.

Weights are rounded to the nearest of 16 levels, packed by the definition of `pack-quantized`, and the residual is
what is left.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
from srd_modifier.residual import ResidualFormat, encode

LINEAR = r"\.layers\.\d+\..*_proj$"  # the Linear modules of decoder layers, experts included


@dataclass(frozen=True)
class Scheme:
    """How W4 is rounded.

    Attributes:
        group_size: columns per scale; -1 is one scale per row.
        symmetric: without zero points.
        negative: give every second scale the other sign, as a quantizer may that uses the 16th level.
    """

    group_size: int = 64
    symmetric: bool = True
    negative: bool = False

    def weights(self) -> dict[str, Any]:
        """As config.json describes it."""
        described: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": self.symmetric}
        if self.group_size == -1:
            return described | {"strategy": "channel"}
        return described | {"strategy": "group", "group_size": self.group_size}


def pack(codes: Tensor) -> Tensor:
    """Codes from -8 to 7, `[rows, columns]`, as int32 `[rows, columns / 8]`: eight to a word, the first lowest."""
    shifts = torch.arange(0, 32, 4)
    words = ((codes.long() + 8).view(len(codes), -1, 8) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def round_to_nearest(weight: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a W4 module whose weight is `[out, in]`, and the weight that they stand for."""
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, columns if scheme.group_size == -1 else scheme.group_size)
    if scheme.symmetric:
        scale, zero = grouped.abs().amax(-1) / 7.5, None
        if scheme.negative:
            scale[:, ::2] *= -1
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round().clamp(-8, 7)
    scale = scale.bfloat16()
    codes = grouped / scale.float().unsqueeze(-1)
    if zero is not None:
        codes += zero.unsqueeze(-1)
    codes = codes.round().clamp(-8, 7)
    levels = codes if zero is None else codes - zero.unsqueeze(-1)
    tensors = {
        "weight_packed": pack(codes.view(rows, columns)),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack(zero.t().contiguous()).t().contiguous()
    return tensors, (levels * scale.float().unsqueeze(-1)).view(rows, columns)


def write_checkpoint(
    model: Path,
    directory: Path,
    *,
    group_size: int = 64,
    symmetric: bool = True,
    negative: bool = False,
    schemes: Mapping[str, Scheme] | None = None,
    fmt: ResidualFormat | None = None,
    formats: Mapping[str, ResidualFormat] | None = None,
    corrected: Callable[[str], bool] = lambda _: True,
    quantized: str = LINEAR,
    ignore: tuple[str, ...] = ("lm_head", r"re:.*mlp\.gate$"),
    **settings: Any,
) -> Path:
    """Quantize a model of one file and keep the residual.

    Args:
        model: a directory as Transformers saves it.
        directory: to make.
        group_size: of W4, as in `Scheme`.
        symmetric: likewise.
        negative: likewise.
        schemes: of the modules whose names begin with a match of these patterns; the first match counts.
        fmt: of the residuals; by default 8 bits in groups of `group_size` (of 64, where that is -1).
        formats: of single modules, by name.
        corrected: which quantized modules get a residual.
        quantized: a pattern that the names of quantized modules match.
        ignore: modules that config.json names as not quantized.
        settings: of srd_config: alpha, layer_alphas.
    """
    default = Scheme(group_size, symmetric, negative)
    schemes = schemes or {}
    fmt = fmt or ResidualFormat(bits=8, group_size=64 if group_size == -1 else group_size)
    tensors, residuals = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or not re.search(quantized, module):
            tensors[name] = tensor
            continue
        packed, base = round_to_nearest(
            tensor, next((scheme for pattern, scheme in schemes.items() if re.match(pattern, module)), default)
        )
        tensors |= {f"{module}.{suffix}": value for suffix, value in packed.items()}
        if corrected(module):
            residuals[module] = tensor.float() - base
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    targets = {f"re:{pattern}": scheme for pattern, scheme in schemes.items()} | {"Linear": default}
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": [target], "weights": scheme.weights()}
            for number, (target, scheme) in enumerate(targets.items())
        },
        "ignore": list(ignore),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for path in model.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, directory)
    own = {module: (formats or {}).get(module, fmt) for module in residuals}
    scratch = directory.with_name(f"{directory.name}.residual")
    entries = {module: ResidualEntry(*residuals[module].shape, own[module]) for module in residuals}
    writer = SidecarWriter(scratch, entries)
    for module, residual in residuals.items():
        writer.write(module, encode(residual, own[module], key=module))
    writer.finish(fmt)
    attach_sidecar(directory, sorted(scratch.iterdir()), modules=list(residuals), fmt=fmt, **settings)
    shutil.rmtree(scratch)
    return directory
