"""HQQ: 4 bits in groups, made, saved and read by its own package.

Transformers 5.17 has an `HqqConfig`, but `from_pretrained` with one ends in a NotImplementedError that says HQQ is "not
available yet". The package's own engine works.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.base import Made, Setting, require, versions


def make(setting: Setting) -> Iterator[Made]:
    """One checkpoint, with HQQ's defaults: groups along the rows, scales and zeros in float16."""
    require("hqq")
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype="auto")
    config = BaseQuantizeConfig(nbits=4, group_size=setting.group_size)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    path = setting.folder / "hqq"
    AutoHQQHFModel.save_quantized(model, str(path))
    seconds = time.perf_counter() - started
    yield Made(
        f"HQQ W4 g{setting.group_size}",
        "HQQ",
        path,
        versions("hqq"),
        seconds,
        load=partial(_load, path),
        bytes_on_disk=(path / "qmodel.pt").stat().st_size,
    )


def _load(path: Path) -> Any:
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(str(path), compute_dtype=torch.float32, device="cpu").eval()
