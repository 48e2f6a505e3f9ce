"""A vocabulary, and its keys in a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class TokenType(IntEnum):
    """What llama.cpp does with a token's text; the numbers are GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # found in a text before all else, and not printed
    USER_DEFINED = 4  # found in a text before all else, and printed
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """All of `tokenizer.*` in a GGUF file.

    Attributes:
        model: llama.cpp's tokenizer: `gpt2` is BPE, `llama` merges by score, `t5` is Unigram, and `gemma4` is BPE
            on text whose spaces are U+2581.
        pre: the name of its pre-tokenizer, for `gpt2` only.
        tokens: their texts by id, one for each row of the embedding.
        types: their types by id.
        merges: for the two kinds of BPE, `left right` in order of rank.
        scores: for the others, by id.
        ids: special tokens by the name that GGUF's keys have: `bos`, `eos`, `unknown`, `padding`, `eot`, ...
        add_bos: whether a text begins with `bos`.
        add_eos: whether a text ends with `eos`.
        add_space_prefix: whether a space is put before a text, and after special tokens.
        remove_extra_whitespaces: for `t5`, whether runs of spaces are one.
        normalization: for `t5`, SentencePiece's table of replacements; empty for none.
        chat_template: one Jinja template, or several by name; None if there is none.
        differences: where llama.cpp tokenizes otherwise than the Hugging Face tokenizer whatever the file says, a
            sentence each.
    """

    model: str
    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    normalization: bytes = field(default=b"", repr=False)
    chat_template: str | Mapping[str, str] | None = None
    differences: tuple[str, ...] = ()

    def add_to(self, writer: Any) -> None:
        """Add the keys to a `gguf.GGUFWriter`."""
        self.add_tokenizer_to(writer)
        if isinstance(self.chat_template, str):
            writer.add_chat_template(self.chat_template)
        elif self.chat_template:
            writer.add_chat_template(
                [{"name": name, "template": template} for name, template in self.chat_template.items()]
            )

    def add_tokenizer_to(self, writer: Any) -> None:
        """Add the keys that decide how a text is tokenized."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model in ("gpt2", "gemma4"):
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        for name, token in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.model == "t5":
            writer.add_remove_extra_whitespaces(self.remove_extra_whitespaces)
            if self.normalization:
                writer.add_precompiled_charsmap(self.normalization)
