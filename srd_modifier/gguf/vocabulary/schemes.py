"""llama.cpp's ways to tokenize, likeliest first for a given tokenizer."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from srd_modifier.gguf.vocabulary.tokens import read_merges

# Pre-tokenizers of llama.cpp's byte-level BPE, one name for each behaviour, with what their expressions have:
# `split` for one expression for all instead of GPT-2's, `digit` and `three` for how digits are grouped, `case` for
# words that end where upper follows lower case, `marks` for combining marks within words, `whole` for words of the
# vocabulary that are taken without merging (ignore_merges), `contractions`, `ideographs` and `punctuation` for own
# rules for them. Of equals, the first is the one that older builds of llama.cpp know.
_BYTE_LEVEL = {
    "gpt-2": "contractions",
    "smollm": "digit contractions",
    "llama-bpe": "split three whole contractions",
    "qwen2": "split digit contractions",
    "smaug-bpe": "split three contractions",
    "gpt-4o": "split three case marks contractions",
    "tekken": "split digit case marks whole",
    "qwen35": "split digit marks contractions",
    "default": "punctuation contractions",
    "falcon": "punctuation contractions three",
    "deepseek-v3": "split three marks ideographs punctuation",
    "deepseek-llm": "split ideographs punctuation",
    "deepseek-coder": "split digit ideographs punctuation",
    "poro-chat": "split punctuation",
    "viking": "split digit punctuation",
    "superbpe": "three",
    "bailingmoe": "split digit contractions possessive",
    "seed-coder": "split digit contractions newlines",
    "granite-embed-multi-97m": "split three case marks contractions whole",
    "tiny_aya": "split three case marks contractions digits-from-the-right",
    "youtu": "split digit case marks contractions ideographs whole",
    "exaone-moe": "split digit marks contractions spaces",
    "afmoe": "split three marks ideographs punctuation digits-from-the-right",
    "jais-2": "split three contractions spaces",
    "minicpm5": "split three contractions whole digits",
    "ufakzeka": "split digit",
    "laguna": "split digit contractions lines",
    "spark2_5": "split three marks ideographs punctuation newlines",
    "kimi-k2": "split three case marks contractions ideographs",
    "chameleon": "digit punctuation contractions",
}


@dataclass(frozen=True)
class Scheme:
    """A way to tokenize; see `Vocabulary` for the fields."""

    model: str
    pre: str | None = None
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    normalization: bytes = b""

    def __str__(self) -> str:
        return self.model if self.pre is None else f"{self.model} with the pre-tokenizer {self.pre}"


def schemes(description: dict[str, Any], model_type: str) -> list[Scheme]:
    """What may tokenize as `description` does; empty if llama.cpp has no such kind of tokenizer.

    The order is a guess, by which the first to be tried is nearly always right.

    Args:
        description: A tokenizer's `pipeline`.
        model_type: config.json's.
    """
    model = description["model"]
    steps = [*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])]
    types = {step["type"] for step in steps}
    if model["type"] == "Unigram":
        tables = [base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled"]
        collapses = _collapses(steps)
        scheme = Scheme("t5", None, _has_prefix(steps), collapses, b"".join(tables))
        return [scheme, replace(scheme, remove_extra_whitespaces=not collapses)]
    if model["type"] != "BPE":
        return []
    if "ByteLevel" in types:
        return [Scheme("gpt2", name) for name in _byte_level(description, steps)]
    by_score = Scheme("llama", add_space_prefix=_has_prefix(steps))
    by_rank = [Scheme("gemma4"), Scheme("gpt2", "sarvam-moe")]
    if by_score.add_space_prefix or (_is_closed(model) and not model_type.startswith("gemma4")):
        return [by_score, *by_rank]
    return [*by_rank, by_score]


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or a pre-tokenizer, sequences resolved."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step.get("normalizers") or step.get("pretokenizers") or ():
            yield from _steps(part)
    else:
        yield step


def _has_prefix(steps: list[dict[str, Any]]) -> bool:
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _is_closed(model: dict[str, Any]) -> bool:
    """Whether any two tokens that make a third are a merge, without which to merge by score is another thing.

    Vocabularies that come from SentencePiece are, those that the tokenizers library trained seldom are.
    """
    merges = set(read_merges(model))
    made = {left + right for left, right in merges}
    vocabulary = model["vocab"].keys()
    return all(
        (text[:at], text[at:]) in merges or text[:at] not in vocabulary or text[at:] not in vocabulary
        for text in made
        for at in range(1, len(text))
    )


def _collapses(steps: list[dict[str, Any]]) -> bool:
    return any(step["type"] == "Replace" and "{2,}" in str(step["pattern"]) for step in steps)


def _byte_level(description: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """The names of `_BYTE_LEVEL`, the one with most in common with the tokenizer first."""
    text = json.dumps([step.get("pattern") for step in steps])
    gpt2 = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    digits = any(step["type"] == "Digits" and step.get("individual_digits") for step in steps)
    found = {
        "split": not gpt2,
        "contractions": gpt2 or "'ll" in text.lower() or "|ll|" in text,
        "three": "{1,3}" in text or "{3}" in text,
        "digit": digits or ("{N}" in text.replace("{N}]", "") and "{N}{" not in text and "{N}+" not in text),
        "case": "{Lu}" in text,
        "marks": "{M}" in text,
        "ideographs": "Han" in text or "\\u4e00" in text,
        "punctuation": "{P}" in text or any(step["type"] == "Punctuation" for step in steps),
        "whole": bool(description["model"].get("ignore_merges")),
    }
    own = {name for name, present in found.items() if present}
    return sorted(_BYTE_LEVEL, key=lambda name: len(own ^ set(_BYTE_LEVEL[name].split())))
