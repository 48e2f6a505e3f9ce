import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from strings import TEXTS, with_special
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from srd_modifier.errors import MissingExtraError, SRDError
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.vocabulary import Vocabulary, read_vocabulary, reading
from srd_modifier.gguf.vocabulary.verification import COMPOSITION, MARK, PREFIX, write_probe
from srd_modifier.gguf.vocabulary.vocabulary import TokenType

SHARED = Path(__file__).parents[3] / "shared" / "models"
SPACE = "\u2581"

SCHEMES = {
    "gpt2": ("gpt2", "gpt-2"),
    "smollm2": ("gpt2", "smollm"),
    "llama3": ("gpt2", "llama-bpe"),
    "llama3_with_merges": ("gpt2", "smaug-bpe"),
    "qwen2": ("gpt2", "qwen2"),
    "llama2": ("llama", None),
    "llama2_rebuilt": ("llama", None),
    "gemma": ("llama", None),
    "gemma_by_rank": ("gemma4", None),
    "unigram": ("t5", None),
}
DIFFERENCES = {"qwen2": (COMPOSITION,), "llama2_rebuilt": (PREFIX,), "gemma": (MARK,), "unigram": (MARK,)}
# the only texts that may become other tokens in llama.cpp, as `Vocabulary.differences` tells
EXCUSED: dict[str, Callable[[str], bool]] = {
    "qwen2": lambda text: not unicodedata.is_normalized("NFC", text),
    "llama2_rebuilt": lambda text: text.startswith((" ", SPACE)) or "<s>" in text or "</s>" in text or "<unk>" in text,
    "gemma": lambda text: SPACE * 2 in text,
    "unigram": lambda text: SPACE in text,
}


