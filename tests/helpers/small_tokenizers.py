"""Tokenizers of every kind that language models use, trained on the repository's text and lines in other scripts."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from strings import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

DEMO = Path(__file__).parents[2] / "examples" / "text" / "demo.txt"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
VOWELS = r"[aeiou]|[^aeiou]+"


def corpus() -> list[str]:
    return [*DEMO.read_text(encoding="utf-8").splitlines(keepends=True), *TEXTS * 3]


def byte_level(
    pre_tokenizer: Any,
    *,
    normalizer: Any = None,
    ignore_merges: bool = False,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added: tuple[str, ...] = ("<think>", "</think>"),
    bos: str | None = None,
    eos: str = "<|im_end|>",
    size: int = 900,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with `bos`, every text begins with it."""
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([*special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    if bos is not None:
        begin = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def _split(expression: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2() -> Any:
    return byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), special=("<|endoftext|>",), added=(), eos="<|endoftext|>"
    )


def smollm2() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def llama3() -> Any:
    tokenizer = byte_level(
        _split(LLAMA3),
        ignore_merges=True,
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        added=(),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    return tokenizer


def llama3_with_merges() -> Any:
    return byte_level(_split(LLAMA3))


def qwen2() -> Any:
    return byte_level(_split(QWEN2), normalizer=normalizers.NFC())


def vowels() -> Any:
    """One that llama.cpp does not have."""
    return byte_level(_split(VOWELS))


@cache
def _pieces(size: int = 700) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Merged pieces in order, and single characters, of a BPE on text whose spaces are U+2581."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        [line.replace("\x00", "") for line in corpus()],
        trainers.BpeTrainer(vocab_size=size, limit_alphabet=250, show_progress=False),
    )
    ids = tokenizer.get_vocab()
    texts = sorted(ids, key=ids.__getitem__)
    return tuple(text for text in texts if len(text) > 1), tuple(text for text in texts if len(text) == 1)


def _sentencepiece(first: list[str], runs: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary as SentencePiece's BPE has it, and the merges that Transformers reads out of it."""
    merged, characters = _pieces()
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *merged, *characters]
    ids = {text: token for token, text in enumerate(dict.fromkeys(pieces))}
    scores = {text: -float(index) for index, text in enumerate([*runs, *merged, *characters])}
    return ids, generate_merges(ids, scores)


def llama2() -> Any:
    """As Llama 2's and TinyLlama's tokenizer.json have it."""
    ids, merges = _sentencepiece(["<unk>", "<s>", "</s>"], [])
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama2_rebuilt(*, legacy: bool = False) -> Any:
    """As Transformers 5 rebuilds Llama 2's, TinyLlama's and Mistral's."""
    ids, merges = _sentencepiece(["<unk>", "<s>", "</s>"], [])
    return LlamaTokenizer(vocab=ids, merges=merges, legacy=legacy, add_bos_token=True)


def gemma() -> Any:
    runs = ["\n" * count for count in range(1, 32)] + ["\u2581" * count for count in range(2, 32)]
    ids, merges = _sentencepiece(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"], runs
    )
    tokenizer = GemmaTokenizer(vocab=ids, merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in runs])
    return tokenizer


def gemma_by_rank() -> Any:
    """Gemma's steps on merges that a trainer made, so that not every pair that could be merged is."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(
        re.findall(r"[^ \n]+ ?|\n+", "\n".join(corpus()).replace("\x00", "")),
        trainers.BpeTrainer(
            vocab_size=900,
            limit_alphabet=200,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    return _only_special(tokenizer, special, bos="<bos>", eos="<eos>")


def _only_special(tokenizer: Tokenizer, special: list[str], *, bos: str, eos: str) -> Any:
    """`tokenizer` with byte tokens as a part of the vocabulary and not as added tokens."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [entry for entry in description["added_tokens"] if entry["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    begin = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos)


def unigram() -> Any:
    """As T5's, without its table of replacements."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r" +\z"), ""), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [line.replace("\x00", "") for line in corpus()],
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    # SentencePiece's scores are float32, and so are GGUF's; those of the trainer are not
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    model["vocab"] = [(text, float(np.float32(score))) for text, score in model["vocab"]]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def wordpiece() -> Any:
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "##a": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


KNOWN: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        gpt2,
        smollm2,
        llama3,
        llama3_with_merges,
        qwen2,
        llama2,
        llama2_rebuilt,
        gemma,
        gemma_by_rank,
        unigram,
    )
}
