"""ggml's block types, quantized by ggml itself.

The code is the one that `llama-quantize` runs: the wheel of `xllamacpp` exports it, and it is called here through
ctypes with plain integers and pointers only, because llama.cpp's structs change from release to release. Reading
back goes through `gguf`, whose numpy code shares nothing with ggml's. Both libraries come with the `gguf` extra and
are loaded at the first call. That call also quantizes one known row and compares the bytes with those of the tested
version, so that another layout or another rounding is an error here and not a broken file later.
"""

import ctypes
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import cache, cached_property
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srd_modifier._extras import require
from srd_modifier.errors import SRDError

TESTED_XLLAMACPP = "2026.10.11549"

# The size up to which torch converts and compares in the calling thread. Its own threads, one set for each of ours,
# wait for one another at every block: on two busy cores that made Q8_0 thirty times slower.
_BLOCK_WEIGHTS = 1 << 15
_FP16_MAX = 65504.0


class GGMLType(str, Enum):
    """A type of GGUF tensors, by the name that `gguf` and llama.cpp give it."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"

    @cached_property  # asked for at every block of rows
    def number(self) -> int:
        """The type's number in a GGUF file and in ggml's interface."""
        return int(self.in_gguf())

    @property
    def block_weights(self) -> int:
        """How many weights of a row share a block; a row is made of whole blocks."""
        return _gguf().GGML_QUANT_SIZES[self.in_gguf()][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _gguf().GGML_QUANT_SIZES[self.in_gguf()][1]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights.

        Raises:
            ValueError: the row is not made of whole blocks.
        """
        if columns % self.block_weights:
            raise ValueError(
                f"rows of {columns} weights cannot be {self.value}, whose blocks are of {self.block_weights}"
            )
        return columns // self.block_weights * self.block_bytes

    def in_gguf(self) -> Any:
        """The member of `gguf.GGMLQuantizationType`."""
        return _gguf().GGMLQuantizationType[self.name]


# SHA-256 of the blocks that the tested version makes of `_known_row`, without and with its importance
_KNOWN_DIGESTS = {
    (GGMLType.Q8_0, False): "af08abcb043629759a774c748018b7eca2f63a64ecb3263735be377b6a6bd7e9",
    (GGMLType.Q4_K, False): "f2d5df1c84135b15a2dd471bdc660b06a5c46114daf079f98f31748baa4b8190",
    (GGMLType.Q4_K, True): "d7e087095ee0e6cbff83ffd529171a18d98a7d94f52290fde1239a1123a0acdf",
}


def bits_per_weight(ggml_type: GGMLType) -> float:
    """Bits that a weight takes, scales and mins included."""
    return 8 * ggml_type.block_bytes / ggml_type.block_weights


