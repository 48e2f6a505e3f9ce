"""How a token stream is cut into windows, and which tokens of each window are scored.

Two conventions, which give different perplexities for the same model and text:

`sliding`   windows of `ctx` tokens that advance by `stride`, as in the Hugging Face perplexity guide and the
            published SRD tables. Each window scores only the tokens that no earlier window scored; the first
            scores all but its first token, and the last may be shorter than `ctx`.
`llamacpp`  windows of `ctx` tokens that do not overlap, as llama.cpp's `llama-perplexity`. Each scores its
            second half: the `ctx - ctx // 2 - 1` tokens from position `ctx // 2 + 1` on. A tail shorter than
            `ctx` is dropped, and `2 * ctx` tokens are required.

llama.cpp also replaces the first token of every window by BOS where the vocabulary asks for a BOS (it does not
prepend one, so the window keeps its length and the replaced token is only lost as context). `window_inputs`
does the same when it is given the BOS id. In both conventions the stream itself is tokenized with the
tokenizer's own special tokens, so where it adds a BOS the stream starts with one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError, SRDError


class Convention(str, Enum):
    """The name of a windowing rule, as it is given on the command line and reported."""

    SLIDING = "sliding"
    LLAMACPP = "llamacpp"


DEFAULT_CTX = {Convention.SLIDING: 2048, Convention.LLAMACPP: 512}
DEFAULT_STRIDE = 512

# A standard error needs two values.
_FEWEST_SCORED = 2


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` (exclusive) of the stream, of which the last `scored` are scored."""

    start: int
    stop: int
    scored: int

    @property
    def length(self) -> int:
        """Tokens the model reads."""
        return self.stop - self.start


@dataclass(frozen=True)
class WindowRule:
    """A convention with its sizes in tokens; `stride` is how far a window lies from the one before."""

    convention: Convention
    ctx: int
    stride: int

    def windows(self, num_tokens: int) -> list[Window]:
        """Cut a stream of `num_tokens` tokens.

        Raises:
            SRDError: The stream is too short for this rule.
        """
        if self.convention is Convention.LLAMACPP:
            windows = _separate_windows(num_tokens, ctx=self.ctx)
        else:
            windows = _sliding_windows(num_tokens, ctx=self.ctx, stride=self.stride)
        scored = sum(window.scored for window in windows)
        if scored < _FEWEST_SCORED:
            raise SRDError(
                f"the text has too few tokens: {num_tokens} tokens leave {scored} to score with ctx {self.ctx}, "
                f"at least {_FEWEST_SCORED} are needed"
            )
        return windows


def window_rule(
    convention: Convention = Convention.SLIDING, *, ctx: int | None = None, stride: int | None = None
) -> WindowRule:
    """A checked rule; `None` takes the convention's own size (2048 and 512; 512 without overlap).

    Raises:
        ConfigError: `ctx` is too small to score anything, `stride` is outside 1 to `ctx`, or a stride other than
            `ctx` was asked for where windows do not overlap.
    """
    size = DEFAULT_CTX[convention] if ctx is None else ctx
    if convention is Convention.LLAMACPP:
        if size < 3:
            raise ConfigError(f"ctx must be at least 3 with the llamacpp convention, got {size}")
        if stride not in (None, size):
            raise ConfigError(
                f"the llamacpp convention has no overlap: leave stride out (or give {size}), got {stride}"
            )
        return WindowRule(convention, ctx=size, stride=size)
    step = min(DEFAULT_STRIDE, size) if stride is None else stride
    if size < 2:
        raise ConfigError(f"ctx must be at least 2, got {size}")
    if step < 1:
        raise ConfigError(f"stride must be at least 1, got {step}")
    if step > size:
        raise ConfigError(f"stride must not exceed ctx {size}, or tokens would be skipped, got {step}")
    return WindowRule(convention, ctx=size, stride=step)


def _sliding_windows(num_tokens: int, *, ctx: int, stride: int) -> list[Window]:
    windows: list[Window] = []
    scored_up_to = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + ctx, num_tokens)
        # The first token of a window has nothing before it to be predicted from. That costs one token in all,
        # except with stride == ctx, where it costs one per window (as it does in the Hugging Face guide).
        scored = min(stop - scored_up_to, stop - start - 1)
        if scored > 0:
            windows.append(Window(start, stop, scored))
        scored_up_to = stop
        if stop == num_tokens:
            break
    return windows


def _separate_windows(num_tokens: int, *, ctx: int) -> list[Window]:
    if num_tokens < 2 * ctx:
        raise SRDError(
            f"the text has too few tokens: the llamacpp convention needs {2 * ctx} (two windows of {ctx}), "
            f"got {num_tokens}"
        )
    scored = ctx - ctx // 2 - 1
    return [Window(start, start + ctx, scored) for start in range(0, num_tokens - ctx + 1, ctx)]


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows, at most `batch_size` at a time, all of one length and one scored count.

    Windows of one shape need no padding, so no result depends on how a model treats padding.
    """
    batch: list[Window] = []
    for window in windows:
        shape = (window.length, window.scored)
        if batch and (len(batch) == batch_size or shape != (batch[0].length, batch[0].scored)):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def window_inputs(tokens: Tensor, batch: Sequence[Window], *, first_token: int | None = None) -> Tensor:
    """What the model reads: int64 [len(batch), length].

    Args:
        tokens: The stream, int64 [num_tokens].
        batch: Windows of one length.
        first_token: Token id that replaces the first token of every window (llama.cpp's BOS), `None` for none.
            It is never a scored position.
    """
    inputs = torch.stack([tokens[window.start : window.stop] for window in batch])
    if first_token is not None:
        inputs[:, 0] = first_token
    return inputs
