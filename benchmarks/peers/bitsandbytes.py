"""bitsandbytes: NF4 with double quantization, and LLM.int8(), through Transformers' integration."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.base import Made, Setting, Unavailable, require, versions

_BLOCK = 64  # Transformers' integration leaves no choice


def make(setting: Setting) -> Iterator[Made]:
    """NF4; then one int8 checkpoint twice, as its package computes with it and by its weights alone."""
    require("bitsandbytes")
    require("accelerate")
    from transformers.integrations import validate_bnb_backend_availability

    if not validate_bnb_backend_availability():
        raise Unavailable("bitsandbytes finds no device here that it supports.")
    # blocks of 64 weights run along the rows one after another, as the settings of other peers ask for
    path, seconds = _saved(setting, "nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    yield _made(f"NF4 g{_BLOCK}, double quant", path, seconds)
    path, seconds = _saved(setting, "int8", load_in_8bit=True)
    yield _made(
        "LLM.int8()", path, seconds, note="LLM.int8() rounds activations to 8 bits too, as its package always does."
    )
    yield _made("LLM.int8(), weights alone", path, seconds, dequantized=True)


def _saved(setting: Setting, name: str, **config: Any) -> tuple[Path, float]:
    """Quantize, save; gives the directory, and the seconds it took."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        setting.model,
        dtype="auto",
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**config, llm_int8_skip_modules=["lm_head"]),
    )
    path = setting.folder / f"bitsandbytes-{name}"
    model.save_pretrained(path)
    return path, time.perf_counter() - started


def _made(label: str, path: Path, seconds: float, *, dequantized: bool = False, note: str | None = None) -> Made:
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Made(
        label,
        "bitsandbytes",
        path,
        versions("bitsandbytes"),
        seconds,
        load=partial(_load, path, dequantized=dequantized),
        bytes_on_disk=size,
        note=note,
    )


def _load(path: Path, *, dequantized: bool) -> Any:
    from transformers import AutoModelForCausalLM

    # of every int8 layer, in every batch: that inputs become float16 before they become int8
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    if dequantized:
        model = model.dequantize(dtype=torch.float32)
    return model.eval()