def quantize(
    weight: Tensor, ggml_type: GGMLType, importance: Tensor | None = None, *, threads: int | None = None
) -> NDArray[np.uint8]:
    """Quantize a weight as `llama-quantize` does, byte for byte.

    Rows are independent, so the bytes do not depend on `threads`.

    Args:
        weight: Floating point `[out, in]` on any device, read as float32. `in` is a multiple of the type's block.
        ggml_type: The type to quantize to.
        importance: Mean square of each input, floating point `[in]`, as an imatrix file holds it. Entries are
            positive: ggml stores a block of zero importance as zeros. Squares and sums are taken in float32, so
            entries far outside 1e-8 to 1e8 are treated as if there were no importance. F32, F16, BF16 and Q8_0
            do not use it.
        threads: How many threads to use, by default as many as this process has processors. A small weight takes
            one, whatever is said here.

    Returns:
        The rows' blocks, contiguous, uint8 `[out, row_bytes]`.

    Raises:
        MissingExtraError: xllamacpp or gguf is not installed.
        SRDError: this xllamacpp does not do what the tested version does.
        ValueError: the weight is not a matrix, has rows that are not whole blocks, or has entries that are not
            finite or are too large for the type; the importance does not fit it; or `threads` is not positive.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"expected a floating point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    rows, columns = weight.shape
    weight = weight.detach()
    importance = None if importance is None else _checked_importance(importance.detach(), columns)
    out = np.empty((rows, ggml_type.row_bytes(columns)), np.uint8)
    library = _library()  # before the threads start, which would each load it
    block_rows = max(1, _BLOCK_WEIGHTS // columns)
    blocks = deque(slice(start, start + block_rows) for start in range(0, rows, block_rows))

    def work() -> None:
        values = torch.empty(min(block_rows, rows), columns)  # again and again: new memory would be slower
        while True:
            try:
                block = blocks.popleft()
            except IndexError:  # all are taken
                return
            part = weight[block]
            _quantize_rows(library, values[: len(part)].copy_(part), ggml_type, importance, out[block])

    # ctypes releases the interpreter's lock during the call
    others = [_pool().submit(work) for _ in range(1, min(threads or _processors(), len(blocks)))]
    try:
        work()
    finally:
        blocks.clear()  # after an error the others stop, too
    for other in others:
        if not other.cancel():  # it began
            other.result()
    return out


def validate(data: NDArray[np.uint8], ggml_type: GGMLType) -> bool:
    """Whether ggml finds only finite scales, mins or floats in `data` uint8 `[out, row_bytes]`.

    It is the check of llama.cpp's `--check-tensors`. ggml names the first bad block on stderr.

    Raises:
        MissingExtraError: xllamacpp or gguf is not installed.
        SRDError: this xllamacpp does not do what the tested version does.
        ValueError: `data` is not a matrix of bytes, or its rows are not whole blocks.
    """
    return _is_valid(_library(), _checked_data(data, ggml_type), ggml_type)


def dequantize(data: NDArray[np.uint8], ggml_type: GGMLType) -> Tensor:
    """The weights, float32 `[out, in]`, that `data` uint8 `[out, row_bytes]` stands for; by gguf, not by ggml.

    Raises:
        MissingExtraError: gguf is not installed.
        ValueError: `data` is not a matrix of bytes, or its rows are not whole blocks.
    """
    weights = _gguf().quants.dequantize(_checked_data(data, ggml_type), ggml_type.in_gguf())
    # float32 comes back as a view of `data`, which may be a read-only file
    return torch.from_numpy(weights.copy() if ggml_type is GGMLType.F32 else weights)


def _checked_importance(importance: Tensor, columns: int) -> Tensor:
    """`importance` as contiguous float32 on the CPU."""
    if importance.shape != (columns,) or not importance.is_floating_point():
        raise ValueError(
            f"expected a floating point importance [{columns}], got {importance.dtype} of shape "
            f"{tuple(importance.shape)}"
        )
    importance = importance.to("cpu", torch.float32).contiguous()
    if not bool((torch.isfinite(importance) & (importance > 0)).all()):
        raise ValueError("the importance has entries that are not positive and finite in float32")
    return importance


def _checked_data(data: NDArray[np.uint8], ggml_type: GGMLType) -> NDArray[np.uint8]:
    if data.ndim != 2 or data.dtype != np.uint8 or 0 in data.shape:
        raise ValueError(f"expected a matrix of uint8, got {data.dtype} of shape {data.shape}")
    if data.shape[1] % ggml_type.block_bytes:
        raise ValueError(
            f"rows of {data.shape[1]} bytes cannot be {ggml_type.value}, whose blocks are of {ggml_type.block_bytes}"
        )
    return np.ascontiguousarray(data)


def _quantize_rows(
    library: ctypes.CDLL, weight: Tensor, ggml_type: GGMLType, importance: Tensor | None, out: NDArray[np.uint8]
) -> None:
    """Quantize `weight` float32 `[rows, in]` into `out` uint8 `[rows, row_bytes]`, both contiguous."""
    low, high = (float(extreme) for extreme in torch.aminmax(weight))  # NaN if any entry is
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise ValueError("the weight has entries that are not finite in float32")
    # Scales are fp16. Far above its range the K-quants' sums overflow, and they store zeros without a sign of it.
    if largest > _FP16_MAX and ggml_type not in (GGMLType.F32, GGMLType.BF16):
        raise ValueError(f"the weight has an entry of magnitude {largest:.4g}, too large for {ggml_type.value}")
    library.ggml_quantize_chunk(
        ggml_type.number,
        weight.data_ptr(),
        out.ctypes.data,
        0,
        *weight.shape,
        None if importance is None else importance.data_ptr(),
    )
    if not _is_valid(library, out, ggml_type):
        raise ValueError(f"the weight, with this importance, gives {ggml_type.value} scales that are not finite")


def _is_valid(library: ctypes.CDLL, data: NDArray[np.uint8], ggml_type: GGMLType) -> bool:
    return library.ggml_validate_row_data(ggml_type.number, data.ctypes.data, data.nbytes)


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # containers and batch systems allow fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait for the next weight: to start them anew costs as much as thousands of weights."""
    return ThreadPoolExecutor(thread_name_prefix="srd-ggml")


