"""The corrected weights as an ordinary dense checkpoint that any loader reads, computed module by module."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from srd_modifier.checkpoint.atomic import new_directory, refuse_existing, write_json
from srd_modifier.checkpoint.config import CONFIG_KEY, module_alphas, read_model_config
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9

_BASE_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
# the card's figures are those of the checkpoint, not of what is made of it
_NOT_COPIED = ("config.json", "recipe.yaml", "model.safetensors.index.json", "README.md")
_WEIGHTS = (".safetensors", ".gguf")


def export_dense(
    directory: Path | str,
    output: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    alpha: float | None = None,
    layer_alphas: Mapping[str, float] | None = None,
    chunks: Iterable[str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `W4 + alpha * residual` of every module as a dense model, without quantization or sidecar.

    At most one shard is held in memory. The tokenizer and the other small files are copied; config.json loses its
    `quantization_config` and `srd_config`.

    Args:
        directory: an SRD checkpoint.
        output: the directory to make.
        dtype: of the formerly quantized weights; the other tensors keep theirs.
        alpha: the dial; None is the checkpoint's own.
        layer_alphas: alpha by module name or `re:` pattern; None is the checkpoint's own, unless alpha is given.
        chunks: correct only these chunks of depth; None is all.
        overwrite: replace an existing model directory.
        max_shard_bytes: a new file is begun beyond this size.

    Raises:
        CheckpointError: the checkpoint is damaged, or the output is in the way.
        ConfigError: an alpha is outside [0, 1] or a chunk is unknown.
    """
    directory, output = Path(directory), Path(output)
    refuse_existing(output, overwrite=overwrite)
    sidecar = Sidecar.open(directory)
    alphas = module_alphas(sidecar.config, sidecar.base.layers, alpha=alpha, layer_alphas=layer_alphas, chunks=chunks)
    with new_directory(output, overwrite=overwrite) as staging:
        _write_shards(staging, _dense_tensors(sidecar, alphas, dtype), max_shard_bytes)
        config = read_model_config(directory)
        for key in (CONFIG_KEY, "quantization_config"):
            config.pop(key, None)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        write_json(staging / "config.json", config)
        for source in directory.iterdir():
            if source.is_file() and source.suffix not in _WEIGHTS and source.name not in _NOT_COPIED:
                shutil.copyfile(source, staging / source.name)


def _dense_tensors(sidecar: Sidecar, alphas: Mapping[str, float], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    base = sidecar.base
    quantized = set(base.quantized_modules)
    for name in base:
        module, _, _ = name.rpartition(".")
        if module not in quantized or not name.endswith(_BASE_SUFFIXES):
            yield name, base.tensor(name)
        elif name.endswith(".weight_packed"):
            if module in alphas:
                yield f"{module}.weight", sidecar.correct(module, alphas[module], dtype)
            else:
                yield f"{module}.weight", base.dequantize(module, scale_dtype=dtype).to(dtype)


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    """Write the tensors to as few files as the limit allows, with an index if there is more than one."""
    shards: list[list[str]] = []
    total = 0
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(batch, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and sum(held.nbytes for held in batch.values()) + tensor.nbytes > max_bytes:
            flush()
        batch[name] = tensor.contiguous()
        total += tensor.nbytes
    if not batch:
        raise CheckpointError(f"{directory}: the checkpoint has no tensors")
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
