"""llm-compressor: round-to-nearest, GPTQ, and AWQ followed by round-to-nearest, all W4A16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.peers.base import Made, Setting, require, versions
from benchmarks.peers.oneshot import run_oneshot, w4a16

_SCHEME_NOTE = "AWQ has the symmetric scheme of the other rows here; the recipes of its authors are asymmetric."
_PINNING_NOTE = (
    " llm-compressor pins AWQ's cached inputs in memory and stops where there is no accelerator to copy them to; "
    "here it runs with the pinning switched off, which changes no number (docs/upstream.md)."
)


def make(setting: Setting) -> Iterator[Made]:
    """Three W4A16 checkpoints."""
    require("llmcompressor")
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    scheme, group = w4a16(setting), f"W4 g{setting.group_size}"
    yield _made(setting, "rtn", f"RTN {group}", [QuantizationModifier(**scheme)])
    yield _made(setting, "gptq", f"GPTQ {group}", [GPTQModifier(**scheme)])
    with _without_pinning() as note:
        awq = _made(setting, "awq", f"AWQ + RTN {group}", [AWQModifier(), QuantizationModifier(**scheme)], note)
    yield awq


def _made(setting: Setting, name: str, label: str, recipe: list[Any], note: str | None = None) -> Made:
    output = setting.folder / name
    seconds = run_oneshot(setting, recipe, output)
    return Made(label, "llm-compressor", output, versions("llmcompressor"), seconds, note=note)


@contextmanager
def _without_pinning() -> Iterator[str]:
    """On a machine without an accelerator, switch AWQ's pinning of memory off for a while; gives the note about it."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield _SCHEME_NOTE
        return
    original = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda self, *args: None
    try:
        yield _SCHEME_NOTE + _PINNING_NOTE
    finally:
        IntermediatesCache.pin_memory = original