def save(tokenizer: Any, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory


def vocabulary_of(directory: Path, **config: Any) -> Vocabulary:
    rows = max(AutoTokenizer.from_pretrained(directory).get_vocab().values()) + 1
    return read_vocabulary(directory, {"model_type": "llama", **config}, rows=rows)


@contextmanager
def in_llama_cpp(vocabulary: Vocabulary, directory: Path) -> Iterator[LlamaCpp]:
    path = directory / "vocabulary.gguf"
    write_probe(path, vocabulary)
    with LlamaCpp(path, context=32) as model:
        yield model


def keys(vocabulary: Vocabulary, path: Path) -> dict[str, Any]:
    """The keys that the vocabulary puts into a file, read by gguf."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module", params=small_tokenizers.KNOWN)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_tokenizers.KNOWN[kind](), tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def vocabulary(trained: Path) -> Vocabulary:
    return vocabulary_of(trained)


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    return save(small_tokenizers.smollm2(), tmp_path / "smollm2")


def differing(tokenizer: Any, model: LlamaCpp, texts: list[str]) -> list[str]:
    return [text for text in texts if model.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)]


def test_there_are_texts_enough() -> None:
    assert len(TEXTS) >= 200


def test_llama_cpp_tokenizes_as_transformers(kind: str, trained: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    special = [text for token in tokenizer.get_added_vocab() for text in with_special(token)]
    excused = EXCUSED.get(kind, lambda text: False)
    texts = [text for text in [*TEXTS, *special] if not excused(text)]
    assert len(texts) >= 200
    with in_llama_cpp(vocabulary, tmp_path) as model:
        assert differing(tokenizer, model, texts) == []
        assert model.tokenize_all(TEXTS) == [model.tokenize(text) for text in TEXTS]


def test_the_scheme_is_the_one_that_is_known(kind: str, vocabulary: Vocabulary) -> None:
    assert (vocabulary.model, vocabulary.pre) == SCHEMES[kind]
    assert vocabulary.differences == DIFFERENCES.get(kind, ())


def test_what_is_put_around_a_text_is_the_same(trained: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    with in_llama_cpp(vocabulary, tmp_path) as model:
        for text in ("", "Hello world", "a\nb"):
            assert model.tokenize(text, add_special=True) == tokenizer.encode(text)


def test_tokens_are_in_the_order_of_their_ids(trained: Path, vocabulary: Vocabulary) -> None:
    assert {text: token for token, text in enumerate(vocabulary.tokens)} == AutoTokenizer.from_pretrained(
        trained
    ).get_vocab()


def test_composed_text_is_the_same_for_one_that_composes(tmp_path: Path) -> None:
    directory = save(small_tokenizers.qwen2(), tmp_path / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with in_llama_cpp(vocabulary_of(directory), tmp_path) as model:
        texts = [unicodedata.normalize("NFC", text) for text in TEXTS]
        assert differing(tokenizer, model, texts) == []
        assert differing(tokenizer, model, ["e\u0301"]) == ["e\u0301"]


def test_text_after_a_special_token_begins_with_a_space_in_llama_cpp(tmp_path: Path) -> None:
    directory = save(small_tokenizers.llama2_rebuilt(), tmp_path / "llama2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    alone = tokenizer.encode("Hello", add_special_tokens=False)
    with in_llama_cpp(vocabulary_of(directory), tmp_path) as model:
        assert model.tokenize("Hello<s>Hello") == [*alone, 1, *alone]
        assert tokenizer.encode("Hello<s>Hello", add_special_tokens=False) != [*alone, 1, *alone]


@pytest.mark.parametrize("name", ["tiny1m", "stories260K"])
def test_published_sentencepiece_vocabularies(name: str, tmp_path: Path) -> None:
    directory = SHARED / name / "hf"
    if not directory.is_dir():
        pytest.skip(f"needs the model {directory}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [*TEXTS, *(text for token in tokenizer.get_added_vocab() for text in with_special(token))]
    vocabulary = vocabulary_of(directory)
    with in_llama_cpp(vocabulary, tmp_path) as model:
        assert differing(tokenizer, model, texts) == []


def test_a_published_file_tokenizes_the_same(tmp_path: Path) -> None:
    path = SHARED / "stories260K" / "stories260Ktok512.gguf"
    if not path.is_file():
        pytest.skip(f"needs the file {path}")
    with LlamaCpp(path) as theirs, in_llama_cpp(vocabulary_of(path.parent / "hf"), tmp_path) as ours:
        assert [ours.tokenize(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]


def test_the_shipped_model(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    vocabulary = vocabulary_of(tiny_llama)
    assert vocabulary.pre == "smollm"
    with in_llama_cpp(vocabulary, tmp_path) as model:
        assert differing(tokenizer, model, [*TEXTS, *with_special("<|endoftext|>")]) == []


def test_types_of_byte_level_tokens(smollm2: Path) -> None:
    vocabulary = vocabulary_of(smollm2)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<|im_end|>"] is TokenType.CONTROL
    assert types["<think>"] is TokenType.USER_DEFINED
    assert types["a"] is TokenType.NORMAL


def test_types_of_sentencepiece_tokens(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save(small_tokenizers.gemma(), tmp_path / "gemma"))
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<unk>"] is TokenType.UNKNOWN
    assert types["<0x0A>"] is TokenType.BYTE
    assert types["<end_of_turn>"] is TokenType.CONTROL
    assert types["\n\n"] is TokenType.USER_DEFINED
    assert types[SPACE * 4] is TokenType.NORMAL  # printed as spaces


def test_rows_without_a_token_are_unused(smollm2: Path, tmp_path: Path) -> None:
    count = len(AutoTokenizer.from_pretrained(smollm2))
    vocabulary = read_vocabulary(smollm2, {}, rows=count + 3)
    assert vocabulary.tokens[count:] == tuple(f"[PAD{count + extra}]" for extra in range(3))
    assert set(vocabulary.types[count:]) == {TokenType.UNUSED}
    with in_llama_cpp(vocabulary, tmp_path) as model:
        assert max(model.tokenize(f"a [PAD{count}] b")) < count


def test_the_file_has_all_keys(tmp_path: Path) -> None:
    directory = save(small_tokenizers.llama3(), tmp_path / "llama3")
    vocabulary = vocabulary_of(directory)
    found = keys(vocabulary, tmp_path / "keys.gguf")
    tokens = found["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert tokens[found["tokenizer.ggml.bos_token_id"]] == "<|begin_of_text|>"
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|eot_id|>"
    assert tokens[found["tokenizer.ggml.eot_token_id"]] == "<|eot_id|>"
    assert tokens[found["tokenizer.ggml.eom_token_id"]] == "<|eom_id|>"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert "eot_id" in found["tokenizer.chat_template"]
    assert len(found["tokenizer.ggml.merges"]) == len(vocabulary.merges)
    assert "tokenizer.ggml.scores" not in found


def test_several_chat_templates_are_all_there(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    found = keys(vocabulary_of(save(tokenizer, tmp_path / "two")), tmp_path / "keys.gguf")
    assert found["tokenizer.chat_template"] == "{{ 1 }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ 2 }}"


def test_no_chat_template_is_no_key(smollm2: Path, tmp_path: Path) -> None:
    assert not [name for name in keys(vocabulary_of(smollm2), tmp_path / "keys.gguf") if "chat" in name]


def test_merges_may_be_written_in_either_way(smollm2: Path) -> None:
    pairs = vocabulary_of(smollm2)
    path = smollm2 / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["model"]["merges"] = [" ".join(merge) for merge in description["model"]["merges"]]
    path.write_text(json.dumps(description), encoding="utf-8")
    assert vocabulary_of(smollm2) == pairs


def test_tokens_to_fill_in_have_ids(tmp_path: Path) -> None:
    special = ("<|endoftext|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    tokenizer = small_tokenizers.byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special=special)
    vocabulary = vocabulary_of(save(tokenizer, tmp_path / "fim"))
    texts = {name: vocabulary.tokens[token] for name, token in vocabulary.ids.items() if name.startswith("fim")}
    assert texts == {"fim_pre": "<|fim_prefix|>", "fim_suf": "<|fim_suffix|>", "fim_mid": "<|fim_middle|>"}


def test_all_that_ends_a_generation_is_told(smollm2: Path) -> None:
    ids = AutoTokenizer.from_pretrained(smollm2).get_vocab()
    ends = [ids["<think>"], ids["<|im_end|>"], ids["<|im_start|>"]]
    (smollm2 / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = vocabulary_of(smollm2).ids
    assert found["eos"] == ids["<|im_end|>"]  # the tokenizer's own
    assert set(ends) <= set(found.values())


def test_the_generation_config_says_what_ends_a_text(smollm2: Path) -> None:
    end = AutoTokenizer.from_pretrained(smollm2).get_vocab()["<|endoftext|>"]
    (smollm2 / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert vocabulary_of(smollm2).ids["eos"] == end


def test_the_config_names_what_the_tokenizer_does_not(smollm2: Path) -> None:
    assert "bos" not in vocabulary_of(smollm2).ids
    assert vocabulary_of(smollm2, bos_token_id=7).ids["bos"] == 7


def test_ids_that_are_no_tokens_are_left_out(smollm2: Path) -> None:
    assert "padding" not in vocabulary_of(smollm2, pad_token_id=-1).ids
    assert "padding" not in vocabulary_of(smollm2, pad_token_id=100000).ids


def test_a_damaged_generation_config_is_refused(smollm2: Path) -> None:
    (smollm2 / "generation_config.json").write_text("{")
    with pytest.raises(SRDError, match=r"generation_config\.json"):
        vocabulary_of(smollm2)


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    directory = save(small_tokenizers.vowels(), tmp_path / "vowels")
    with pytest.raises(SRDError, match=r"vowels: none of llama\.cpp's \d+ tokenizers .* in Transformers and .*; use"):
        vocabulary_of(directory)


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizers.smollm2()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(SRDError, match=r"none of llama.cpp's"):
        vocabulary_of(save(tokenizer, tmp_path / "lower"))


def test_a_prefix_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizers.byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(SRDError, match="'Hello world' is"):
        vocabulary_of(save(tokenizer, tmp_path / "prefix"))


def test_a_token_that_takes_spaces_along_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizers.smollm2()
    tokenizer.add_tokens([AddedToken("<strip>", lstrip=True, rstrip=True, normalized=False)])
    with pytest.raises(SRDError, match="<strip>"):
        vocabulary_of(save(tokenizer, tmp_path / "strip"))


def test_words_that_merges_do_not_make_need_a_scheme_that_takes_them_whole(tmp_path: Path) -> None:
    whole = small_tokenizers.llama3()
    description = json.loads(whole.backend_tokenizer.to_str())
    path = save(whole, tmp_path / "whole") / "tokenizer.json"
    description["model"]["merges"] = description["model"]["merges"][:-40]
    path.write_text(json.dumps(description), encoding="utf-8")
    assert vocabulary_of(path.parent).pre == "llama-bpe"


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = save(small_tokenizers.wordpiece(), tmp_path / "bert")
    with pytest.raises(SRDError, match="bert: the tokenizer is a WordPiece, and only BPE and Unigram"):
        vocabulary_of(directory)


def test_no_tokenizer_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(SRDError, match=r"there is no tokenizer beside config\.json"):
        read_vocabulary(tmp_path, {}, rows=10)


def test_a_damaged_tokenizer_is_refused(smollm2: Path) -> None:
    path = smollm2 / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(SRDError, match=r"smollm2: the tokenizer cannot be loaded: .+"):
        read_vocabulary(smollm2, {}, rows=1000)


def test_more_tokens_than_rows_are_refused(smollm2: Path) -> None:
    count = len(AutoTokenizer.from_pretrained(smollm2))
    with pytest.raises(SRDError, match=rf"has a token {count - 1} .* only {count - 1} rows"):
        read_vocabulary(smollm2, {}, rows=count - 1)


def test_a_token_named_as_a_filler_is_refused(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    count = len(tokenizer)
    tokenizer.add_tokens([f"[PAD{count + 1}]"])
    save(tokenizer, smollm2)
    with pytest.raises(SRDError, match=rf"has the token '\[PAD{count + 1}\]' twice"):
        read_vocabulary(smollm2, {}, rows=count + 2)


def test_a_piece_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    directory = save(small_tokenizers.unigram(), tmp_path / "unigram")
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["model"]["vocab"][-1] = description["model"]["vocab"][-2]
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(SRDError, match=r"unigram: the tokenizer has the token .* twice"):
        vocabulary_of(directory)


def test_no_end_of_text_is_refused(smollm2: Path) -> None:
    path = smollm2 / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(SRDError, match="no token ends a text"):
        vocabulary_of(smollm2)


def test_more_than_one_token_before_a_text_is_refused(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    begin = [(text, tokenizer.get_vocab()[text]) for text in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|endoftext|> $A", special_tokens=begin
    )
    with pytest.raises(SRDError, match=r"before and .* after a text; llama.cpp can put one token"):
        vocabulary_of(save(tokenizer, smollm2))


@pytest.mark.parametrize("library", ["gguf", "xllamacpp"])
def test_a_missing_library_names_the_extra(library: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str, *, extra: str) -> None:
        if module == library:
            raise MissingExtraError(f"{module} [{extra}]")

    monkeypatch.setattr(reading, "require", require)
    with pytest.raises(MissingExtraError, match=rf"{library} \[gguf\]"):
        read_vocabulary(tiny_llama, {}, rows=4096)


@pytest.mark.slow
def test_a_large_vocabulary(tmp_path: Path) -> None:
    tokenizer = small_tokenizers.byte_level(small_tokenizers._split(small_tokenizers.QWEN2), size=900)
    directory = save(tokenizer, tmp_path / "large")
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    model = description["model"]
    texts = [text for text in model["vocab"] if text.isalpha()]
    pairs = ((left, right) for left in texts for right in texts)
    for left, right in pairs:
        if left + right not in model["vocab"] and len(model["vocab"]) < 32000:
            model["vocab"][left + right] = len(model["vocab"])
            model["merges"].append([left, right])
    for index, entry in enumerate(description["added_tokens"]):
        entry["id"] = 32000 + index
    path.write_text(json.dumps(description), encoding="utf-8")
    assert vocabulary_of(directory).pre == "qwen2"