def _gguf() -> Any:
    """The library `gguf`, not the package this module is in."""
    require("gguf", extra="gguf")
    return import_module("gguf")


@cache
def _library() -> ctypes.CDLL:
    """ggml, loaded, declared and checked."""
    require("xllamacpp", extra="gguf")
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise SRDError(f"{path} is not a library that exports ggml's quantizer ({error}); {_advice()}") from error
    _check(library)
    return library


def _library_path() -> Path:
    """The extension module of xllamacpp, found without running it: it would set up llama.cpp as a whole."""
    spec = find_spec("xllamacpp")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = [path for folder in folders for pattern in ("*.so", "*.pyd") for path in folder.glob(f"xllamacpp{pattern}")]
    if not found:
        raise SRDError(f"xllamacpp has no extension module in {', '.join(map(str, folders))}; {_advice()}")
    return found[0]


def _declare(library: ctypes.CDLL) -> None:
    """The C signatures; an enum is an int, and a row of floats is passed by its address."""
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # const float * src
        ctypes.c_void_p,  # void * dst
        ctypes.c_int64,  # start, in weights
        ctypes.c_int64,  # nrows
        ctypes.c_int64,  # n_per_row
        ctypes.c_void_p,  # const float * imatrix, or NULL
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool


def _check(library: ctypes.CDLL) -> None:
    """Raise SRDError unless `library` writes what the tested version writes."""
    weight, importance = _known_row()
    columns = weight.shape[1]
    # sizes first: with other ones, ggml would write past the end of what is allocated here
    for ggml_type in GGMLType:
        if library.ggml_row_size(ggml_type.number, columns) != ggml_type.row_bytes(columns):
            raise _differs(ggml_type)
    for (ggml_type, weighted), digest in _KNOWN_DIGESTS.items():
        out = np.empty((1, ggml_type.row_bytes(columns)), np.uint8)
        _quantize_rows(library, weight, ggml_type, importance if weighted else None, out)
        if sha256(out.tobytes()).hexdigest() != digest:
            raise _differs(ggml_type)


def _known_row() -> tuple[Tensor, Tensor]:
    """Integers without a pattern, as weight float32 `[1, 256]` and importance float32 `[256]`.

    Their codes and scales are away from every rounding limit: changing each weight at random by up to one part in
    a million leaves the bytes as they are. So a compiler that fuses multiplications with additions, whose results
    differ by less than that, is not taken for another version.
    """
    index = torch.arange(256)
    return ((index * index * 7 + index * 13) % 251 - 125.0).unsqueeze(0), index * 5 % 17 + 1.0


def _differs(ggml_type: GGMLType) -> SRDError:
    return SRDError(
        f"the ggml in xllamacpp {version('xllamacpp')} lays out or rounds {ggml_type.value} blocks differently from "
        f"the tested version, {TESTED_XLLAMACPP}; {_advice()}"
    )


def _advice() -> str:
    return f"pip install 'xllamacpp=={TESTED_XLLAMACPP}' helps"
