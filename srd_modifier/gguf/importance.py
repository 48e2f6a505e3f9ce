"""Importance of a weight's inputs, shared with llama.cpp as imatrix files.

An imatrix in GGUF form holds, per tensor of the model, the sum of each input's squares (`in_sum2`) and how many inputs
were summed (`counts`), both per expert. Importance is their quotient, the mean square that `ggml.quantize` takes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srd_modifier._extras import require
from srd_modifier.checkpoint.atomic import sibling
from srd_modifier.errors import CheckpointError

if TYPE_CHECKING:
    from srd_modifier.gguf.families.base import GGUFTensor

_SUMS = ".in_sum2"
_COUNTS = ".counts"
_CHUNK = 512  # inputs that llama.cpp calls a chunk, unless it is told otherwise

# What an input that was always zero counts for, as a share of the mean. ggml would round a block of such inputs to
# zeros; with this they are of no weight beside others, and kept among themselves.
_LEAST_SHARE = 1e-6


def read_imatrix(path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read an imatrix file.

    Experts that the calibration data never reached have the importance 1 for every input, as in llama.cpp. Inputs
    that were always zero get a millionth of the mean.

    Args:
        path: A file by `llama-imatrix` or `write_imatrix`.
        shapes: The model's tensors by GGUF name, in torch's order. With them, only what belongs to the model is
            returned, and its size is checked. An embedding's is left out if it does not fit, as llama.cpp does:
            its input are tokens.

    Returns:
        Importance by GGUF tensor name: float32 `[in]`, or `[experts, in]`; positive.

    Raises:
        MissingExtraError: gguf is not installed.
        CheckpointError: The file is missing, damaged, of another kind, or of another model; the message names the
            tensor at fault.
    """
    path = Path(path)
    stored = _read(path)
    names = sorted(
        {name.removesuffix(suffix) for suffix in (_SUMS, _COUNTS) for name in stored if name.endswith(suffix)}
    )
    if not names:
        raise CheckpointError(f"{path}: the imatrix has no entries")
    importance = {
        name: _mean_square(path, name, stored.get(name + _SUMS), stored.get(name + _COUNTS)) for name in names
    }
    if shapes is None:
        return importance
    fitted = {name: _fitted(path, name, importance[name], shapes[name]) for name in names if name in shapes}
    if not fitted:
        raise CheckpointError(f"{path} has importance for no tensor of this model, but for {names[0]} and others")
    return {name: value for name, value in fitted.items() if value is not None}


