"""Score a text with a model, and with a reference beside it: the whole of `srd eval --text`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import module_alphas, read_srd_config
from srd_modifier.checkpoint.sensitivity import read_sensitivity
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.comparison.environment import library_versions
from srd_modifier.evaluation.load import LoadedModel, load
from srd_modifier.evaluation.report import Report
from srd_modifier.evaluation.scores import divergence, perplexity, score_tokens
from srd_modifier.evaluation.tasks.text import require_fit
from srd_modifier.evaluation.text import Text, bos_where_added, read_text, tokenize
from srd_modifier.evaluation.windows import Convention, window_rule

# the libraries that decide what the models compute
_DECISIVE = ("torch", "transformers", "compressed-tensors")


def evaluate_text(
    name: str,
    text_path: Path,
    *,
    reference: str | None = None,
    convention: Convention = Convention.SLIDING,
    ctx: int | None = None,
    stride: int | None = None,
    alpha: float | None = None,
    chunks: Sequence[str] | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Perplexity of a model on a text and, with a reference, its divergence from it on the same tokens.

    Args:
        name: The model to score: a directory or a hub id, with or without a residual, or a GGUF file.
        text_path: A UTF-8 text file.
        reference: The model to measure the divergence from, usually the original; always as its checkpoint says,
            whatever `alpha` and `chunks` are.
        convention: How the text is cut into windows.
        ctx: Tokens in a window; `None` takes the convention's own.
        stride: Tokens between the starts of two windows; `None` takes the convention's own.
        alpha: Share of the residual to apply, `None` for the checkpoint's own.
        chunks: Chunks of depth whose residual to apply, `None` for all.
        max_tokens: Score only this many tokens from the start of the text, `None` for all.
        batch_size: Windows read at once, `None` for about 4096 tokens.
        dtype: What both models compute in.
        device: `cpu`, `cuda` or `auto`.
        progress: Called while scoring with (windows done, windows in all).

    Raises:
        SRDError: The text, a model, a size or the device is at fault, or the two models do not share a
            vocabulary.
    """
    rule = window_rule(convention, ctx=ctx, stride=stride)
    text = read_text(text_path)
    candidate = load(name, alpha=alpha, chunks=chunks, dtype=dtype, device=device)
    original = None if reference is None else load(reference, dtype=dtype, device=device)
    size = candidate.size
    predicted = _predicted_divergence(candidate, alpha=alpha, chunks=chunks)
    tokens = _shared_tokens(text, candidate, original, max_tokens=max_tokens)
    for model in (candidate, original):
        if model is not None:
            require_fit(model, tokens, rule)
    windows = rule.windows(len(tokens))
    started = time.perf_counter()
    scores = score_tokens(
        candidate,
        tokens,
        windows,
        reference=original,
        first_token=bos_where_added(candidate.tokenizer) if convention is Convention.LLAMACPP else None,
        batch_size=batch_size,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    return Report(
        model=name,
        reference=reference,
        text_path=str(text.path),
        text_sha256=text.sha256,
        rule=rule,
        perplexity=perplexity(scores),
        divergence=divergence(scores),
        size=size,
        dtype=str(dtype).removeprefix("torch."),
        alpha=candidate.alpha,
        chunks=candidate.chunks,
        seconds=seconds,
        versions=library_versions(_DECISIVE),
        predicted_kld=predicted,
    )


def _predicted_divergence(model: LoadedModel, *, alpha: float | None, chunks: Sequence[str] | None) -> float | None:
    """What the checkpoint's sensitivity says of the residual as it is applied, `None` where there is none."""
    if model.corrected is None:
        return None
    config, sensitivity = read_srd_config(model.path), read_sensitivity(model.path)
    if config is None or sensitivity is None:
        return None
    return sensitivity.predicted(module_alphas(config, BaseCheckpoint(model.path).layers, alpha=alpha, chunks=chunks))


def _shared_tokens(
    text: Text, candidate: LoadedModel, original: LoadedModel | None, *, max_tokens: int | None
) -> Tensor:
    """The text's tokens, after making sure that both models would read the same ones."""
    tokens = tokenize(text, candidate.tokenizer, max_tokens=max_tokens)
    if original is not None:
        theirs = tokenize(text, original.tokenizer, max_tokens=max_tokens)
        if not torch.equal(tokens, theirs):
            raise SRDError(
                f"{candidate.name} and the reference {original.name} tokenize {text.path} differently: their "
                "divergence is not defined"
            )
    return tokens
