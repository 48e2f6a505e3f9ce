"""Score with a model that llama.cpp's server runs.

The server gives probabilities of tokens that it generates only, so the token that is asked for is made to be generated
next: a bias lifts it above all others. The probabilities that come with it are those before the bias.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Progress, Request, SequenceScores
from srd_modifier.evaluation.servers._common import check_generation, check_requests, leading_token, token_ids
from srd_modifier.evaluation.servers._http import Server, is_number, lookup

_BIAS = 1e9  # above the difference of any two logits
_WHOLE_VOCABULARY = 2**20  # more than any has; older servers reserve memory for as many
# Nothing that the command line of the server sets may change what is generated.
_SAMPLING = {
    "samplers": ["temperature"],
    "dynatemp_range": 0,
    "mirostat": 0,
    "ignore_eos": False,
}
# The server takes the logarithm of a float32. Where that is 0 it answers with a number of its own, and all that is
# known is that the probability is no higher than this.
_LOWEST = math.log(2.0**-149)


def find(server: Server) -> "LlamaCppServer | None":
    """The scorer of a llama.cpp server; `None` where another kind runs.

    Raises:
        SRDError: Nothing answers, or with an error; or a model is named, of which there is but one.
    """
    properties = server.ask_if_any("/props")
    if properties is None or "default_generation_settings" not in properties:
        return None
    if server.model is not None:
        raise SRDError(f"{server.name}: llama.cpp's server has one model; leave '#{server.model}' out of the address")
    return LlamaCppServer(server, properties)


class LlamaCppServer:
    """A `Scorer` that needs one request for every scored token, and is therefore meant for small samples.

    The server keeps the keys and values of the tokens it has read, and a request goes on from there: of a sequence,
    each token is computed once, and a context that several requests share is computed once if they follow each other.
    A token is then computed alone rather than with those before it. That sums in another order, and it also rounds
    other numbers where llama.cpp rounds to fewer bits, as it does what it multiplies with quantized weights. Measured
    on the CPU with a model of 7 million parameters, two ways to compute one log-probability differ by 2e-6 at most in
    float32, by 1e-3 with half precision keys and values, and by 0.02 on average with Q4_K_M weights; the latter are
    no closer to the exact value without what is kept than with it.

    Log-probabilities come through float32 probabilities: none is below -103.28, which stands for anything lower too.
    """

    def __init__(self, server: Server, properties: Mapping[str, Any]) -> None:
        """Take what the server's /props said; `find` asks for it."""
        self._server = server
        self._properties = properties
        context = lookup(properties, "default_generation_settings", "n_ctx")
        self._context: int | None = context if isinstance(context, int) and context > 0 else None

    @property
    def name(self) -> str:
        """The address."""
        return self._server.name

    @property
    def max_length(self) -> int | None:
        """One less than the context that each slot has, where the last scored token takes a place without being read.

        A request may thus have one token more.
        """
        return None if self._context is None else self._context - 1

    @cached_property
    def prefix_token(self) -> int | None:
        """BOS: what is put before every text, else the model's own BOS if it has one, else EOS, else `None`."""
        leading = leading_token(self.encode)
        if leading is not None:
            return leading
        found = (self._special(self._properties.get(key)) for key in ("bos_token", "eos_token"))
        return next((token for token in found if token is not None), None)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text; a special token's own text is read as that token, as Transformers does.

        Raises:
            SRDError: The server fails.
        """
        return self._tokenize(text, add_special=add_special, parse_special=True)

    def score(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[SequenceScores]:
        """Score every request, in their order.

        Raises:
            SRDError: A request does not fit the context or has nothing before its scored tokens, the server fails, or
                it gives no log-probabilities.
        """
        check_requests(self.name, requests, longest=self._context)
        results = []
        for number, request in enumerate(requests, start=1):
            results.append(self._score(request))
            if progress is not None:
                progress(number, len(requests))
        return results

    def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """The text that follows a prompt; with a temperature above 0, of all tokens by their probability.

        Raises:
            SRDError: The prompt and what may follow do not fit the context, or the server fails.
        """
        check_generation(self.name, prompt, max_tokens, context=self._context)
        settings = {"n_predict": max_tokens, "stop": list(stop), "temperature": temperature}
        text = self._complete(prompt, settings).get("content")
        if not isinstance(text, str):
            raise SRDError(f"{self.name}: the answer to /completion has no text; run llama.cpp's own server there")
        return text

    def _score(self, request: Request) -> SequenceScores:
        first = len(request.tokens) - request.scored
        found = [
            self._score_token(request.tokens[:place], request.tokens[place])
            for place in range(first, len(request.tokens))
        ]
        log_probabilities, greedy = zip(*found, strict=True)
        return SequenceScores(torch.tensor(log_probabilities, dtype=torch.float64), torch.tensor(greedy))

    def _score_token(self, before: Sequence[int], token: int) -> tuple[float, bool]:
        """The log-probability of a token after others, and whether it is the likeliest there."""
        answer = self._force(before, token, 1)
        if lookup(answer, "id") != token:
            # The server leaves a token out whose text is the beginning of a character, and one that it was started
            # never to generate. Among all tokens of the vocabulary both are found, beside another that is generated.
            answer = self._force(before, self._whole_character, _WHOLE_VOCABULARY)
            alternatives = lookup(answer, "top_logprobs") or []
            own = next((entry for entry in alternatives if lookup(entry, "id") == token), None)
        else:
            own = answer
        log_probability = lookup(own, "logprob")
        likeliest = lookup(answer, "top_logprobs", 0, "id")
        if not is_number(log_probability) or likeliest is None:
            raise SRDError(
                f"{self.name}: the server gives no log-probability for token {token}; it must be llama.cpp's own, of "
                "2025 or later, and have this token in its vocabulary"
            )
        return max(float(log_probability), _LOWEST), likeliest == token

    def _force(self, before: Sequence[int], token: int, count: int) -> Any:
        """What is said of a token when it is generated, with the `count` likeliest beside it; `None` if nothing is."""
        settings = {"n_predict": 1, "temperature": 0, "logit_bias": [[token, _BIAS]], "n_probs": count}
        return lookup(self._complete(before, settings), "completion_probabilities", 0)

    @cached_property
    def _whole_character(self) -> int:
        """A token whose text is whole characters."""
        return self.encode("a", add_special=False)[-1]

    def _complete(self, prompt: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": list(prompt), "cache_prompt": True, **_SAMPLING, **settings}
        return self._server.ask("/completion", body)

    def _special(self, text: Any) -> int | None:
        """The special token with this text.

        A vocabulary without BOS has token 11 for llama.cpp, a comma in that of GPT-2, so ordinary tokens do not count:
        those are what they are even where special tokens are not looked for.
        """
        if not isinstance(text, str) or not text:
            return None
        tokens = self.encode(text, add_special=False)
        if len(tokens) != 1 or tokens == self._tokenize(text, add_special=False, parse_special=False):
            return None
        return tokens[0]

    def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return token_ids(self._server, body)
