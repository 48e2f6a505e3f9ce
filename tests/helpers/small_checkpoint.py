"""A checkpoint of four small modules, and the ways to look at it and to damage it.

The base is packed by compressed-tensors and saved by safetensors; no model is run. The residuals have three formats
between them, and the default one is dithered, so that a changed seed would change the weights.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import EncodedResidual, ResidualFormat, encode

DEFAULT = ResidualFormat(bits=8, group_size=32, rounding="dithered", seed=3)
SPARSE = ResidualFormat(bits=4, group_size=32, density=0.5)
SHAPES = {
    # its weight_packed is 128 KiB, more than the fingerprint reads
    "model.layers.0.mlp.up_proj": (256, 1024),
    "model.layers.0.mlp.down_proj": (64, 96),
    "model.layers.1.mlp.up_proj": (40, 64),
    "model.layers.1.mlp.down_proj": (24, 64),
}
BIG, DENSE, SPARSE_MODULE, UNCORRECTED = SHAPES
CORRECTED = (BIG, DENSE, SPARSE_MODULE)
FORMATS = {BIG: DEFAULT, DENSE: DEFAULT, SPARSE_MODULE: SPARSE}
ENTRIES = {module: ResidualEntry(*SHAPES[module], FORMATS[module]) for module in CORRECTED}
DAMAGES = Sensitivity(
    method="gradient",
    tokens=4096,
    modules={
        BIG: ModuleSensitivity(w4=8e-3, corrected=2e-5, mixed=1e-5, output=0.5),
        DENSE: ModuleSensitivity(w4=2e-3, corrected=1e-5, mixed=-1e-5, output=0.25),
        SPARSE_MODULE: ModuleSensitivity(w4=1e-3, corrected=4e-4, mixed=2e-4),
        UNCORRECTED: ModuleSensitivity(w4=5e-4, output=1.0),
    },
)
MAX_SHARD_BYTES = 250_000  # BIG has one file, the two others share the second

INDEX = "srd/residual.safetensors.index.json"
FIRST = "srd/residual-00001-of-00002.safetensors"
SECOND = "srd/residual-00002-of-00002.safetensors"


def base_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the W4A16 model: symmetric groups of 32, one module with zero points."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(32, 64, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }
    for module, (out_features, in_features) in SHAPES.items():
        codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
        scale = torch.rand(out_features, in_features // 32, generator=generator) * 0.01 + 0.001
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{module}.weight_scale"] = scale.bfloat16()
        tensors[f"{module}.weight_shape"] = torch.tensor([out_features, in_features])
        if module == SPARSE_MODULE:
            zeros = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8)
            tensors[f"{module}.weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    return tensors


def write_base(directory: Path, seed: int = 0) -> None:
    """A W4A16 model directory as llm-compressor leaves it."""
    directory.mkdir(exist_ok=True)
    save_file(base_tensors(seed), directory / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "quantization_config": {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "format": "pack-quantized",
            "quant_method": "compressed-tensors",
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "tokenizer.json").write_text("{}\n")


def residuals(seed: int = 0) -> dict[str, EncodedResidual]:
    """What the residual of each corrected module is stored as."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        module: encode(torch.randn(SHAPES[module], generator=generator) * 1e-3, FORMATS[module], key=module)
        for module in CORRECTED
    }


def write_sidecar(folder: Path, seed: int = 0) -> list[Path]:
    """The files of the sidecar."""
    writer = SidecarWriter(folder, ENTRIES, max_shard_bytes=MAX_SHARD_BYTES)
    for module, encoded in residuals(seed).items():
        writer.write(module, encoded)
    writer.finish(DEFAULT)
    return sorted(folder.iterdir())


def write_checkpoint(directory: Path, scratch: Path, seed: int = 0, *, sensitivity: Sensitivity | None = None) -> Path:
    """Base and sidecar, bound together."""
    write_base(directory, seed)
    files = write_sidecar(scratch, seed)
    importance = {module: torch.rand(SHAPES[module][1]) for module in CORRECTED}
    attach_sidecar(directory, files, modules=CORRECTED, fmt=DEFAULT, importance=importance, sensitivity=sensitivity)
    shutil.rmtree(scratch)
    return directory


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON object in a file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, read here and not by the package."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file and leave its data alone."""
    header, data = read_header(path)
    change(header)
    path.write_bytes(safetensors_bytes(header, data))


def edit_records(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the metadata that a residual file carries about its modules."""

    def change_header(header: dict[str, Any]) -> None:
        srd = json.loads(header["__metadata__"]["srd"])
        change(srd)
        header["__metadata__"]["srd"] = json.dumps(srd)

    edit_header(path, change_header)


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Save a safetensors file again with other tensors and the same metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is not a dict
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def flip_bit(path: Path, tensor: str, position: float = 0.0) -> None:
    """Flip one bit of a tensor, `position` (0 to 1) of the way through its bytes."""
    header, data = read_header(path)
    start, end = header[tensor]["data_offsets"]
    changed = bytearray(path.read_bytes())
    changed[len(changed) - len(data) + start + int(position * (end - start - 1))] ^= 0x10
    path.write_bytes(changed)


@contextmanager
def named_in_the_error(path: Path) -> Iterator[None]:
    """Let a CheckpointError pass that names `path`; any other error goes on."""
    try:
        yield
    except CheckpointError as error:
        if str(path) not in str(error):
            raise AssertionError(f"{path} is not named in: {error}") from error
