"""One number per scored token: negative log-likelihood, and divergence from a reference model.

Both models read the same batch one after the other (or what the reference gave is read from disk, see `cache`) and
only the results per token are kept, so memory does not grow with the text. Logits come in the model's dtype;
log-probabilities are taken in float64, a slice of rows at a time. In float32 the rounding of the log-sum-exp alone puts
about 1e-6 on every token's divergence, which drowns the median and the tail of a good 8-bit model; in float64 it is
below 1e-14, for the same time on a CPU.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.windows import Window, batches, window_inputs

# Tokens the model reads in one batch when the caller does not say; enough to keep a matrix product busy.
DEFAULT_BATCH_TOKENS = 4096

# Float64 values in one slice of rows: 16 MiB, a handful of rows of a large vocabulary.
_SLICE_VALUES = 2**21


@dataclass(frozen=True)
class NamedModel:
    """A Transformers causal language model in evaluation mode, and the name its errors are reported under."""

    name: str
    model: Any


class ReferenceRows(Protocol):
    """What a reference says of the scored tokens of a batch, row by row in the order of the batch."""

    @property
    def top(self) -> Tensor:
        """The most likely token of each row, int64 [rows]."""
        ...

    @property
    def vocabulary(self) -> int:
        """Tokens that each row is a distribution over."""
        ...

    def log_probabilities(self, first: int, last: int) -> Tensor:
        """Of rows `first` to `last` (exclusive): float64 [rows, vocabulary], in nats."""
        ...


class Reference(Protocol):
    """What a divergence is measured from: a model, or what one gave before."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    def rows(self, batch: Sequence[Window], inputs: Tensor) -> ReferenceRows:
        """What it says of a batch's scored tokens.

        Args:
            batch: Windows of one length and one scored count.
            inputs: What a model reads of them, int64 [len(batch), length].
        """
        ...


@dataclass(frozen=True)
class LogitRows:
    """Logits [rows, vocabulary] as a model gives them, in its dtype."""

    logits: Tensor

    @property
    def top(self) -> Tensor:
        """The most likely token of each row."""
        return self.logits.argmax(-1)

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.logits.shape[-1])

    def log_probabilities(self, first: int, last: int) -> Tensor:
        """Of some rows, in float64."""
        return self.logits[first:last].double().log_softmax(dim=-1)


@dataclass(frozen=True)
class LiveReference:
    """A model that is asked while the candidate is scored."""

    model: NamedModel

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    def rows(self, batch: Sequence[Window], inputs: Tensor) -> LogitRows:
        """Its logits for a batch."""
        return LogitRows(scored_logits(self.model, inputs, batch[0].scored))


@dataclass(frozen=True)
class TokenScores:
    """Results of every scored token, in the order of the text, on the CPU.

    Attributes:
        nll: Negative log-likelihood in nats, float32 [tokens].
        divergence: KL(reference || model) over the full vocabulary in nats, float32 [tokens]; `None` without a
            reference.
        same_top: Whether the two most likely tokens are the same, bool [tokens]; `None` without a reference.
    """

    nll: Tensor
    divergence: Tensor | None = None
    same_top: Tensor | None = None


@dataclass(frozen=True)
class Perplexity:
    """`ppl` is exp(mean nll). Its standard error is by the delta method, ppl * std(nll) / sqrt(tokens).

    That takes tokens as independent. They are not (a hard passage is hard for many tokens), so the true error
    is larger; llama.cpp reports the same figure.
    """

    tokens: int
    ppl: float
    ppl_stderr: float


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) per token in nats, and the share of tokens on which both rank the same token first.

    `kld_stderr` is std / sqrt(tokens), with the same caveat as `Perplexity.ppl_stderr`.
    """

    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_stderr: float
    top1_agreement: float


def score_tokens(
    candidate: NamedModel,
    tokens: Tensor,
    windows: Sequence[Window],
    *,
    reference: NamedModel | Reference | None = None,
    first_token: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Score `windows` of `tokens` with one model, or with a candidate and a reference batch by batch.

    Args:
        candidate: The model to score, in evaluation mode.
        tokens: The stream, int64 [num_tokens], on the CPU.
        windows: Which windows to read and which of their tokens to score.
        reference: What the divergence is measured from: a model (it may be the same object), or what one gave before.
        first_token: Token id that replaces the first token of every window, `None` for none.
        batch_size: Windows read at once; `None` takes as many as make 4096 tokens.
        progress: Called at the start and after every batch with (windows done, windows in all).

    Raises:
        SRDError: `batch_size` is below 1, the vocabularies differ, or a model gives NaN or infinite logits.
    """
    size = default_batch_size(windows) if batch_size is None else batch_size
    if isinstance(reference, NamedModel):
        reference = LiveReference(reference)
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {size}")
    report_progress = progress or _ignore_progress
    report_progress(0, len(windows))
    parts: list[TokenScores] = []
    done = 0
    # Not inference_mode: a compressed model unpacks its weights on the first forward pass, and weights made
    # there could never be changed again.
    with torch.no_grad():
        for batch in batches(windows, size):
            inputs = window_inputs(tokens, batch, first_token=first_token)
            parts.append(_score_batch(candidate, reference, batch, inputs))
            done += len(batch)
            report_progress(done, len(windows))
    return _concatenated(parts)


