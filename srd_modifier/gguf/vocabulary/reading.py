"""From a Hugging Face tokenizer to a vocabulary that llama.cpp has confirmed."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.errors import SRDError
from srd_modifier.gguf.vocabulary.probe import TEXTS, probe
from srd_modifier.gguf.vocabulary.schemes import Scheme, schemes
from srd_modifier.gguf.vocabulary.special import read_special
from srd_modifier.gguf.vocabulary.tokens import added_tokens, pipeline, read_tokens, shrunk
from srd_modifier.gguf.vocabulary.verification import Reference, differences, first_difference
from srd_modifier.gguf.vocabulary.vocabulary import TokenType, Vocabulary

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer.model.v3")
_SAMPLES = 128
# from how many candidates on they are screened, and with how many merges
_MANY = 5
_SCREENING_MERGES = 2000


def read_vocabulary(directory: Path, config: dict[str, Any], *, rows: int) -> Vocabulary:
    """Read the tokenizer of a model as llama.cpp needs it.

    Nothing is guessed: of the ways to tokenize that llama.cpp has, those that may fit are tried in llama.cpp itself
    with this very vocabulary, until one gives the ids of the Hugging Face tokenizer for a few hundred texts. Where
    llama.cpp is known to differ whatever the file says, that is left out of the comparison and told in
    `Vocabulary.differences`:

    - it has no Unicode normalization for byte-level BPE: NFC (Qwen) is on the caller;
    - U+2581 in a text, which marks spaces in SentencePiece's tokens: Gemma has tokens of its own for runs of it;
    - its SentencePiece puts a space before every text and after special tokens. Transformers 5 rebuilds the
      tokenizers of Llama 2, Mistral and TinyLlama to do so at the start only, and only if there is no space.

    Args:
        directory: The model's directory, with its tokenizer.
        config: Its config.json.
        rows: How many rows its embedding has. The tokens may be fewer.

    Raises:
        MissingExtraError: gguf or xllamacpp is not installed.
        SRDError: there is no tokenizer; llama.cpp has none of its kind, or none that gives the same ids; it has a
            token twice; or it has more tokens than the embedding has rows.
    """
    for library in ("gguf", "xllamacpp"):
        require(library, extra="gguf")
    tokenizer = _load(directory)
    description = pipeline(tokenizer)
    candidates = schemes(description, config.get("model_type", ""))
    if not candidates:
        raise SRDError(
            f"{directory}: the tokenizer is a {description['model']['type']}, and only BPE and Unigram can be "
            "exported to GGUF"
        )
    special = read_special(tokenizer, config, directory)
    unknown = special.ids.get("unknown")
    if unknown in [token for name, token in special.ids.items() if name != "unknown"]:
        unknown = None  # it serves for something else, too
    tokens = read_tokens(description, directory, unknown=unknown, rows=rows)

    def vocabulary(scheme: Scheme) -> Vocabulary:
        return Vocabulary(
            **vars(tokens),
            **vars(special),
            **vars(scheme),
            chat_template=tokenizer.chat_template or None,
            differences=differences(description),
        )

    added = [token for token in added_tokens(description) if tokens.types[token.token] is not TokenType.NORMAL]
    reference = Reference(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        differences(description),
        tuple(token.text for token in added),
    )
    meant = [tokens.tokens[token] for token in special.ids.values()]
    expected = [reference.expected(text) for text in probe(_samples(tokenizer, tokens.types), added, meant)]
    reason = None
    for scheme in _screened(candidates, description, directory):
        found = first_difference(vocabulary(scheme), expected, tokenizer.encode)
        if found is None:
            return vocabulary(scheme)
        reason = reason or f"with {scheme}, {found}"
    raise SRDError(
        f"{directory}: none of llama.cpp's {len(candidates)} tokenizers of this kind does what this one does: "
        f"{reason}; use the tokenizer of a model that llama.cpp supports, or add this one's pre-tokenizer to llama.cpp"
    )


def _screened(candidates: list[Scheme], description: dict[str, Any], directory: Path) -> Iterator[Scheme]:
    """The first of the candidates, which is nearly always right, then those right for the first merges alone.

    A large vocabulary takes llama.cpp a second to load, and there may be thirty candidates. What they differ in is
    seen with few merges as well.
    """
    yield candidates[0]
    if len(candidates) < _MANY:
        yield from candidates[1:]
        return
    small = shrunk(description, _SCREENING_MERGES)
    rows = len(small["model"]["vocab"])
    tokens = read_tokens(small, directory, unknown=None, rows=rows)
    reference = Reference(_encoder(small), differences(description), ())
    expected = [reference.expected(text) for text in TEXTS]
    for scheme in candidates[1:]:
        vocabulary = Vocabulary(**vars(tokens), **vars(scheme), ids={"bos": 0, "eos": 0}, add_bos=False, add_eos=False)
        if first_difference(vocabulary, expected) is None:
            yield scheme


def _encoder(description: dict[str, Any]) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(description))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in _FILES):
        raise SRDError(f"{directory}: there is no tokenizer beside config.json ({', '.join(_FILES[:3])})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # the tokenizers library raises Exception itself for what it cannot parse
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SRDError(f"{directory}: the tokenizer cannot be loaded: {first}") from error
    if not tokenizer.is_fast:
        raise SRDError(f"{directory}: {type(tokenizer).__name__} has no tokenizer.json, which the export to GGUF needs")
    return tokenizer


def _samples(tokenizer: Any, types: tuple[TokenType, ...]) -> list[str]:
    """The texts of some of the vocabulary's own tokens, that are whole characters."""
    normal = [token for token, kind in enumerate(types) if kind is TokenType.NORMAL]
    chosen = random.Random(0).sample(normal, min(_SAMPLES, len(normal)))
    texts = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in chosen]
    return [text for text in texts if "\ufffd" not in text]
