"""What a task needs of a language model, wherever the model runs: in this process, or behind a server's address."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A sequence of tokens, of which the last `scored` are scored given everything before them.

    At least one token stands before those that are scored.
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class SequenceScores:
    """Of each scored token of a request, in order.

    Attributes:
        log_probabilities: natural logarithm of its probability given all tokens before it, float64 [scored].
        greedy: whether it is the model's most likely token there, bool [scored].
    """

    log_probabilities: Tensor
    greedy: Tensor


class Scorer(Protocol):
    """A causal language model that says how likely tokens are."""

    @property
    def name(self) -> str:
        """What the user called it; errors are reported under this name."""
        ...

    @property
    def max_length(self) -> int | None:
        """The most tokens it reads at once, `None` where that is not known."""
        ...

    @property
    def prefix_token(self) -> int | None:
        """What stands before a text that is scored from its first token on: BOS, or EOS where there is no BOS."""
        ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around every text if `add_special`."""
        ...

    def score(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[SequenceScores]:
        """Score every request, in their order; `progress` is called with (requests done, requests in all)."""
        ...

    def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """The text that follows a prompt, up to `max_tokens` tokens or to the first of the `stop` texts.

        Args:
            prompt: token ids, special tokens included.
            max_tokens: at most so many.
            stop: texts that end it; they are not part of what is returned.
            temperature: 0 always takes the most likely token.
        """
        ...
