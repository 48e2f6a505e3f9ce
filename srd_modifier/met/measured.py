"""The inventory of files that are there: measured from their headers, no tensor is read.

Only files with weights count, and the indexes that say where they are: not the tokenizer, not what guides an export,
and not a policy file that lies beside them.
"""

import re
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import IMPORTANCE, SENSITIVITY, read_model_config, read_srd_config
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError
from srd_modifier.met.inventory import Experts, Inventory, Part, architecture, read_experts
from srd_modifier.selection.depth import layer_of

_BASE_INDEX = "model.safetensors.index.json"

# not `shared_experts`, which every token uses
_EXPERT = re.compile(r"\.(?:experts|block_sparse_moe\.(?:input|output)_linear)\.")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.")
_GGUF_EXPERT = re.compile(r"_exps\.|\.ffn_(?:gate|up|down)\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a tensor or module of a decoder layer is of its routed experts, by its name in Transformers."""
    return layer_of(name) is not None and _EXPERT.search(f"{name}.") is not None


def measure_checkpoint(directory: Path) -> Inventory:
    """The inventory of a dense, W4A16 or SRD model directory.

    Raises:
        CheckpointError: the model or its residual is damaged, or nothing tells its layers or its experts.
    """
    config = read_model_config(directory)
    base = BaseCheckpoint(directory)
    files = [*base.files, *(path for path in [directory / _BASE_INDEX] if path.is_file())]
    tensors = tuple(
        Part(name, layer_of(name), info.end - info.start, is_expert(name))
        for name in base
        for info in [base.info(name)]
    )
    residual: tuple[Part, ...] = ()
    if read_srd_config(directory) is not None:
        sidecar = Sidecar.open(directory)
        guides = (directory / IMPORTANCE, directory / SENSITIVITY)
        files += [path for path in sidecar.files() if path not in guides]
        residual = tuple(
            Part(module, layer_of(module), entry.bytes(), is_expert(module))
            for module, entry in sidecar.entries.items()
        )
    return Inventory(
        kind="checkpoint",
        architecture=architecture(config),
        layers=require_layers(base.layers, directory),
        experts=require_experts(tensors, read_experts(config), directory / "config.json"),
        base=tensors,
        residual=residual,
        files={path.relative_to(directory).as_posix(): path.stat().st_size for path in files},
    )


def measure_gguf(path: Path) -> Inventory:
    """The inventory of a GGUF file, which has no residual.

    Raises:
        MissingExtraError: gguf is not installed.
        CheckpointError: the file is damaged, or nothing tells its layers or its experts.
    """
    from srd_modifier.gguf.reader import GGUFFile

    file = GGUFFile(path)
    tensors = []
    for name, stored in file.tensors.items():
        block = _GGUF_LAYER.match(name)
        layer = int(block[1]) if block else None
        tensors.append(Part(name, layer, stored.n_bytes, bool(block and _GGUF_EXPERT.search(name))))
    layers = max((part.layer for part in tensors if part.layer is not None), default=-1) + 1
    return Inventory(
        kind="gguf",
        architecture=file.architecture,
        layers=require_layers(layers, path),
        experts=require_experts(tuple(tensors), _gguf_experts(file.metadata, file.architecture), path),
        base=tuple(tensors),
        files={path.name: path.stat().st_size},
    )


def require_layers(layers: int, where: Path) -> int:
    """The number of decoder layers, of which there must be one at least."""
    if not layers:
        raise CheckpointError(f"{where} has no decoder layers that its tensors' names tell, so there are no chunks")
    return layers


def require_experts(tensors: tuple[Part, ...], experts: Experts | None, where: Path) -> Experts | None:
    """The experts of a model that has some; None for one without, whatever its configuration says."""
    if not any(part.expert for part in tensors):
        return None
    if experts is None:
        raise CheckpointError(f"{where} does not say how many experts there are and how many a token uses")
    return experts


def _gguf_experts(metadata: dict[str, Any], name: str) -> Experts | None:
    count, active = metadata.get(f"{name}.expert_count"), metadata.get(f"{name}.expert_used_count")
    if type(count) is not int or type(active) is not int or not 0 < active <= count:
        return None
    return Experts(count, active)
