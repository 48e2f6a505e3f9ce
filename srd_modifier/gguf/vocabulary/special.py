"""Tokens with a meaning: where a text begins and ends, what is unknown, masked, or fills a hole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.config import read_json
from srd_modifier.errors import SRDError

# GGUF's name, the attribute of a tokenizer and the field of config.json that hold it
_BY_ATTRIBUTE = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unknown": "unk_token_id",
    "seperator": "sep_token_id",  # sic
    "padding": "pad_token_id",
    "mask": "mask_token_id",
}
# No setting names these: models agree on the texts. The order within a row is by how particular the text is.
_BY_TEXT = {
    "eot": ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<end_of_utterance>", "[EOT]"),
    "eom": ("<|eom_id|>",),
    "fim_pre": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<\uff5cfim\u2581begin\uff5c>", "\u2581<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<\uff5cfim\u2581hole\uff5c>", "\u2581<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<\uff5cfim\u2581end\uff5c>", "\u2581<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<reponame>", "<fim-repo>"),
    "fim_sep": ("<|file_sep|>",),
}
# llama.cpp stops at these without being told
_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]")


@dataclass(frozen=True)
class Special:
    """The ids by GGUF's names, and what is put around every text."""

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool


def read_special(tokenizer: Any, config: Mapping[str, Any], directory: Path) -> Special:
    """Find the special tokens.

    What ends a generation is what generation_config.json says; of several tokens, the tokenizer's own is `eos`, and
    the others are `eot` and `eom`, by which llama.cpp stops as well. There is no place for a fourth.

    Raises:
        SRDError: there is no token that ends a text, or the tokenizer puts around a text what llama.cpp cannot.
    """
    config = {**config, **(config.get("text_config") or {})}
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())  # configurations name tokens that are not there
    ids: dict[str, int] = {}
    for name, attribute in _BY_ATTRIBUTE.items():
        token: Any = getattr(tokenizer, attribute, None)
        token = config.get(attribute) if token is None else token
        if token in known:
            ids[name] = token
    before, after = _around(tokenizer)
    if len(before) > 1 or len(after) > 1:
        raise SRDError(
            f"{directory}: the tokenizer puts the tokens {before} before and {after} after a text; llama.cpp can put "
            "one token at most, so change the tokenizer's post-processor"
        )
    if before:
        ids["bos"] = before[0]
    ends = [token for token in _ends(tokenizer, config, directory) if token in known]
    if not ends:
        raise SRDError(
            f"{directory}: no token ends a text; llama.cpp would take any token for it, so name it as eos_token_id in "
            "generation_config.json"
        )
    ids["eos"] = after[0] if after else ends[0]
    for name, texts in _BY_TEXT.items():
        found = [vocabulary[text] for text in texts if text in vocabulary]
        if found:
            ids[name] = found[0]
    told = {vocabulary.get(text) for text in _KNOWN_ENDS} | {ids["eos"], ids.get("eot"), ids.get("eom")}
    others = [token for token in ends if token not in told]
    for name in ("eot", "eom"):
        if others and ids.get(name, ids["eos"]) == ids["eos"]:
            ids[name] = others.pop(0)
    return Special(ids, add_bos=bool(before), add_eos=bool(after))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after every text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return whole, []


def _ends(tokenizer: Any, config: Mapping[str, Any], directory: Path) -> list[Any]:
    """The tokens that end a generation, the tokenizer's own first."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    own = tokenizer.eos_token_id
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [own] if named is None else named if isinstance(named, list) else [named]
    return sorted(dict.fromkeys(ends), key=lambda token: token != own)
