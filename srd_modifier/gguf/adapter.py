"""What a GGUF file lost of its model, as a LoRA adapter that llama.cpp adds back.

Each matrix of the file differs from the model's by a residual. Of that the adapter holds the part of a chosen rank
that matters most for the matrix's output: `llama-cli -m FILE --lora ADAPTER`. It belongs to that one file, because the
residual is taken against the blocks that the file really has.

Embeddings are left out: where the head shares their tensor, llama.cpp cannot apply an adapter to both.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srd_modifier._version import __version__
from srd_modifier.checkpoint.atomic import refuse_existing_file
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.writer import Entry, write_gguf

if TYPE_CHECKING:
    from srd_modifier.gguf.families import GGUFTensor
    from srd_modifier.gguf.plan import ExportPlan
    from srd_modifier.gguf.weights import ModelWeights

# Columns of the random subspace beyond the rank, and how often it is turned towards the largest singular values. What
# rounding loses has flat spectra, for which fewer turns leave a percent of the error that the rank could remove.
_OVERSAMPLING = 16
_TURNS = 8


def check_adapter(plan: "ExportPlan", rank: int) -> None:
    """Refuse, before the file is made, a rank that its adapter cannot have.

    Raises:
        ConfigError: The rank is below 1 or above that of a matrix, or no matrix will be quantized.
    """
    lossy = [tensor for tensor in plan.tensors if _is_adapted(tensor) and plan.types[tensor.name].block_weights > 1]
    if not lossy:
        raise ConfigError(f"{plan.mixture} quantizes no matrix, so there is no residual to put into an adapter")
    _check_rank(rank, lossy)


def export_adapter(plan: "ExportPlan", gguf_file: Path, output: Path, *, rank: int, overwrite: bool = False) -> None:
    """Write the adapter of a file that was just exported; errors as of `write_adapter`.

    Args:
        plan: What was exported; its importance weighs the inputs.
        gguf_file: What it was exported to.
        output: The adapter to write.
        rank: Of every matrix of the adapter.
        overwrite: Replace `output`.
    """
    write_adapter(
        output,
        gguf_file=gguf_file,
        tensors=plan.tensors,
        weights=plan.weights,
        rank=rank,
        importance=plan.importance,
        overwrite=overwrite,
    )


def write_adapter(
    output: Path,
    *,
    gguf_file: Path,
    tensors: "Sequence[GGUFTensor]",
    weights: "ModelWeights",
    rank: int,
    importance: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter of a GGUF file, one tensor in memory at a time.

    Args:
        output: The adapter to write.
        gguf_file: The file whose loss it restores.
        tensors: The tensors of the model, as the file has them.
        weights: The model.
        rank: Of every matrix of the adapter.
        importance: What a matrix's inputs are like, by GGUF name: their mean squares `[in]`, or their second moment
            `[in, in]`; for stacked experts with a first dimension of experts. A tensor that it does not name, or has
            only zeros for, counts all its inputs alike.
        overwrite: Replace `output`.

    Raises:
        ConfigError: The rank is below 1 or above that of a matrix.
        CheckpointError: The file is damaged, is not one of this model, or has no quantized matrix.
        SRDError: `output` exists or cannot be written.
    """
    refuse_existing_file(output, overwrite=overwrite)
    file = GGUFFile(gguf_file)
    lossy = _lossy_tensors(file, tensors)
    _check_rank(rank, lossy)
    factors = _factors(file, lossy, weights, rank, importance or {})
    write_gguf(
        output,
        file.architecture,
        lambda writer: _add_metadata(writer, file, rank),
        [entry for tensor in lossy for entry in _entries(tensor, rank)],
        lambda entry: [next(factors)],
        overwrite=overwrite,
    )


def _add_metadata(writer: Any, file: GGUFFile, rank: int) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp multiplies with alpha / rank
    writer.add_name(f"{file.metadata.get('general.name', file.path.stem)} residual, rank {rank}")
    writer.add_string("srd.library", __version__)


