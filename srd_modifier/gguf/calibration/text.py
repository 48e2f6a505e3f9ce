"""The calibration text of an export, as token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from srd_modifier.calibration import SELF, from_file, from_model
from srd_modifier.errors import SRDError
from srd_modifier.gguf.metadata import CalibrationText


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    Attributes:
        source: a text or JSON file, or `self` for text that the model writes; with samples, what to call them.
        num_samples: at most so many.
        max_seq_length: tokens per sample.
        seed: of the choice, or of the writing.
        device: where calibration computes: cpu, cuda, or auto for CUDA where there is one.
        samples: token ids, where they are at hand already.
    """

    source: str
    num_samples: int = 64
    max_seq_length: int = 512
    seed: int = 0
    device: str = "auto"
    samples: Sequence[Sequence[int]] | None = None

    @property
    def resolved_device(self) -> str:
        """`device` with `auto` resolved.

        Raises:
            SRDError: it is CUDA, which is not there.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise SRDError(f"device {self.device} was asked for, but this installation of torch finds no CUDA device")
        return self.device


def read_samples(calibration: Calibration, directory: Path) -> tuple[list[list[int]], CalibrationText]:
    """The samples' token ids, and what the file's metadata says of them.

    Text that the model writes comes from the whole model in memory; a checkpoint with a residual writes it corrected.

    Args:
        calibration: what to read.
        directory: the model's, with its tokenizer.

    Raises:
        SRDError: file, tokenizer or model cannot be read, or there is no text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if calibration.samples is not None:
        given = [list(sample) for sample in calibration.samples if len(sample) > 1]
        if not given:
            raise SRDError(f"{calibration.source}: there is no text to calibrate on")
        least = min(map(min, given))
        if least < 0:
            raise SRDError(f"{calibration.source}: {least} is no token id")
        return given, _described(calibration.source, given)
    settings = {
        "num_samples": calibration.num_samples,
        "max_seq_length": calibration.max_seq_length,
        "seed": calibration.seed,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto") if calibration.source == SELF else None
    except (OSError, ValueError) as error:
        if isinstance(error, SRDError):
            raise
        raise SRDError(f"cannot load {directory}: {' '.join(str(error).split())}") from error
    if model is not None:
        samples = from_model(model.eval(), tokenizer, **settings)
        return samples, _described(SELF, samples)
    path = Path(calibration.source)
    samples = from_file(path, tokenizer, **settings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return samples, CalibrationText(name=path.name, sha256=digest, tokens=sum(map(len, samples)))


def _described(name: str, samples: list[list[int]]) -> CalibrationText:
    """Samples that are in no file: the digest is of their token ids."""
    ids = np.concatenate([np.array(sample, dtype="<u4") for sample in samples])
    return CalibrationText(name=name, sha256=hashlib.sha256(ids.tobytes()).hexdigest(), tokens=len(ids))
