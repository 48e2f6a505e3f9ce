"""A text to predict: its perplexity and, with a reference, the divergence on the same tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.results import Score, TaskInfo
from srd_modifier.evaluation.scorer import Progress, Request, Scorer
from srd_modifier.evaluation.scores import (
    Reference,
    TokenScores,
    divergence,
    perplexity,
    score_tokens,
)
from srd_modifier.evaluation.tasks.base import Items, Outcome, Subject
from srd_modifier.evaluation.text import Text, bos_where_added, tokenize
from srd_modifier.evaluation.windows import Convention, Window, WindowRule, window_inputs

METRIC = "ppl"

_BOS = {
    Convention.SLIDING: "what the tokenizer puts before a text stands at its start, not in every window",
    Convention.LLAMACPP: "BOS replaces the first token of every window where the tokenizer puts a BOS before texts",
}
_WINDOWS = {
    Convention.SLIDING: "windows of {ctx} tokens that advance by {stride}, each scoring what no earlier one scored",
    Convention.LLAMACPP: "windows of {ctx} tokens without overlap, the second half of each scored, as llama-perplexity",
}


@dataclass(frozen=True)
class TextTask:
    """A text, cut into windows by a rule.

    Attributes:
        name: as `--tasks` takes it.
        title: for the head of a table.
        text: what is read.
        rule: how it is cut.
        max_tokens: only so many tokens from its start, `None` for all.
        form: what was done to the text before, in words.
    """

    name: str
    title: str
    text: Text
    rule: WindowRule
    max_tokens: int | None = None
    form: str = "the file as it is"

    @property
    def info(self) -> TaskInfo:
        """What is asked."""
        rule = self.rule
        windows = _WINDOWS[rule.convention].format(ctx=rule.ctx, stride=rule.stride)
        amount = "" if self.max_tokens is None else f", its first {self.max_tokens:,} tokens"
        what = f"perplexity of {self.text.path.name} ({self.form}){amount}"
        return TaskInfo(
            name=self.name,
            title=self.title,
            description=f"{what}: {windows}; {_BOS[rule.convention]}",
            source=str(self.text.path),
            sha256=self.text.sha256,
            settings={
                "convention": rule.convention.value,
                "ctx": rule.ctx,
                "stride": rule.stride,
                "max_tokens": self.max_tokens,
            },
        )

    def stream(self, tokenizer: Any) -> Tensor:
        """The text's tokens, int64 [tokens], as this tokenizer makes them."""
        return tokenize(self.text, tokenizer, max_tokens=self.max_tokens)

    def first_token(self, tokenizer: Any) -> int | None:
        """What replaces the first token of every window, `None` for nothing."""
        return bos_where_added(tokenizer) if self.rule.convention is Convention.LLAMACPP else None

    def run(
        self,
        subject: Subject,
        *,
        reference: Reference | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Outcome:
        """Perplexity and, for a model of this process and with a reference, divergence."""
        tokenizer = tokenizer_of(subject)
        tokens, first_token = self.stream(tokenizer), self.first_token(tokenizer)
        windows = self.windows(subject, tokens)
        started = time.perf_counter()
        if subject.loaded is not None:
            scores = score_tokens(
                subject.loaded,
                tokens,
                windows,
                reference=reference,
                first_token=first_token,
                batch_size=batch_size,
                progress=progress,
            )
        else:
            scores = _ask(subject, tokens, windows, first_token, progress)
        return self.outcome(scores, windows, time.perf_counter() - started)

    def windows(self, subject: Subject, tokens: Tensor) -> list[Window]:
        """The windows of a stream.

        Raises:
            SRDError: The text is too short, a window is longer than the model's context, or the tokenizer gives tokens
                that the model does not have.
        """
        if subject.loaded is not None:
            require_fit(subject.loaded, tokens, self.rule)
        elif subject.scorer.max_length is not None and self.rule.ctx > subject.scorer.max_length:
            raise SRDError(
                f"ctx {self.rule.ctx} exceeds the {subject.scorer.max_length} tokens that {subject.name} reads"
            )
        return self.rule.windows(len(tokens))

    def outcome(self, scores: TokenScores, windows: Sequence[Window], seconds: float = 0.0) -> Outcome:
        """What the scores of all tokens come to."""
        own, moved = perplexity(scores), divergence(scores)
        found = [self._score(METRIC, own.ppl, own.ppl_stderr, own.tokens)]
        if moved is not None:
            found += [
                self._score("kld_mean", moved.kld_mean, moved.kld_stderr, own.tokens),
                self._score("kld_median", moved.kld_median, None, own.tokens),
                self._score("kld_p99", moved.kld_p99, None, own.tokens),
                self._score(
                    "top1_agreement",
                    moved.top1_agreement,
                    (moved.top1_agreement * (1 - moved.top1_agreement) / own.tokens) ** 0.5,
                    own.tokens,
                    higher_is_better=True,
                ),
            ]
        parts = scores.nll.double().split([window.scored for window in windows])
        items = Items(tuple(float(part.mean()) for part in parts), tuple(float(window.scored) for window in windows))
        return Outcome(tuple(found), {METRIC: items}, seconds)

    def _score(
        self, metric: str, value: float, stderr: float | None, count: int, *, higher_is_better: bool = False
    ) -> Score:
        return Score(self.name, metric, value, stderr, count, higher_is_better)


def require_fit(model: LoadedModel, tokens: Tensor, rule: WindowRule) -> None:
    """Refuse what a model cannot read before it is asked.

    Raises:
        SRDError: A window is longer than its context, or a token is not one of its vocabulary.
    """
    limit = model.max_positions
    if limit is not None and rule.ctx > limit:
        raise SRDError(f"ctx {rule.ctx} exceeds the {limit} positions (max_position_embeddings) of {model.name}")
    if len(tokens) and int(tokens.max()) >= model.vocabulary_size:
        raise SRDError(
            f"{model.name}: its tokenizer gives token id {int(tokens.max())}, but the model has only "
            f"{model.vocabulary_size} embeddings"
        )


def tokenizer_of(subject: Subject) -> Any:
    """What makes a text's tokens for a model, called as a tokenizer of Transformers is."""
    return _ServersTokenizer(subject.scorer) if subject.loaded is None else subject.loaded.tokenizer


class _ServersTokenizer:
    """A server's tokenizer, called as Transformers' are."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.bos_token_id = scorer.prefix_token

    def __call__(self, text: str, *, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._scorer.encode(text)}


def _ask(
    subject: Subject, tokens: Tensor, windows: Sequence[Window], first_token: int | None, progress: Progress | None
) -> TokenScores:
    """Likelihoods from a server, which gives no distributions."""
    requests = [
        Request(tuple(window_inputs(tokens, [window], first_token=first_token)[0].tolist()), window.scored)
        for window in windows
    ]
    scores = subject.scorer.score(requests, progress=progress)
    return TokenScores(nll=-torch.cat([each.log_probabilities for each in scores]).float())
