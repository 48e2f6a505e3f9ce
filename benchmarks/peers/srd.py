"""Ours: checkpoints by budget, W4 with feedback alone, an int8 residual on GPTQ, and calibrated GGUF files."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.base import Family, Made, Setting, require, versions
from benchmarks.peers.oneshot import run_oneshot, w4a16

BUDGETS = ((4.8, 0.6), (5.5, 0.6), (6.5625, 0.6), (8.5, 0.6), (8.5, 1.0))
"""Bits per weight, and the balance of the base: 0.6 is good with the residual and without, 1 best with it."""


def make(setting: Setting, *, budgets: Sequence[tuple[float, float]] = BUDGETS) -> Iterator[Made]:
    """Checkpoints, then files."""
    require("llmcompressor")
    yield from by_budget(setting, budgets)
    yield from on_gptq(setting)
    require("gguf")
    require("xllamacpp")
    yield from gguf(setting)


def by_budget(setting: Setting, budgets: Sequence[tuple[float, float]]) -> Iterator[Made]:
    """One checkpoint for each budget, and before the first of each balance its base alone."""
    from srd_modifier import SRDModifier

    bases = set()
    for bits, balance in budgets:
        modifier = SRDModifier(
            **w4a16(setting),
            base_rounding="feedback",
            balance=balance,
            correct={"budget": f"{bits:g}bpw"},
            seed=setting.seed,
            spool_dir=str(setting.folder),
        )
        path = setting.folder / f"srd-{bits:g}-{balance:g}"
        seconds = _run(setting, [modifier], path)
        if balance not in bases:
            bases.add(balance)
            label = f"SRD W4 g{setting.group_size} feedback alone, balance {balance:g}"
            yield _made(label, "SRD W4, D8", path, seconds, alpha=0.0)
        yield _made(f"SRD budget {bits:g} bpw, balance {balance:g}", "SRD by budget", path, seconds)


def on_gptq(setting: Setting) -> Iterator[Made]:
    """GPTQ with an int8 residual of all layers; the published selective rule loads only the middle of it."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    from srd_modifier import SRDModifier

    scheme = w4a16(setting)
    modifier = SRDModifier(ignore=scheme["ignore"], seed=setting.seed, spool_dir=str(setting.folder))
    path = setting.folder / "srd-gptq"
    seconds = _run(setting, [modifier, GPTQModifier(**scheme)], path)
    label = f"GPTQ W4 g{setting.group_size} + D8"
    yield _made(f"{label}, 40-77 % of depth", "SRD W4, D8", path, seconds, chunks=("reasoning",))
    yield _made(label, "SRD W4, D8", path, seconds)


def gguf(setting: Setting) -> Iterator[Made]:
    """A calibrated Q4_K_M, and a file that is no larger with types by budget."""
    from srd_modifier.gguf.calibration.text import Calibration
    from srd_modifier.gguf.export import export_gguf
    from srd_modifier.gguf.mixture import FileType
    from srd_modifier.selection.budget import Budget

    calibration = Calibration(
        "calibration samples",
        num_samples=len(setting.samples),
        max_seq_length=setting.max_seq_length,
        seed=setting.seed,
        samples=setting.samples,
    )
    file = setting.folder / "srd-Q4_K_M.gguf"
    started = time.perf_counter()
    size = export_gguf(setting.model, file, file_type=FileType.Q4_K_M, calibration=calibration).bytes
    yield _made("SRD Q4_K_M, calibrated", "SRD GGUF", file, time.perf_counter() - started)
    file = setting.folder / "srd-budget.gguf"
    started = time.perf_counter()
    export_gguf(setting.model, file, calibration=calibration, budget=Budget(bytes=size))
    yield _made("SRD GGUF by budget, bytes of Q4_K_M", "SRD GGUF", file, time.perf_counter() - started)


def _run(setting: Setting, recipe: list[Any], path: Path) -> float:
    try:
        return run_oneshot(setting, recipe, path)
    finally:
        recipe[0].close()


def _made(label: str, family: Family, path: Path, seconds: float, **dial: Any) -> Made:
    return Made(label, family, path, versions("srd-modifier"), seconds, **dial)
