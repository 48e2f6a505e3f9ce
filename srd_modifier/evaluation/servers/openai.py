"""Score with a model that vLLM serves, by its OpenAI-compatible interface and what vLLM adds to that.

Two additions are needed: /tokenize, and log-probabilities of a prompt's own tokens. A server that has only what OpenAI
describes cannot score.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Progress, Request, SequenceScores
from srd_modifier.evaluation.servers._common import (
    check_generation,
    check_requests,
    checked_ids,
    leading_token,
    token_ids,
)
from srd_modifier.evaluation.servers._http import Server, is_number, lookup

# Sequences and tokens in one request: enough to fill the server's batches, and an answer of a few MB at most.
_BATCH_SEQUENCES = 64
_BATCH_TOKENS = 16384
# Nothing that comes with the model's generation_config.json may change what is generated.
_SAMPLING = {
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


def find(server: Server) -> "VLLMServer | None":
    """The scorer of a vLLM server; `None` where there is no OpenAI-compatible server.

    Raises:
        SRDError: Nothing answers, or with an error; the server is not vLLM's; or it has several models or another than
            the address names.
    """
    listed = server.ask_if_any("/v1/models")
    if listed is None:
        return None
    model = _choose(server, listed.get("data"))
    answer = server.ask_if_any("/tokenize", {"model": model, "prompt": "a"})
    context = lookup(answer, "max_model_len")
    if answer is None or not isinstance(context, int):
        raise SRDError(
            f"{server.name}: the server is not vLLM's, since it has no /tokenize that tells the length of its context; "
            "only vLLM's and llama.cpp's give log-probabilities of given tokens"
        )
    checked_ids(server, answer.get("tokens"))
    return VLLMServer(server, model, context=context)


class VLLMServer:
    """A `Scorer` that sends batches of whole sequences; vLLM computes a prefix anew for each.

    Numbers are vLLM's float32 log-softmax, in the dtype in which it runs the model; it writes -9999 for a token whose
    probability is 0. A token that shares the first place with another is not called greedy.
    """

    def __init__(self, server: Server, model: str, *, context: int) -> None:
        """Take a model of a server by the name under which it is served, and the tokens of its context."""
        self._server = server
        self._model = model
        self._context = context

    @property
    def name(self) -> str:
        """The address."""
        return self._server.name

    @property
    def max_length(self) -> int:
        """Two less than vLLM's `max_model_len`.

        vLLM reads the last scored token too, and wants a place for one that it generates. So that a request may have
        one token more than is read before the last, as with a model of this process, both places are left out.
        """
        return self._context - 2

    @cached_property
    def prefix_token(self) -> int | None:
        """BOS if the tokenizer puts it before every text, else `None`: vLLM does not say which special tokens are."""
        return leading_token(self.encode)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            SRDError: The server fails.
        """
        body = {"model": self._model, "prompt": text, "add_special_tokens": add_special}
        return token_ids(self._server, body)

    def score(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[SequenceScores]:
        """Score every request, in their order.

        Raises:
            SRDError: A request does not fit the context or has nothing before its scored tokens, the server fails, or
                it gives no log-probabilities of prompts.
        """
        check_requests(self.name, requests, longest=self._context - 1)
        results: list[SequenceScores] = []
        for batch in _batches(requests):
            results += self._score_batch(batch)
            if progress is not None:
                progress(len(results), len(requests))
        return results

    def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """The text that follows a prompt; with a temperature above 0, of all tokens by their probability.

        Raises:
            SRDError: The prompt and what may follow do not fit the context, or the server fails.
        """
        check_generation(self.name, prompt, max_tokens, context=self._context)
        settings = {"max_tokens": max_tokens, "stop": list(stop), "temperature": temperature}
        (choice,) = self._complete([list(prompt)], settings)
        text = lookup(choice, "text")
        if not isinstance(text, str):
            raise SRDError(f"{self.name}: the answer to /v1/completions has no text; run vLLM's own server there")
        return text

    def _score_batch(self, batch: Sequence[Request]) -> list[SequenceScores]:
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choices = self._complete([list(request.tokens) for request in batch], settings)
        return [self._scores(request, choice) for request, choice in zip(batch, choices, strict=True)]

    def _scores(self, request: Request, choice: Any) -> SequenceScores:
        places = lookup(choice, "prompt_logprobs")
        first = len(request.tokens) - request.scored
        own = [lookup(places, place, str(request.tokens[place])) for place in range(first, len(request.tokens))]
        log_probabilities = [lookup(entry, "logprob") for entry in own]
        ranks = [lookup(entry, "rank") for entry in own]
        if not all(map(is_number, log_probabilities + ranks)):
            raise SRDError(
                f"{self.name}: the server gives no log-probabilities of a prompt's tokens with their ranks; only "
                "vLLM's own server does"
            )
        if max(log_probabilities) > 0:
            raise SRDError(
                f"{self.name}: the server gives logits, one of {max(log_probabilities):g}, where log-probabilities are "
                "needed; start it without --logprobs-mode"
            )
        return SequenceScores(
            torch.tensor(log_probabilities, dtype=torch.float64), torch.tensor([rank == 1 for rank in ranks])
        )

    def _complete(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[Any]:
        """A completion of each prompt, in their order."""
        body = {"model": self._model, "prompt": prompts, **_SAMPLING, **settings}
        choices = self._server.ask("/v1/completions", body).get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise SRDError(
                f"{self.name}: the answer to /v1/completions has not one completion for each of {len(prompts)} prompts"
                "; run vLLM's own server there"
            )
        return sorted(choices, key=lambda choice: lookup(choice, "index") or 0)


def _choose(server: Server, entries: Any) -> str:
    """The name of the model that is meant."""
    names = [lookup(entry, "id") for entry in entries] if isinstance(entries, list) else []
    served = [name for name in names if isinstance(name, str)]
    if not served:
        raise SRDError(f"{server.name}: the server lists no model; give the address of one that has loaded a model")
    listing = ", ".join(served)
    if server.model is not None:
        if server.model not in served:
            raise SRDError(f"{server.name}: the server has no model {server.model!r}, but {listing}; name one of these")
        return server.model
    if len(served) > 1:
        raise SRDError(
            f"{server.name}: the server has {len(served)} models; add one of their names to the address, as in "
            f"{server.name}#{served[0]}: {listing}"
        )
    return served[0]


def _batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Consecutive requests, so many at once as a batch may have, at least one."""
    batch: list[Request] = []
    tokens = 0
    for request in requests:
        full = len(batch) == _BATCH_SEQUENCES or tokens + len(request.tokens) > _BATCH_TOKENS
        if batch and full:
            yield batch
            batch, tokens = [], 0
        batch.append(request)
        tokens += len(request.tokens)
    if batch:
        yield batch
