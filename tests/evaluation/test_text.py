import hashlib

import pytest
import torch
from transformers import AutoTokenizer

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.text import bos_where_added, read_text, tokenize


class BosTokenizer:
    """Puts BOS before every text, one token per character."""

    bos_token_id = 1

    def __call__(self, text, verbose=True):
        return {"input_ids": [1] + [ord(character) for character in text]}


def test_text_is_read_byte_for_byte_and_digested(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("línea\r\ntwo\n".encode())
    text = read_text(path)
    assert text.content == "línea\r\ntwo\n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_missing_text_is_refused(tmp_path):
    with pytest.raises(SRDError, match=r"nothing\.txt: the text cannot be read: No such file"):
        read_text(tmp_path / "nothing.txt")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(SRDError, match="the text cannot be read: Is a directory"):
        read_text(tmp_path)


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(SRDError, match="is not UTF-8, byte 3 does not belong"):
        read_text(path)


def test_max_tokens_keeps_the_start(tiny_llama, prose):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = read_text(prose)
    whole = tokenize(text, tokenizer)
    assert whole.dtype == torch.int64
    assert whole.tolist() == tokenizer.encode(text.content)
    assert torch.equal(tokenize(text, tokenizer, max_tokens=10), whole[:10])


def test_max_tokens_below_one_is_refused(prose):
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        tokenize(read_text(prose), BosTokenizer(), max_tokens=0)


def test_bos_is_reported_only_where_the_tokenizer_adds_it(tiny_llama):
    assert bos_where_added(BosTokenizer()) == 1
    # It has a BOS token, but never puts one before a text.
    assert bos_where_added(AutoTokenizer.from_pretrained(tiny_llama)) is None
