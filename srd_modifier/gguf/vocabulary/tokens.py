"""Tokens, types, merges and scores out of a tokenizer of Transformers."""

import json
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_modifier.errors import SRDError
from srd_modifier.gguf.vocabulary.vocabulary import TokenType

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class AddedToken:
    """A token whose text is found before all else.

    Attributes:
        text: what is found.
        token: its id.
        special: whether it is left out of decoded text.
        strips: whether it takes the spaces beside it along, which llama.cpp cannot do.
    """

    text: str
    token: int
    special: bool
    strips: bool


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer knows, in GGUF's order and spelling; see `Vocabulary` for the fields."""

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]


def pipeline(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as `tokenizer.json` describes it, after all that Transformers changes when it loads one."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def read_merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a `pipeline`'s model in order of rank, empty if it has none."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def added_tokens(description: dict[str, Any]) -> list[AddedToken]:
    """The added tokens of a `pipeline`, longest text first, which is how llama.cpp looks for them."""
    found = [
        AddedToken(entry["content"], entry["id"], entry["special"], entry["lstrip"] or entry["rstrip"])
        for entry in description["added_tokens"]
    ]
    return sorted(found, key=lambda token: (-len(token.text.encode()), token.token))


def shrunk(description: dict[str, Any], merges: int) -> dict[str, Any]:
    """A `pipeline` of BPE with its first `merges` merges only, all else the same but for the ids."""
    model = description["model"]
    kept = model["merges"][:merges]
    made = [left + right for left, right in read_merges({"merges": kept})]
    added = [entry["content"] for entry in description["added_tokens"]]
    texts = dict.fromkeys([*(text for text in model["vocab"] if len(text) == 1), *made, *added])
    ids = {text: token for token, text in enumerate(texts)}
    return {
        **description,
        "added_tokens": [{**entry, "id": ids[entry["content"]]} for entry in description["added_tokens"]],
        "post_processor": None,
        "model": {**model, "vocab": ids, "merges": kept},
    }


def read_tokens(description: dict[str, Any], directory: Path, *, unknown: int | None, rows: int) -> Tokens:
    """Lay out the tokens of a `pipeline` by id.

    Args:
        description: The `pipeline`.
        directory: The model, for messages.
        unknown: The id of the token for what has no other, if there is one and it serves for nothing else.
        rows: How many tokens there are to be. Ids that the tokenizer does not have are unused.

    Raises:
        SRDError: two ids have the same text, or there are more tokens than rows.
    """
    model = description["model"]
    merges = read_merges(model)
    scored = _unigram(model, directory) if model["type"] == "Unigram" else {}
    texts = dict(enumerate(scored)) if scored else {token: text for text, token in model["vocab"].items()}
    added = {token.token: token for token in added_tokens(description)}
    texts |= {token.token: token.text for token in added.values()}
    _check(texts.items(), directory, rows)

    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    types = [TokenType.UNUSED] * rows
    for token, text in texts.items():
        types[token] = _type(text, added.get(token), ranks, is_byte=bool(model.get("byte_fallback")))
    if unknown is not None and unknown in texts:
        types[unknown] = TokenType.UNKNOWN
    tokens = [texts.get(token, f"[PAD{token}]") for token in range(rows)]
    _check(enumerate(tokens), directory, rows)
    # llama.cpp merges whatever pair has the highest score; these make it follow the merges' order
    lowest = len(ranks)
    scores = [
        scored.get(text, 0.0) if scored else -float(ranks.get(text, lowest + token))
        for token, text in enumerate(tokens)
    ]
    return Tokens(tuple(tokens), tuple(types), tuple(f"{left} {right}" for left, right in merges), tuple(scores))


def _unigram(model: dict[str, Any], directory: Path) -> dict[str, float]:
    scored = {text: score for text, score in model["vocab"]}
    if len(scored) < len(model["vocab"]):
        seen: set[str] = set()
        for text, _ in model["vocab"]:
            if text in seen:
                raise _duplicate(text, directory)
            seen.add(text)
    return scored


def _type(text: str, added: AddedToken | None, made: Container[str], *, is_byte: bool) -> TokenType:
    if added is None:
        return TokenType.BYTE if is_byte and _BYTE.fullmatch(text) else TokenType.NORMAL
    if added.special:
        return TokenType.CONTROL
    # Gemma's runs of spaces are added tokens that merges make as well. llama.cpp makes them from the merges too,
    # and prints the spaces that they stand for only if they are normal.
    return TokenType.NORMAL if SPACE in text and text in made else TokenType.USER_DEFINED


def _check(texts: Iterable[tuple[int, str]], directory: Path, rows: int) -> None:
    ids: dict[str, int] = {}
    for token, text in texts:
        if token >= rows:
            raise SRDError(
                f"{directory}: the tokenizer has a token {token} ({text!r}) but the embedding has only {rows} rows, so "
                "they do not belong together"
            )
        if text in ids:
            raise _duplicate(text, directory)
        ids[text] = token


def _duplicate(text: str, directory: Path) -> SRDError:
    return SRDError(f"{directory}: the tokenizer has the token {text!r} twice, which llama.cpp refuses")
