"""The result of an evaluation, as `srd eval` prints it and writes it to JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from srd_modifier.checkpoint.sizes import CheckpointSize
from srd_modifier.evaluation.scores import Divergence, Perplexity
from srd_modifier.evaluation.windows import WindowRule


@dataclass(frozen=True)
class Report:
    """Everything needed to read the figures later, and to measure them again.

    Attributes:
        model: Name of the scored model.
        reference: Name of the model the divergence is measured from, if any.
        text_path: The scored file.
        text_sha256: SHA-256 of its bytes, hexadecimal.
        rule: How the text was cut into windows.
        perplexity: Perplexity over the scored tokens.
        divergence: Divergence from the reference, `None` without one.
        size: What the model costs on disk, with the residual of the corrected modules only.
        dtype: What both models computed in, such as `float32`.
        alpha: Share of the residual applied, `None` for a model without one.
        chunks: Chunks whose residual was applied, `None` for all or for a model without one.
        seconds: Time spent scoring, loading excluded.
        versions: Installed version of each library that the figures depend on.
        predicted_kld: The divergence that the checkpoint's sensitivity predicts with the residual as it was applied,
            `None` where it has no sensitivity.
    """

    model: str
    reference: str | None
    text_path: str
    text_sha256: str
    rule: WindowRule
    perplexity: Perplexity
    divergence: Divergence | None
    size: CheckpointSize
    dtype: str
    alpha: float | None
    chunks: tuple[str, ...] | None
    seconds: float
    versions: dict[str, str]
    predicted_kld: float | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per Linear weight of the decoder layers, `None` where no such weight could be told by its name."""
        return None if math.isnan(self.size.bits_per_weight) else self.size.bits_per_weight

    @property
    def total_bits_per_weight(self) -> float | None:
        """Bits on disk over all weights, embeddings and file headers included, `None` where there are no weights."""
        total = self.size.total_bits_per_weight
        return None if math.isnan(total) else total

    @property
    def predicted_ratio(self) -> float | None:
        """Predicted over measured divergence, `None` where one of the two is missing or nothing was lost."""
        if self.predicted_kld is None or self.divergence is None or self.divergence.kld_mean <= 0:
            return None
        return self.predicted_kld / self.divergence.kld_mean

    def as_json(self) -> dict[str, Any]:
        """The flat object that `--json` writes. Without a reference the divergence keys are absent."""
        return {
            "model": self.model,
            "reference": self.reference,
            "text": {"path": self.text_path, "sha256": self.text_sha256},
            **asdict(self.perplexity),
            **({} if self.divergence is None else asdict(self.divergence)),
            "predicted_kld": self.predicted_kld,
            "predicted_ratio": self.predicted_ratio,
            "bytes_on_disk": self.size.bytes_on_disk,
            "bits_per_weight": self.bits_per_weight,
            "total_bits_per_weight": self.total_bits_per_weight,
            "convention": self.rule.convention.value,
            "ctx": self.rule.ctx,
            "stride": self.rule.stride,
            "dtype": self.dtype,
            "alpha": self.alpha,
            "chunks": None if self.chunks is None else list(self.chunks),
            "seconds": round(self.seconds, 3),
            "versions": self.versions,
        }
