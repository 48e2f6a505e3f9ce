"""llama.cpp's own word on whether a vocabulary tokenizes as the Hugging Face tokenizer does."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.vocabulary.tokens import SPACE, added_tokens
from srd_modifier.gguf.vocabulary.vocabulary import Vocabulary
from srd_modifier.gguf.writer import open_writer

_WIDTH = 32

COMPOSITION = (
    "llama.cpp does not compose characters (Unicode's NFC) as this tokenizer does: decomposed text, such as an e and "
    "a combining accent, becomes other tokens"
)
PREFIX = (
    "llama.cpp puts a space before every text, after special tokens and before a text's own spaces too; this "
    "tokenizer does so only at the start of a text that has none"
)
MARK = "llama.cpp tokenizes U+2581, which marks spaces in tokens, otherwise than this tokenizer if a text has it"


@dataclass(frozen=True)
class Reference:
    """What llama.cpp is to reproduce.

    Attributes:
        encode: the tokenizer's ids of a text, nothing added around it.
        differences: which of `COMPOSITION`, `PREFIX` and `MARK` apply.
        added: texts of the added tokens, longest first; needed for `PREFIX`.
    """

    encode: Callable[[str], list[int]]
    differences: tuple[str, ...]
    added: tuple[str, ...]

    def expected(self, text: str) -> tuple[str, list[int]]:
        """`text` without that in which llama.cpp always differs, and its ids.

        It is composed for `COMPOSITION`, and has spaces for `MARK`. For `PREFIX` what is between added tokens loses
        its leading spaces, and counts as a text of its own.
        """
        if COMPOSITION in self.differences:
            text = unicodedata.normalize("NFC", text)
        if MARK in self.differences:
            text = text.replace(SPACE, " ")
        if PREFIX not in self.differences:
            return text, self.encode(text)
        pattern = "|".join(map(re.escape, self.added))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        parts = [part if part in self.added else part.lstrip(f" {SPACE}") for part in parts]
        return "".join(parts), [token for part in parts for token in self.encode(part)]


def differences(description: dict[str, Any]) -> tuple[str, ...]:
    """What llama.cpp does otherwise than a `pipeline` for certain, whatever is in the file."""
    text = str(description["normalizer"])
    prefix = str(description["pre_tokenizer"])
    found = []
    if "'NFC'" in text:
        found.append(COMPOSITION)
    metaspace = "'Metaspace'" in prefix and "'never'" not in prefix
    unigram = description["model"]["type"] == "Unigram"
    if metaspace and not unigram:
        found.append(PREFIX)
    if (metaspace and unigram) or any(SPACE in token.text and not token.special for token in added_tokens(description)):
        found.append(MARK)
    return tuple(found)


def first_difference(
    vocabulary: Vocabulary,
    expected: Sequence[tuple[str, list[int]]],
    around: Callable[[str], list[int]] | None = None,
) -> str | None:
    """How llama.cpp's ids with `vocabulary` differ from the expected ones; None if they do not.

    Args:
        vocabulary: What to try.
        expected: Texts and their ids, see `Reference.expected`.
        around: The tokenizer's ids of a text, with what belongs at its start and end; None leaves that out.

    Raises:
        MissingExtraError: gguf or xllamacpp is not installed.
    """
    with TemporaryDirectory(prefix="srd-vocabulary-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_probe(path, vocabulary)
        try:
            with LlamaCpp(path, context=_WIDTH) as model:
                texts = [text for text, _ in expected]
                for (text, ids), found in zip(expected, model.tokenize_all(texts), strict=True):
                    if found != ids:
                        return f"{text!r} is {_shown(ids)} in Transformers and {_shown(found)} in llama.cpp"
                if around is not None and model.tokenize("a", add_special=True) != around("a"):
                    return "llama.cpp puts other tokens around a text"
        except MissingExtraError:
            raise
        except SRDError as error:
            return str(error).replace(f"{path}: ", "")
    return None


def write_probe(path: Path, vocabulary: Vocabulary) -> None:
    """Write a model of one layer, all zero, with a vocabulary: enough for llama.cpp to load and to tokenize."""
    writer = open_writer(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary.add_tokenizer_to(writer)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(vocabulary.tokens), _WIDTH)}
    shapes |= {name: (_WIDTH,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (_WIDTH, _WIDTH) for name in matrices}
    size = 0
    for name, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        length = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(f"{name}.weight", shape, dtype, length)
        size += writer.ggml_pad(length, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(start + size)  # zeros that take no space on disk


def _shown(ids: Sequence[int]) -> str:
    return str([*ids[:12], "..."] if len(ids) > 12 else [*ids]).replace("'", "")