def _entries(tensor: "GGUFTensor", rank: int) -> tuple[Entry, Entry]:
    *experts, rows, columns = tensor.shape
    return (
        Entry(f"{tensor.name}.lora_a", (*experts, rank, columns), GGMLType.F16),
        Entry(f"{tensor.name}.lora_b", (*experts, rows, rank), GGMLType.F16),
    )


def _lossy_tensors(file: GGUFFile, tensors: "Sequence[GGUFTensor]") -> "list[GGUFTensor]":
    """The matrices that are stored in blocks, after making sure that file and model have the same tensors."""
    found = {name: tuple(int(size) for size in reversed(stored.shape)) for name, stored in file.tensors.items()}
    promised = {tensor.name: tensor.shape for tensor in tensors}
    differing = sorted(name for name in found.keys() | promised.keys() if found.get(name) != promised.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{file.path} is not an export of this model: {name} is {_shape(found.get(name))}, the model's is "
            f"{_shape(promised.get(name))}"
        )
    lossy = [tensor for tensor in tensors if _is_adapted(tensor) and file.is_quantized(tensor.name)]
    if not lossy:
        raise CheckpointError(f"{file.path} has no quantized matrix, so there is no residual to put into an adapter")
    return lossy


def _is_adapted(tensor: "GGUFTensor") -> bool:
    return len(tensor.shape) >= 2 and "token_embd" not in tensor.name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _check_rank(rank: int, tensors: "Sequence[GGUFTensor]") -> None:
    smallest = min(tensors, key=lambda tensor: min(tensor.shape[-2:]))
    limit = min(smallest.shape[-2:])
    if not 1 <= rank <= limit:
        raise ConfigError(f"rank must be from 1 to {limit}, the rank of {smallest.name}, got {rank}")


def _factors(
    file: GGUFFile,
    tensors: "Sequence[GGUFTensor]",
    weights: "ModelWeights",
    rank: int,
    importance: Mapping[str, Tensor],
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of A and of B of every tensor in turn, float16 `[rank, in]` and `[out, rank]`, experts stacked."""
    for tensor in tensors:
        stored = file.tensor(tensor.name)
        of_inputs = importance.get(tensor.name)
        factors = []
        for expert, original in enumerate(tensor.parts(weights)):
            stacked = len(tensor.shape) == 3
            kept = stored[expert] if stacked else stored
            residual = original.float() - kept
            if residual.norm() > original.float().norm():
                raise CheckpointError(
                    f"{file.path} is not an export of this model: {tensor.name} differs by more than the model's "
                    "whole weight"
                )
            moment = of_inputs[expert] if stacked and of_inputs is not None else of_inputs
            factors.append(factorize(residual, rank, moment))
        for side in zip(*factors, strict=True):
            yield torch.stack(side).half().numpy().view(np.uint8)
        weights.release()


def factorize(residual: Tensor, rank: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The matrices `A` and `B` of a rank for which `(residual - B @ A) @ inputs` is smallest.

    `B` spans the largest left singular vectors of the residual times the square root of the inputs' second moment;
    for a given span the best `A` is the projection of the residual itself, so no square root is ever inverted. The
    norms of `A` and `B` are balanced for every component, so that float16 holds both.

    Args:
        residual: Float32 `[out, in]`.
        rank: At most the smaller of `out` and `in`.
        importance: Mean squares of the inputs, floating point `[in]`, or their second moment `[in, in]`.

    Returns:
        `A` float32 `[rank, in]` and `B` float32 `[out, rank]`.
    """
    weighted = residual
    if importance is not None and bool(importance.any()):
        importance = importance.float() / importance.max()
        weighted = residual * importance.sqrt() if importance.dim() == 1 else residual @ _square_root(importance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same file every time
        vectors, _, _ = torch.svd_lowrank(weighted, q=min(rank + _OVERSAMPLING, *weighted.shape), niter=_TURNS)
    B = vectors[:, :rank]
    A = B.T @ residual
    balance = A.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return A / balance[:, None], B * balance


def _square_root(moment: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