def write_imatrix(path: str | Path, importance: Mapping[str, Tensor], *, dataset: str, tokens: int = 1) -> None:
    """Write an imatrix file that `llama-quantize --imatrix` reads. The file appears whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        importance: By GGUF tensor name: `[in]`, or `[experts, in]`.
        dataset: Where the inputs are from, for the reader of the file.
        tokens: How many inputs the means were taken over; `llama-imatrix` weighs files by it when it merges them.

    Raises:
        MissingExtraError: gguf is not installed.
        CheckpointError: The disk refused to write.
        ValueError: There is nothing to write, or a value is not a matrix or a vector, or is negative or not finite.
    """
    if not importance or tokens < 1:
        raise ValueError(f"expected importance over at least one token, got {len(importance)} tensors, {tokens} tokens")
    require("gguf", extra="gguf")
    path = Path(path)
    temporary = sibling(path)
    try:
        writer = import_module("gguf").GGUFWriter(temporary, "")
        writer.kv_data[0].clear()  # an imatrix has no architecture
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", -(-tokens // _CHUNK))
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        for name in sorted(importance):
            values = importance[name].detach().to("cpu", torch.float32)
            if values.dim() not in (1, 2) or not _is_valid(values):
                raise ValueError(f"the importance of {name} is not a vector or a matrix of positive numbers")
            sums = torch.atleast_2d(values) * tokens
            writer.add_tensor(name + _SUMS, sums.numpy())
            writer.add_tensor(name + _COUNTS, torch.full((len(sums), 1), float(tokens)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def importance_by_tensor(tensors: Sequence["GGUFTensor"], by_module: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Importance by GGUF tensor from importance by Hugging Face module.

    Where some experts of a tensor have none, because no token reached them, theirs is 1 for every input.

    Args:
        tensors: The tensors of the file.
        by_module: Mean squared input, floating point `[in]`, by the module that multiplies it.

    Returns:
        Float32 `[in]`, or `[experts, in]`, for the tensors whose modules have it; positive.

    Raises:
        CheckpointError: Importance does not fit the tensor, is negative or is not finite.
    """
    importance = {}
    for tensor in tensors:
        modules = [piece.module for piece in tensor.pieces]
        if not any(module in by_module for module in modules):
            continue
        columns = tensor.shape[-1]
        values = [by_module.get(module or "", torch.ones(columns)).to("cpu", torch.float32) for module in modules]
        for module, value in zip(modules, values, strict=True):
            if value.shape != (columns,):
                raise CheckpointError(
                    f"the importance of {module} is of shape {tuple(value.shape)}, {tensor.name} takes [{columns}]"
                )
            if not _is_valid(value):
                raise CheckpointError(f"the importance of {module} has entries that are negative or not finite")
        importance[tensor.name] = _positive(torch.stack(values) if len(tensor.shape) > 2 else values[0])
    return importance


def _read(path: Path) -> dict[str, Any]:
    """The tensors of an imatrix file as `gguf` describes them."""
    require("gguf", extra="gguf")
    with _damage_named(path):
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(
                    f"{path} is not an imatrix in GGUF form; "
                    "llama-imatrix --in-file OLD -o NEW.gguf makes one of the older form"
                )
        reader = import_module("gguf").GGUFReader(path)
        kind = reader.fields["general.type"].contents() if "general.type" in reader.fields else None
    if kind != "imatrix":
        raise CheckpointError(f"{path} is no imatrix, its general.type is {kind!r}")
    return {tensor.name: tensor for tensor in reader.tensors}


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a whole GGUF file: {error}") from error


def _mean_square(path: Path, name: str, sums: Any, counts: Any) -> Tensor:
    """Importance of one tensor, `[in]` or `[experts, in]`."""
    if sums is None or counts is None:
        present, absent = (_COUNTS, _SUMS) if sums is None else (_SUMS, _COUNTS)
        raise CheckpointError(f"{path}: there is {name}{present} without {name}{absent}")
    if not (sums.tensor_type.name == counts.tensor_type.name == "F32"):
        raise CheckpointError(f"{path}: the sums and counts of {name} are not F32")
    count = torch.tensor(counts.data.reshape(-1, 1)).round()
    total = torch.tensor(sums.data.reshape(-1))
    if count.numel() == 0 or total.numel() == 0 or total.numel() % count.numel():
        raise CheckpointError(f"{path}: {name} has {total.numel()} sums for {count.numel()} counts")
    if not _is_valid(count) or not _is_valid(total):
        raise CheckpointError(f"{path}: the sums or counts of {name} have entries that are negative or not finite")
    total = total.reshape(count.numel(), -1)
    means = _positive(torch.where(count > 0, total / count, torch.ones_like(total)))
    return means[0] if len(means) == 1 else means


def _fitted(path: Path, name: str, importance: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`importance` as a tensor of this shape takes it, or None for an embedding's that does not fit."""
    expected = (shape[0], shape[-1]) if len(shape) == 3 else (shape[-1],)
    if importance.numel() == torch.Size(expected).numel():
        return importance.reshape(expected)
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return None
    raise CheckpointError(
        f"{path}: {name} has importance of shape {list(importance.shape)}, the model's takes {list(expected)}; "
        "the imatrix is of another model"
    )


def _is_valid(values: Tensor) -> bool:
    return bool((torch.isfinite(values) & (values >= 0)).all())


def _positive(values: Tensor) -> Tensor:
    """`values` `[..., in]` with zeros replaced by a small share of the mean, or by 1 where all are zero."""
    mean = values.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, torch.where(values > 0, values, mean * _LEAST_SHARE), torch.ones_like(values))
