"""Score given tokens with a model of this process, each shared prefix computed once.

Multiple-choice questions repeat themselves: all of them begin with the same examples, and the choices of one follow
the same question. What all requests begin with goes through the model once, then each distinct context, then what
follows it, over the keys and values that are kept in between. Nothing that is kept is ever padded, so a model needs no
masks for it. The first batch is computed both ways; a model for which they differ is scored on whole sequences.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.scorer import Progress, Request, SequenceScores

# Tokens computed at once, and tokens whose keys and values are kept at once, when the caller does not say.
_BATCH_TOKENS = 4096
_KEPT_TOKENS = 16384
# A prefix that is shorter is not worth a pass of its own.
_LEAST_SHARED = 8
# What two ways to compute the same may differ by, in nats; a wrong cache is off by about one.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.25


@dataclass(frozen=True)
class _Context:
    """Requests that share everything before their scored tokens.

    Attributes:
        tokens: what they share, without what all requests share.
        members: positions of the requests in the list that was asked for, and their scored tokens.
    """

    tokens: tuple[int, ...]
    members: list[tuple[int, tuple[int, ...]]]


class LocalScorer:
    """A loaded Transformers model as a `Scorer`.

    Args:
        loaded: The model and its tokenizer.
        batch_size: Sequences at once; `None` for as many as make about 4096 tokens. It changes results by float
            rounding only.

    Raises:
        ConfigError: `batch_size` is below 1.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self._loaded = loaded
        self._batch_size = batch_size
        accepted = inspect.signature(loaded.model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        # None until the first batch has shown whether the model computes the same over kept keys and values
        self._shares: bool | None = None if "past_key_values" in accepted else False

    @property
    def name(self) -> str:
        """What the user called the model."""
        return self._loaded.name

    @property
    def max_length(self) -> int | None:
        """The positions that its configuration allows."""
        return self._loaded.max_positions

    @property
    def prefix_token(self) -> int | None:
        """BOS, or EOS where the vocabulary has no BOS."""
        tokenizer = self._loaded.tokenizer
        return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self._loaded.tokenizer

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._loaded.tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"]

    def score(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[SequenceScores]:
        """Score every request, in their order.

        Raises:
            SRDError: A request has nothing before its scored tokens, is longer than the model's positions, or the model
                gives NaN or infinite logits.
        """
        for request in requests:
            self._check(request)
        results: dict[int, SequenceScores] = {}
        with torch.no_grad():
            for number, scores in self._score_all(requests):
                results[number] = scores
                if progress is not None:
                    progress(len(results), len(requests))
        return [results[number] for number in range(len(requests))]

    def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """The text that follows a prompt."""
        from transformers import GenerationConfig, StoppingCriteriaList

        tokenizer, model = self._loaded.tokenizer, self._loaded.model
        stop = [end for end in stop if end]

        def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            text = tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True)
            return torch.tensor([any(end in text for end in stop)], device=ids.device)

        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            pad_token_id=self.prefix_token,
            eos_token_id=self._ends,
        )
        inputs = torch.tensor([list(prompt)], device=model.device)
        with torch.no_grad():
            ids = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        text = tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True)
        ends = [text.index(end) for end in stop if end in text]
        return text[: min(ends)] if ends else text

    @property
    def _ends(self) -> list[int] | None:
        """Tokens that end a text: the tokenizer's EOS, and what generation_config.json names."""
        found = {self._loaded.tokenizer.eos_token_id}
        # of a GGUF file there is none, and what Transformers makes up in its place means nothing
        if self._loaded.gguf is None and self._loaded.model.generation_config is not None:
            more = self._loaded.model.generation_config.eos_token_id
            found |= set(more) if isinstance(more, list) else {more}
        return sorted(found - {None}) or None

    def _check(self, request: Request) -> None:
        if not 1 <= request.scored < len(request.tokens):
            raise SRDError(
                f"{self.name}: {request.scored} of {len(request.tokens)} tokens cannot be scored, at least one token "
                "must stand before them"
            )
        # the last token is scored and never read
        if self.max_length is not None and len(request.tokens) - 1 > self.max_length:
            raise SRDError(
                f"{self.name}: a sequence of {len(request.tokens) - 1} tokens exceeds its {self.max_length} positions"
            )

    def _score_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, SequenceScores]]:
        if not requests:
            return
        shared = 0 if self._shares is False else _shared_length(requests)
        contexts = _contexts(requests, shared)
        if self._shares is False or (not shared and len(contexts) > 0.7 * len(requests)):
            yield from self._score_whole(range(len(requests)), requests)
            return
        prefix = requests[0].tokens[:shared]
        kept = self._read(None, [prefix], keep=1)[1] if shared else None
        for batch in self._context_batches(contexts, shared):
            scored = list(self._score_contexts(batch, kept))
            if self._shares is None:
                self._shares = self._agrees(scored, requests)
                if not self._shares:
                    yield from self._score_whole(range(len(requests)), requests)
                    return
            yield from scored

    def _agrees(self, scored: list[tuple[int, SequenceScores]], requests: Sequence[Request]) -> bool:
        """Whether a batch scored over kept keys and values has what whole sequences give."""
        whole = dict(self._score_whole([number for number, _ in scored], requests))
        largest = max(
            float((scores.log_probabilities - whole[number].log_probabilities).abs().max()) for number, scores in scored
        )
        return largest <= _TOLERANCE.get(self._loaded.model.dtype, _HALF_TOLERANCE)

    def _score_whole(self, numbers: Iterable[int], requests: Sequence[Request]) -> Iterator[tuple[int, SequenceScores]]:
        """Whole sequences, those of similar length together, padded behind where no token that counts can see it."""
        longest_first = sorted(numbers, key=lambda number: -len(requests[number].tokens))
        start = 0
        while start < len(longest_first):
            size = self._rows(len(requests[longest_first[start]].tokens), kept=0)
            batch = longest_first[start : start + size]
            start += size
            inputs = [requests[number].tokens[:-1] for number in batch]
            first = min(len(requests[number].tokens) - 1 - requests[number].scored for number in batch)
            logits, _ = self._read(None, inputs, keep=max(map(len, inputs)) - first)
            for row, number in enumerate(batch):
                request = requests[number]
                end = len(request.tokens) - 1 - first
                predicting = logits[row, end - request.scored : end]
                yield number, self._scores(predicting, request.tokens[-request.scored :])

    def _context_batches(self, contexts: list[_Context], shared: int) -> Iterator[list[_Context]]:
        """Contexts of one length, so that nothing has to be padded."""
        contexts = sorted(contexts, key=lambda context: -len(context.tokens))
        batch: list[_Context] = []
        rows = longest = 0
        for context in contexts:
            members = len(context.members)
            end = max(len(scored) for _, scored in context.members)
            length = len(context.tokens) + max(longest, end)
            if batch and (
                len(context.tokens) != len(batch[0].tokens) or rows + members > self._rows(length, kept=shared)
            ):
                yield batch
                batch, rows, longest = [], 0, 0
            batch.append(context)
            rows, longest = rows + members, max(longest, end)
        if batch:
            yield batch

    def _score_contexts(self, batch: list[_Context], prefix: Any) -> Iterator[tuple[int, SequenceScores]]:
        logits, kept = self._read(prefix, [context.tokens for context in batch], keep=1)
        owners = [row for row, context in enumerate(batch) for _ in context.members]
        members = [member for context in batch for member in context.members]
        firsts = logits[:, -1]
        endings = [scored[:-1] for _, scored in members]
        rest: Tensor | None = None
        if any(endings):
            kept.batch_select_indices(torch.tensor(owners, device=firsts.device))
            rest, _ = self._read(kept, endings, own=True)
        for row, (number, scored) in enumerate(members):
            predicting = firsts[owners[row]].unsqueeze(0)
            if rest is not None and len(scored) > 1:
                predicting = torch.cat([predicting, rest[row, : len(scored) - 1]])
            yield number, self._scores(predicting, scored)

    def _read(
        self, kept: Any, rows: Sequence[Sequence[int]], *, keep: int | None = None, own: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits [rows, longest, vocabulary] of the last `keep` places (all for `None`), and the keys and values.

        Args:
            kept: keys and values of what comes before, of one row for all rows or of as many rows; `None` for nothing.
            rows: tokens, padded behind to one length.
            keep: how many places to give logits for.
            own: `kept` may be added to; otherwise a copy is.
        """
        model = self._loaded.model
        longest = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
        inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            inputs[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        options: dict[str, Any] = {}
        if self._shares is not False:
            options = {"past_key_values": self._cache(kept, len(rows), own=own), "use_cache": True}
        if self._keeps_logits and keep is not None:
            options["logits_to_keep"] = keep
        output = model(input_ids=inputs.to(model.device), **options)
        logits = output.logits
        return (logits if keep is None else logits[:, -keep:]), options.get("past_key_values")

    def _cache(self, kept: Any, rows: int, *, own: bool) -> Any:
        from transformers import DynamicCache

        if kept is None:
            return DynamicCache(config=self._loaded.model.config)
        if own:
            return kept
        cache = copy.deepcopy(kept)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _rows(self, length: int, *, kept: int) -> int:
        """How many sequences of a length go through the model at once."""
        if self._batch_size is not None:
            return self._batch_size
        return max(1, min(_BATCH_TOKENS // max(1, length), _KEPT_TOKENS // (length + kept)))

    def _scores(self, logits: Tensor, tokens: Sequence[int]) -> SequenceScores:
        """Of `tokens`, from the logits [tokens, vocabulary] that predict them."""
        if not bool(torch.isfinite(logits).all()):
            raise SRDError(
                f"{self.name}: the model gives NaN or infinite logits in {str(logits.dtype).removeprefix('torch.')}, "
                "so its weights are damaged or overflow in this dtype"
            )
        targets = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
        # float64: what is summed over an answer is compared with other answers, and ties must not be rounding's
        log_probabilities = logits.double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return SequenceScores(log_probabilities.cpu(), (logits.argmax(-1) == targets).cpu())


def _shared_length(requests: Sequence[Request]) -> int:
    """How many tokens all requests begin with, the last token before those that are scored never counted."""
    if len(requests) < 2:
        return 0
    length = min(len(request.tokens) - request.scored for request in requests) - 1
    first = requests[0].tokens
    for request in requests[1:]:
        if request.tokens[:length] != first[:length]:
            length = next(place for place in range(length) if request.tokens[place] != first[place])
    return length if length >= _LEAST_SHARED else 0


def _contexts(requests: Sequence[Request], shared: int) -> list[_Context]:
    found: dict[tuple[int, ...], _Context] = {}
    for number, request in enumerate(requests):
        context = request.tokens[shared : len(request.tokens) - request.scored]
        scored = request.tokens[len(request.tokens) - request.scored :]
        found.setdefault(context, _Context(context, [])).members.append((number, scored))
    return list(found.values())
