"""What every maker is given, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Family = Literal[
    "llm-compressor",
    "AutoRound",
    "ggml",
    "bitsandbytes",
    "HQQ",
    "QERA-approx",
    "QERA-exact",
    "SRD by budget",
    "SRD W4, D8",
    "SRD GGUF",
]


@dataclass(frozen=True)
class Setting:
    """What every peer is made from.

    Attributes:
        model: directory or hub id of the bf16 original.
        samples: token ids to calibrate on, the same for every peer that calibrates.
        max_seq_length: tokens of the longest sample, at least.
        folder: where to write.
        group_size: weights per scale, for every format that leaves the choice.
        seed: of everything random.
    """

    model: str
    samples: list[list[int]]
    max_seq_length: int
    folder: Path
    group_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """One row of the comparison.

    Attributes:
        label: what the row is called, such as `GPTQ W4 g64`.
        family: whose it is, for the colours of the plot.
        path: model directory or GGUF file.
        package: name and version of what made it, such as `llmcompressor 0.14.0.1`.
        seconds: to make it, from reading the original to the last byte written; a part that several rows share counts
            in each of them.
        load: reads what is at `path` as a Transformers model that computes in float32 on the CPU, for formats that
            `srd_modifier.evaluation.load` cannot read; None where it can.
        alpha: dial of a checkpoint with a residual.
        chunks: likewise.
        bytes_on_disk: sum of the files that hold weights, where the loader cannot say.
        note: what a reader must know of the row, one sentence.
    """

    label: str
    family: Family
    path: Path
    package: str
    seconds: float
    load: Callable[[], Any] | None = None
    alpha: float | None = None
    chunks: tuple[str, ...] | None = None
    bytes_on_disk: int | None = None
    note: str | None = None


class Unavailable(Exception):  # noqa: N818 - what it says of a peer, not a fault
    """A peer that cannot run here; the message is the reason, one sentence for the footnote of the table."""


def require(module: str) -> None:
    """Raise Unavailable unless `module` is installed."""
    if find_spec(module) is None:
        raise Unavailable(f"{module} is not installed.")


def versions(*distributions: str) -> str:
    """Names and versions of installed packages, for `Made.package`."""
    return ", ".join(f"{name} {version(name)}" for name in distributions)
