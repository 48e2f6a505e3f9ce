"""What both kinds of server need: tokens of texts, and requests that are refused before anything is computed."""

from collections.abc import Callable, Sequence
from typing import Any

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Request
from srd_modifier.evaluation.servers._http import Server


def token_ids(server: Server, body: dict[str, Any]) -> list[int]:
    """What /tokenize answers.

    Raises:
        SRDError: The server fails, or its answer has no token ids.
    """
    return checked_ids(server, server.ask("/tokenize", body).get("tokens"))


def checked_ids(server: Server, tokens: Any) -> list[int]:
    """Token ids as they came in an answer.

    Raises:
        SRDError: They are something else.
    """
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise SRDError(
            f"{server.name}: the answer to /tokenize has no token ids, so another kind of server runs there; give the "
            "address of llama.cpp's or vLLM's"
        )
    return tokens


def leading_token(encode: Callable[..., list[int]]) -> int | None:
    """The token that a tokenizer puts before every text, which is BOS; `None` if it puts none there."""
    with_special, plain = encode("a"), encode("a", add_special=False)
    if len(with_special) > len(plain) and with_special[:1] != plain[:1]:
        return with_special[0]
    return None


def check_requests(name: str, requests: Sequence[Request], *, longest: int | None) -> None:
    """Refuse what cannot be scored.

    Args:
        name: Whose requests they are.
        requests: Any.
        longest: The most tokens of a request, scored ones included; `None` for any number.

    Raises:
        SRDError: A request is longer, or has nothing to score or nothing before it.
    """
    for request in requests:
        length = len(request.tokens)
        if not 1 <= request.scored < length:
            raise SRDError(
                f"{name}: {request.scored} of {length} tokens cannot be scored, at least one token must stand before "
                "them"
            )
        if longest is not None and length > longest:
            raise SRDError(
                f"{name}: a sequence of {length} tokens does not fit the server's context, which has room for "
                f"{longest}; start the server with a longer one"
            )


def check_generation(name: str, prompt: Sequence[int], max_tokens: int, *, context: int | None) -> None:
    """Refuse what cannot be generated in full.

    Args:
        name: Whose prompt it is.
        prompt: Token ids.
        max_tokens: The most that may follow.
        context: The most tokens of both; `None` for any number.

    Raises:
        SRDError: There is no prompt, nothing to generate, or too much of both.
    """
    if not prompt or max_tokens < 1:
        raise SRDError(
            f"{name}: {max_tokens} tokens after a prompt of {len(prompt)} cannot be generated, at least one of each is "
            "needed"
        )
    if context is not None and len(prompt) + max_tokens > context:
        raise SRDError(
            f"{name}: a prompt of {len(prompt)} tokens and {max_tokens} to generate do not fit the server's context "
            f"of {context}; start the server with a longer one"
        )
