"""Checkpoints with a residual, made in plain torch: where vLLM runs there is no llm-compressor."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

GROUP_SIZE = 64  # divides 576 as 128 does not


def write_checkpoint(model: Path, directory: Path) -> Path:
    """W4A16 to nearest with a full D8, of every module named `_proj`; the model is one file."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors import safe_open
    from safetensors.torch import save_file

    from srd_modifier.checkpoint.base import BaseCheckpoint
    from srd_modifier.checkpoint.save import attach_sidecar
    from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
    from srd_modifier.residual import ResidualFormat, encode

    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    with safe_open(model / "model.safetensors", "pt") as original:
        tensors: dict[str, Tensor] = {}
        for name in original.keys():  # noqa: SIM118 - no mapping
            tensor, module = original.get_tensor(name), name.removesuffix(".weight")
            if not module.endswith("_proj"):
                tensors[name] = tensor
                continue
            codes, scale = _round(tensor)
            tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        base, fmt = BaseCheckpoint(directory), ResidualFormat(bits=8, group_size=GROUP_SIZE)
        entries = {module: ResidualEntry(*base.weight_shape(module), fmt) for module in base.quantized_modules}
        parts = directory.with_name(f"{directory.name}-residual")
        writer = SidecarWriter(parts, entries)
        for module in entries:
            residual = original.get_tensor(f"{module}.weight").float() - base.dequantize(module)
            writer.write(module, encode(residual, fmt, key=module))
        writer.finish(fmt)
    attach_sidecar(directory, sorted(parts.iterdir()), modules=entries, fmt=fmt)
    shutil.rmtree(parts)
    return directory


def _round(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -8 to 7 and the scale of each group."""
    grouped = weight.float().view(len(weight), -1, GROUP_SIZE)
    scale = (grouped.abs().amax(-1) / 7.5).bfloat16()
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    return codes.flatten(1).to(torch.int8), scale