def perplexity(scores: TokenScores) -> Perplexity:
    """Summarize the likelihoods of two or more tokens."""
    nll = _float64(scores.nll)
    ppl = math.exp(nll.mean())
    return Perplexity(tokens=nll.size, ppl=ppl, ppl_stderr=ppl * _standard_error(nll))


def divergence(scores: TokenScores) -> Divergence | None:
    """Summarize the divergences of two or more tokens; `None` when there was no reference."""
    if scores.divergence is None or scores.same_top is None:
        return None
    kld = _float64(scores.divergence)
    return Divergence(
        kld_mean=float(kld.mean()),
        kld_median=float(numpy.median(kld)),
        kld_p99=float(numpy.quantile(kld, 0.99)),
        kld_stderr=_standard_error(kld),
        top1_agreement=float(scores.same_top.double().mean()),
    )


def _ignore_progress(done: int, total: int) -> None:
    """What a caller without a progress bar gets."""


def default_batch_size(windows: Sequence[Window]) -> int:
    """As many windows as make about `DEFAULT_BATCH_TOKENS` tokens, at least one."""
    longest = max(window.length for window in windows)
    return max(1, DEFAULT_BATCH_TOKENS // longest)


def _score_batch(
    candidate: NamedModel, reference: Reference | None, batch: Sequence[Window], inputs: Tensor
) -> TokenScores:
    scored = batch[0].scored
    targets = inputs[:, -scored:].reshape(-1)
    logits = scored_logits(candidate, inputs, scored)
    theirs = None if reference is None else reference.rows(batch, inputs)
    if reference is not None and theirs is not None:
        _require_same_vocabulary(candidate.name, logits, reference.name, theirs.vocabulary)
    rows = max(1, _SLICE_VALUES // logits.shape[-1])
    tops = None if theirs is None else theirs.top
    return _concatenated(
        [
            _score_rows(
                logits[first : first + rows],
                targets[first : first + rows],
                None if theirs is None else theirs.log_probabilities(first, min(first + rows, len(targets))),
                None if tops is None else tops[first : first + rows],
            )
            for first in range(0, len(targets), rows)
        ]
    )


def scored_logits(named: NamedModel, inputs: Tensor, scored: int) -> Tensor:
    """Logits that predict the last `scored` tokens of each window: [batch * scored, vocabulary], model dtype.

    Raises:
        SRDError: The model gives NaN or infinite logits.
    """
    model = named.model
    inputs = inputs.to(next(model.parameters()).device)
    # One more than is scored: the last position predicts a token beyond the window.
    wanted = {"use_cache": False, "logits_to_keep": scored + 1}
    accepted = inspect.signature(model.forward).parameters
    logits: Tensor = model(
        input_ids=inputs, **{name: value for name, value in wanted.items() if name in accepted}
    ).logits
    predicting = logits[:, -scored - 1 : -1].flatten(0, 1)
    if not bool(torch.isfinite(predicting).all()):
        raise SRDError(
            f"{named.name}: the model gives NaN or infinite logits in {str(predicting.dtype).removeprefix('torch.')}, "
            "so its weights are damaged or overflow in this dtype"
        )
    return predicting


def _require_same_vocabulary(name: str, logits: Tensor, reference_name: str, reference_vocabulary: int) -> None:
    if logits.shape[-1] != reference_vocabulary:
        raise SRDError(
            f"{name} has a vocabulary of {logits.shape[-1]} and the reference {reference_name} one of "
            f"{reference_vocabulary}: their divergence is not defined"
        )


def _score_rows(
    logits: Tensor, targets: Tensor, reference_log_probabilities: Tensor | None, reference_top: Tensor | None
) -> TokenScores:
    """Score rows of logits [rows, vocabulary] against target ids [rows]."""
    log_probabilities = logits.double().log_softmax(dim=-1)
    nll = -log_probabilities.gather(-1, targets.to(logits.device)[:, None]).squeeze(-1)
    if reference_log_probabilities is None or reference_top is None:
        return TokenScores(nll=nll.float().cpu())
    reference_log_probabilities = reference_log_probabilities.to(logits.device)
    difference = reference_log_probabilities - log_probabilities
    # A divergence is never negative. What the clamp removes is float64 rounding, below 1e-14: not signal, and
    # too little to bias a mean.
    kld = (reference_log_probabilities.exp() * difference).sum(-1).clamp_min(0.0)
    same_top = logits.argmax(-1) == reference_top.to(logits.device)
    return TokenScores(nll=nll.float().cpu(), divergence=kld.float().cpu(), same_top=same_top.cpu())


def _concatenated(parts: Sequence[TokenScores]) -> TokenScores:
    divergences = [part.divergence for part in parts if part.divergence is not None]
    same_tops = [part.same_top for part in parts if part.same_top is not None]
    return TokenScores(
        nll=torch.cat([part.nll for part in parts]),
        divergence=torch.cat(divergences) if divergences else None,
        same_top=torch.cat(same_tops) if same_tops else None,
    )


def _float64(values: Tensor) -> numpy.ndarray:
    """Float64, so that sums over millions of tokens do not round; numpy, whose quantiles have no size limit."""
    return values.double().numpy()


def _standard_error(values: numpy.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size))
