"""llama.cpp's K-quants, rounded by ggml itself with an importance vector from the calibration samples."""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.base import Made, Setting, require, versions
from benchmarks.peers.moments import mean_squares

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def make(setting: Setting) -> Iterator[Made]:
    """A GGUF file of every type."""
    require("gguf")
    require("xllamacpp")
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType

    started = time.perf_counter()
    imatrix = _imatrix(setting)
    shared = time.perf_counter() - started
    for name in TYPES:
        file = setting.folder / f"ggml-{name}.gguf"
        started = time.perf_counter()
        export_gguf(setting.model, file, file_type=FileType(name), imatrix=imatrix)
        seconds = shared + time.perf_counter() - started
        yield Made(
            f"ggml {name}",
            "ggml",
            file,
            versions("xllamacpp"),
            seconds,
            note="Rounded by the ggml library in xllamacpp, with importance: byte for byte llama-quantize's.",
        )


def _imatrix(setting: Setting) -> Path:
    """The importance of the samples, in llama.cpp's form."""
    from srd_modifier.gguf.importance import importance_by_tensor, write_imatrix
    from srd_modifier.gguf.plan import plan_export

    tensors = plan_export(setting.model, use_importance=False).tensors
    importance = importance_by_tensor(tensors, mean_squares(setting))
    path = setting.folder / "imatrix.gguf"
    write_imatrix(path, importance, dataset="calibration samples", tokens=sum(map(len, setting.samples)))
    return path
