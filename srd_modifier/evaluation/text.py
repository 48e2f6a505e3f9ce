"""The text that is scored: read once, identified by its digest, and tokenized."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srd_modifier.errors import ConfigError, SRDError


@dataclass(frozen=True)
class Text:
    """A UTF-8 file's content as it lies on disk, and the SHA-256 of its bytes in hexadecimal."""

    path: Path
    content: str
    sha256: str


def read_text(path: Path) -> Text:
    """Read a UTF-8 text file, line ends untouched.

    Raises:
        SRDError: The file is missing, is not a file, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SRDError(f"{path}: the text cannot be read: {error.strerror}") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SRDError(f"{path}: the text is not UTF-8, byte {error.start} does not belong") from error
    return Text(path=path, content=content, sha256=hashlib.sha256(data).hexdigest())


def tokenize(text: Text, tokenizer: Any, *, max_tokens: int | None = None) -> Tensor:
    """Token ids of the whole text, int64 [tokens], with the special tokens this tokenizer adds on its own.

    Args:
        text: What to tokenize.
        tokenizer: A Transformers tokenizer.
        max_tokens: Keep only this many tokens from the start, `None` for all.

    Raises:
        ConfigError: `max_tokens` is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    # Not verbose: the text is longer than a window on purpose.
    ids = tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def bos_where_added(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer starts every text with it, else `None`.

    Having a BOS token is not enough: many vocabularies define one that they never put before a text, and a model
    trained without it scores worse behind it.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return int(bos) if ids and ids[0] == bos else None
