import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import make_llama
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig

from srd_modifier import calibration
from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.qat import data
from srd_modifier.qat.data import Collator, Samples, check_length, from_data_set, from_model, from_text

EOS = 0
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
PROSE = "The river runs north through the old town and turns east below the bridge. " * 40
LINES = "".join(f"Line {number} of a longer text about rivers.\n" for number in range(200))
DOCUMENTS = ["The first of the documents.", "Another one, which is longer than it.", "A third."]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def add_bos(tokenizer: Any, token: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.bos_token_id)]
    )


def saved(rows: dict[str, list[Any]], path: Path) -> str:
    from datasets import Dataset

    Dataset.from_dict(rows).save_to_disk(str(path))
    return str(path)


def in_order(samples: Samples) -> list[int]:
    """The ids of a single window."""
    assert len(samples) == 1
    return samples[0]["input_ids"].tolist()


# windows


def test_a_text_becomes_the_windows_that_calibration_takes(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    samples = from_text(tmp_path / "a.txt", tokenizer, max_seq_length=32, seed=3)
    reference = calibration.from_file(tmp_path / "a.txt", tokenizer, num_samples=10**6, max_seq_length=32, seed=3)
    assert len(tokenizer(PROSE)["input_ids"]) % 32, "there must be a piece to leave out"
    assert samples.token_ids.tolist() == reference
    assert samples.token_ids.dtype == np.int32


def test_a_sample_is_a_tensor_that_a_data_loader_takes(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    samples = from_text(tmp_path / "a.txt", tokenizer, max_seq_length=16, num_samples=6)
    assert samples[2]["input_ids"].dtype == torch.int64
    batches = list(DataLoader(samples, batch_size=4, collate_fn=Collator(EOS)))
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == samples.token_ids.tolist()


def test_the_seed_chooses_and_orders(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)

    def choose(num_samples: int | None, seed: int) -> list[list[int]]:
        return from_text(
            tmp_path / "a.txt", tokenizer, max_seq_length=16, num_samples=num_samples, seed=seed
        ).token_ids.tolist()

    everything = choose(None, 0)
    assert choose(5, 0) == everything[:5]
    assert choose(5, 1) != choose(5, 0)
    assert sorted(choose(None, 1)) == sorted(everything)
    assert choose(10**6, 0) == everything, "fewer than asked for are no error"


def test_a_text_shorter_than_a_window_is_one_sample(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A short note.")
    samples = from_text(tmp_path / "a.txt", tokenizer, max_seq_length=64, num_samples=9)
    assert in_order(samples) == tokenizer("A short note.")["input_ids"]


def test_a_long_text_is_tokenized_in_blocks_that_end_with_a_line(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(LINES)
    whole = from_text(tmp_path / "a.txt", tokenizer, max_seq_length=10**6)
    longest = []

    def spy(text: str, **kwargs: Any) -> Any:
        longest.append(len(text))
        return tokenizer(text, **kwargs)

    spy.bos_token_id, spy.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    monkeypatch.setattr(data, "_BLOCK", 500)
    blocks = from_text(tmp_path / "a.txt", spy, max_seq_length=10**6)
    assert max(longest) < 600
    assert blocks.token_ids.tolist() == whole.token_ids.tolist()


def test_a_long_text_without_lines_is_tokenized_as_a_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BLOCK", 100)
    (tmp_path / "a.txt").write_text(PROSE)
    samples = from_text(tmp_path / "a.txt", tokenizer, max_seq_length=10**6)
    assert in_order(samples) == tokenizer(PROSE)["input_ids"]


# documents


def test_a_folder_is_read_in_order_with_eos_between(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in zip(("a.txt", "b/a.txt", "c.txt"), DOCUMENTS, strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "b" / "0.txt").write_text("")  # no document at all
    (tmp_path / "notes.md").write_text("not read")
    first, second, third = (tokenizer(text)["input_ids"] for text in DOCUMENTS)
    assert in_order(from_text(tmp_path, tokenizer, max_seq_length=10**6)) == [*first, EOS, *second, EOS, *third]


def test_documents_are_only_joined_where_there_is_no_eos(tokenizer, tmp_path):
    tokenizer.eos_token = None
    source = saved({"text": DOCUMENTS}, tmp_path / "set")
    expected = [token for text in DOCUMENTS for token in tokenizer(text)["input_ids"]]
    assert in_order(from_data_set(source, tokenizer, max_seq_length=10**6)) == expected


def test_bos_begins_every_document_once(tokenizer, tmp_path, monkeypatch):
    add_bos(tokenizer, tokenizer.convert_ids_to_tokens(300))
    monkeypatch.setattr(data, "_BLOCK", 500)
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("The end.")
    ids = in_order(from_text(tmp_path, tokenizer, max_seq_length=10**6))
    assert ids == [*tokenizer(LINES)["input_ids"], EOS, *tokenizer("The end.")["input_ids"]]
    assert ids.count(300) == 2


def test_a_bos_that_is_also_eos_is_not_doubled(tokenizer, tmp_path):
    add_bos(tokenizer, tokenizer.eos_token)
    expected = [token for text in DOCUMENTS for token in tokenizer(text)["input_ids"]]
    source = saved({"text": DOCUMENTS}, tmp_path / "set")
    assert in_order(from_data_set(source, tokenizer, max_seq_length=10**6)) == expected


def test_records_are_packed_too(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    ids = in_order(from_text(path, tokenizer, max_seq_length=10**6))
    assert sorted(tokenizer.decode(ids).split(tokenizer.eos_token)) == sorted(DOCUMENTS)
    assert len(from_text(path, tokenizer, max_seq_length=4)) == len(ids) // 4


# data sets


@pytest.mark.parametrize("column", ["text", "content"])
def test_rows_of_a_saved_data_set_are_documents(tokenizer, tmp_path, column):
    source = saved({column: [*DOCUMENTS, "", None], "score": [1, 2, 3, 4, 5]}, tmp_path / "set")
    first, second, third = (tokenizer(text)["input_ids"] for text in DOCUMENTS)
    assert in_order(from_data_set(source, tokenizer, max_seq_length=10**6)) == [*first, EOS, *second, EOS, *third]


def test_text_is_preferred_to_other_strings(tokenizer, tmp_path):
    source = saved({"id": ["x"], "text": ["A short note."]}, tmp_path / "set")
    assert in_order(from_data_set(source, tokenizer, max_seq_length=99)) == tokenizer("A short note.")["input_ids"]


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_rows_that_are_lines_make_one_text(tokenizer, tmp_path, monkeypatch, block):
    """As WikiText's, where an empty string stands for a line of one space."""
    monkeypatch.setattr(data, "_BLOCK", block)
    rows = [" = Rivers = \n", "", " The river runs north .\n", " It turns east .\n"] * 6
    source = saved({"text": rows}, tmp_path / "set")
    text = "".join(row or " \n" for row in rows)
    assert in_order(from_data_set(source, tokenizer, max_seq_length=10**6)) == tokenizer(text)["input_ids"]


def test_a_document_ends_the_lines_before_it(tokenizer, tmp_path):
    source = saved({"text": ["One line.\n", "Two lines.\nThey end here.\n", "Another\nend.\n"]}, tmp_path / "set")
    texts = tokenizer.decode(in_order(from_data_set(source, tokenizer, max_seq_length=999))).split(tokenizer.eos_token)
    assert texts == ["One line.\n", "Two lines.\nThey end here.\n", "Another\nend.\n"]


def test_conversations_are_written_by_the_chat_template(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE
    talks = [[{"role": "user", "content": content}] for content in ("Who built it?", "And when?")]
    source = saved({"messages": talks, "prompt": ["a", "b"]}, tmp_path / "set")
    text = tokenizer.decode(in_order(from_data_set(source, tokenizer, max_seq_length=99)))
    assert text == f"[user] Who built it?\n{tokenizer.eos_token}[user] And when?\n"


def test_conversations_need_a_chat_template(tokenizer, tmp_path):
    source = saved({"messages": [[{"role": "user", "content": "a"}]]}, tmp_path / "set")
    with pytest.raises(SRDError, match="set has messages, but the tokenizer has no chat template"):
        from_data_set(source, tokenizer, max_seq_length=99)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = saved({"messages": [[{"role": "user", "content": "a"}]]}, tmp_path / "set")
    with pytest.raises(SRDError, match="set: row 1: the chat template refuses its messages: roles must alternate"):
        from_data_set(source, tokenizer, max_seq_length=99)


def test_a_directory_of_files_and_its_splits(tokenizer, tmp_path):
    for split, text in (("train", "Something to train on."), ("test", "Something to test.")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for source, text in ((str(tmp_path), "Something to train on."), (f"{tmp_path}::test", "Something to test.")):
        assert in_order(from_data_set(source, tokenizer, max_seq_length=99)) == tokenizer(text)["input_ids"]


def test_a_saved_dictionary_of_splits(tokenizer, tmp_path):
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({"dev": Dataset.from_dict({"text": ["A short note."]})})
    splits.save_to_disk(str(tmp_path / "set"))
    samples = from_data_set(f"{tmp_path / 'set'}::dev", tokenizer, max_seq_length=99)
    assert in_order(samples) == tokenizer("A short note.")["input_ids"]
    with pytest.raises(SRDError, match="set has no split train; it has dev"):
        from_data_set(str(tmp_path / "set"), tokenizer, max_seq_length=99)


def test_a_data_set_that_nobody_has(tokenizer):
    with pytest.raises(SRDError, match=r"^nobody/nothing:x is no data set that could be read as NAME\S+ \(\w+: .+\)$"):
        from_data_set("nobody/nothing:x", tokenizer, max_seq_length=99)


def test_a_data_set_without_text_lists_its_columns(tokenizer, tmp_path):
    source = saved({"question": ["a"], "answer": ["b"], "score": [1]}, tmp_path / "set")
    with pytest.raises(SRDError, match="its rows have answer, question, score, expected messages, text, or one column"):
        from_data_set(source, tokenizer, max_seq_length=99)


def test_a_text_column_of_numbers_is_no_text(tokenizer, tmp_path):
    source = saved({"text": [1, 2]}, tmp_path / "set")
    with pytest.raises(SRDError, match="its rows have text, expected"):
        from_data_set(source, tokenizer, max_seq_length=99)


# text of the model


def test_the_model_writes_its_own_samples(tokenizer):
    model = make_llama()
    samples = from_model(model, tokenizer, max_seq_length=6, num_samples=5, seed=1)
    assert samples.token_ids.tolist() == calibration.from_model(
        model, tokenizer, num_samples=5, max_seq_length=6, seed=1
    )


def test_the_model_must_be_told_how_much_to_write(tokenizer):
    with pytest.raises(ConfigError, match="say how many samples the model shall write"):
        from_model(make_llama(), tokenizer, max_seq_length=6, num_samples=None)


# errors

BAD_FILES = {
    "empty": ("a.txt", "", "a.txt: there is no text to train on"),
    "one token": ("a.txt", "a", "a.txt: there is no text to train on"),
    "no records": ("a.json", "[]", "a.json: there is no text to train on"),
    "not json": ("a.json", "[1,", "a.json is not JSON"),
    "unknown keys": ("a.jsonl", '{"prompt": "a"}', "a.jsonl: record 1 has neither messages, text nor instruction"),
    "not text": ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_by_name(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SRDError, match=message) as caught:
        from_text(tmp_path / name, tokenizer, max_seq_length=16)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(SRDError, match=r"nowhere\.txt: there is no such file or folder to train on"):
        from_text(tmp_path / "nowhere.txt", tokenizer, max_seq_length=16)


def test_a_folder_without_texts_is_named(tokenizer, tmp_path):
    with pytest.raises(SRDError, match=r"there is no \.txt file in this folder to train on"):
        from_text(tmp_path, tokenizer, max_seq_length=16)


def test_a_data_set_of_nothing(tokenizer, tmp_path):
    source = saved({"text": ["", ""]}, tmp_path / "set")
    with pytest.raises(SRDError, match="set: there is no text to train on"):
        from_data_set(source, tokenizer, max_seq_length=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 1}, "max_seq_length is 1; a sample needs at least 2 tokens"),
        ({"max_seq_length": 8, "num_samples": 0}, "num_samples is 0; expected at least 1"),
    ],
)
def test_numbers_out_of_range(tokenizer, tmp_path, settings, message):
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(ConfigError, match=message):
        from_text(tmp_path / "a.txt", tokenizer, **settings)
    with pytest.raises(ConfigError, match=message):
        from_model(None, tokenizer, **{"num_samples": 3, **settings})


def test_a_sample_must_fit_the_context():
    config = LlamaConfig(max_position_embeddings=256)
    check_length(256, config)
    with pytest.raises(ConfigError, match="max_seq_length is 257, but the model's context has 256 tokens"):
        check_length(257, config)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        check_length(1, config)


# batches


def test_a_batch_is_padded_on_the_right_and_padding_has_no_label():
    batch = Collator(7)([{"input_ids": torch.tensor([1, 2, 3])}, {"input_ids": [7]}])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 2, 3], [7, 7, 7]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, 2, 3], [7, -100, -100]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}
