"""A scorer as a model of the lm-evaluation-harness.

Prompts, metrics and standard errors are the harness's own. What is ours is where the model comes from (a GGUF file, a
server, a residual half turned on) and that shared prefixes are computed once. Tokens are made as by its own model for
Transformers, `--model hf`, so that both give the same numbers: the tokenizer's own special tokens before a text unless
it begins with BOS already, BOS or EOS before an empty context, and contexts that are too long cut on the left.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Progress, Request, Scorer, SequenceScores

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_DEFAULT_LENGTH = 2048  # the harness's own, for a model that names no limit
_DEFAULT_NEW_TOKENS = 256  # likewise


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate` takes as its model."""

    def __init__(self, scorer: Scorer, *, progress: Progress | None = None) -> None:
        super().__init__()
        self._scorer = scorer
        self._progress = progress
        self.tokenizer = getattr(scorer, "tokenizer", None)
        # the same context comes with every one of its choices
        self._encode = lru_cache(maxsize=4096)(scorer.encode)

    @property
    def eot_token_id(self) -> int:
        """What stands before an empty context."""
        token = self._scorer.prefix_token
        if token is None:
            raise SRDError(f"{self._scorer.name}: has neither a BOS nor an EOS token, which this task needs")
        return token

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self._scorer.max_length or _DEFAULT_LENGTH

    @property
    def tokenizer_name(self) -> str:
        """What requests would be cached under."""
        return self._scorer.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids."""
        special = add_special_tokens
        if special is None:
            special = not (self._begin and string.startswith(self._begin))
        return list(self._encode(string, add_special=special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the words of the model's own template.

        Raises:
            SRDError: The model has none, or its tokenizer is out of reach.
        """
        tokenizer: Any = self.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise SRDError(f"{self._scorer.name}: has no chat template, leave the option out")
        return tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows as long as the model's context that do not overlap."""
        found: list[Request] = []
        counts: list[int] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [self._request(*make_disjoint_window(window)) for window in windows]
            found += parts
            counts.append(len(parts))
        scores = iter(self._score(found))
        return [sum(float(next(scores).log_probabilities.sum()) for _ in range(count)) for count in counts]

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt."""
        answers = []
        for number, request in enumerate(requests, 1):
            prompt, given = request.args
            settings = normalize_gen_kwargs(given, _DEFAULT_NEW_TOKENS)
            limit = settings["max_gen_toks"]
            room = self.max_length - limit
            if room < 1:
                raise SRDError(
                    f"{self._scorer.name}: reads {self.max_length} tokens, but the task asks for {limit} new ones"
                )
            answers.append(
                self._scorer.generate(
                    self.tok_encode(prompt)[-room:],
                    max_tokens=limit,
                    stop=[end for end in settings["until"] if end],
                    temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
                )
            )
            if self._progress is not None:
                self._progress(number, len(requests))
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([self._request(context, continuation) for _, context, continuation in requests])
        return [(float(each.log_probabilities.sum()), bool(each.greedy.all())) for each in scores]

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Cut on the left to what the model reads; the last token is only predicted."""
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return Request(tokens, min(len(continuation), len(tokens) - 1))

    def _score(self, requests: list[Request]) -> list[SequenceScores]:
        return self._scorer.score(requests, progress=self._progress)

    @property
    def _begin(self) -> str | None:
        """The text of the token that stands before texts, where the tokenizer can say it."""
        token = self._scorer.prefix_token
        decode = getattr(self.tokenizer, "decode", None)
        return None if decode is None or token is None else decode([token])
