import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.calibration import as_dataset, from_file, from_model
from srd_modifier.errors import SRDError

TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
BOS = "<|endoftext|>"
PROSE = "The river runs north through the old town and turns east below the bridge. " * 40


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def loaded(random_llama: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(random_llama).eval()
    model.lm_head.weight.data *= 20  # as sure of some words as a trained model
    return model


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """The random Llama, whose configurations a test may change."""
    positions, generation = loaded.config.max_position_embeddings, loaded.generation_config
    loaded.generation_config = type(generation).from_dict(generation.to_dict())
    yield loaded
    loaded.config.max_position_embeddings, loaded.generation_config = positions, generation


def write(path: Path, content: Any) -> Path:
    """Text as it is, a list as JSON or JSON Lines."""
    if isinstance(content, list):
        lines = [json.dumps(record) for record in content]
        content = "\n".join(lines) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return path


# from_file: text


def test_a_text_becomes_whole_windows(tokenizer, tmp_path):
    ids = tokenizer(PROSE)["input_ids"]
    windows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    assert len(ids) % 32, "the last, shorter piece must have something to lose"
    samples = from_file(write(tmp_path / "a.txt", PROSE), tokenizer, num_samples=1000, max_seq_length=32)
    assert sorted(samples) == sorted(windows)


def test_a_text_shorter_than_a_window_is_one_sample(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", "A short note.")
    assert from_file(path, tokenizer, num_samples=4, max_seq_length=32) == [tokenizer("A short note.").input_ids]


@pytest.mark.parametrize("name", ["a.txt", "README", "a.md"])
def test_anything_that_is_not_json_is_text(tokenizer, tmp_path, name):
    samples = from_file(write(tmp_path / name, '[{"text": "x"}]'), tokenizer, num_samples=1, max_seq_length=64)
    assert tokenizer.decode(samples[0]) == '[{"text": "x"}]'


def test_a_part_of_the_windows_is_chosen_by_the_seed(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", PROSE)

    def choose(num_samples: int, seed: int) -> list[list[int]]:
        return from_file(path, tokenizer, num_samples=num_samples, max_seq_length=16, seed=seed)

    everything, few = choose(1000, 0), choose(5, 0)
    assert len(few) == 5
    assert few == everything[:5]
    assert few == choose(5, 0)
    assert few != choose(5, 1)
    assert sorted(everything) == sorted(choose(1000, 1)), "the seed changes the order, not the samples"


def test_choosing_leaves_the_global_generator_alone(tokenizer, tmp_path):
    before = torch.get_rng_state()
    from_file(write(tmp_path / "a.txt", PROSE), tokenizer, num_samples=5, max_seq_length=16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


# from_file: records

RECORDS = [
    {"text": "A first record of plain text."},
    {"instruction": "Name a river.", "input": "In the north.", "output": "The Wear."},
    {"instruction": "Name a town.", "input": "", "output": "Durham."},
    {"instruction": "Say nothing."},
    {"messages": [{"role": "user", "content": "Who built it?"}, {"role": "assistant", "content": "Nobody knows."}]},
]
RECORD_TEXTS = [
    "A first record of plain text.",
    "Name a river.\n\nIn the north.\n\nThe Wear.",
    "Name a town.\n\nDurham.",
    "Say nothing.",
    f"{BOS}[user] Who built it?\n[assistant] Nobody knows.\n",
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_every_kind_of_record_becomes_one_sample(tokenizer, tmp_path, name):
    tokenizer.chat_template = TEMPLATE
    samples = from_file(write(tmp_path / name, RECORDS), tokenizer, num_samples=10, max_seq_length=64)
    assert sorted(tokenizer.decode(sample) for sample in samples) == sorted(RECORD_TEXTS)


def test_records_are_cut_and_chosen_by_the_seed(tokenizer, tmp_path):
    path = write(tmp_path / "a.json", [{"text": f"{number} {PROSE}"} for number in range(20)])

    def choose(seed: int) -> list[list[int]]:
        return from_file(path, tokenizer, num_samples=6, max_seq_length=9, seed=seed)

    assert [len(sample) for sample in choose(0)] == [9] * 6
    assert choose(0) == choose(0)
    assert choose(0) != choose(1)


def test_empty_records_and_empty_lines_give_no_sample(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": ""}\n\n{"text": "Something to read."}\n  \n')
    assert len(from_file(path, tokenizer, num_samples=4, max_seq_length=64)) == 1


def test_a_line_of_jsonl_ends_at_its_newline(tokenizer, tmp_path):
    """JSON allows U+2028 and U+0085 inside a string, where Python's splitlines() would cut."""
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028two\u0085three"}\r\n{"text": "four and five"}\n')
    samples = from_file(path, tokenizer, num_samples=4, max_seq_length=64)
    assert sorted(tokenizer.decode(sample) for sample in samples) == ["four and five", "one\u2028two\u0085three"]


def test_a_chat_template_that_writes_bos_gets_no_second_one(tokenizer, tmp_path):
    """As with Llama 3, whose template writes BOS and whose tokenizer adds it too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    path = write(tmp_path / "a.json", [{"messages": [{"role": "user", "content": "Who built it?"}]}])
    (sample,) = from_file(path, tokenizer, num_samples=1, max_seq_length=64)
    assert tokenizer.decode(sample) == f"{BOS}[user] Who built it?\n"


BAD_FILES = {
    "empty text": ("a.txt", "", "there is no text to calibrate on"),
    "one token": ("a.txt", "a", "there is no text to calibrate on"),
    "no records": ("a.json", "[]", "there is no text to calibrate on"),
    "only empty records": ("a.jsonl", '{"text": ""}\n', "there is no text to calibrate on"),
    "not json": ("a.json", "[1, 2", r"is not JSON: Expecting ',' delimiter: line 1"),
    "not json lines": ("a.jsonl", '{"text": "a b c"}\n{"text"\n', "is not JSON"),
    "not a list": ("a.json", '{"text": "a b c"}', "is not a list of records"),
    "not an object": ("a.json", '[{"text": "a b c"}, "text"]', "record 2 is not an object"),
    "not an object in a line": ("a.jsonl", '{"text": "a b c"}\n\n5\n', "record 2 is not an object"),
    "unknown keys": ("a.json", '[{"prompt": "a"}]', "record 1 has neither messages, text nor instruction"),
    "number as text": ("a.json", '[{"text": "a b c"}, {"text": 5}]', "record 2: text is 5, expected a string"),
    "no text at all": ("a.json", '[{"text": null}]', "record 1: text is None, expected a string"),
    "list as text": ("a.json", '[{"text": ["a", "b"]}]', r"record 1: text is \['a', 'b'\], expected a string"),
    "number as output": (
        "a.json",
        '[{"instruction": "a", "output": 5}]',
        "record 1: output is 5, expected a string",
    ),
    "messages as text": ("a.json", '[{"messages": "hello"}]', "record 1: messages is 'hello', expected a list"),
    "no messages": ("a.json", '[{"messages": []}]', r"record 1: messages is \[\], expected a list"),
    "messages refused": (
        "a.json",
        '[{"messages": [{"role": "nobody", "content": "a"}]}]',
        "record 1: the chat template refuses its messages: roles must be user or assistant",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_by_name(tokenizer, tmp_path, name, content, message):
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'nobody' %}"
        "{{ raise_exception('roles must be user or assistant') }}{% endif %}{{ message['content'] }}{% endfor %}"
    )
    path = write(tmp_path / name, content)
    with pytest.raises(SRDError, match=message) as caught:
        from_file(path, tokenizer, num_samples=4, max_seq_length=16)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(SRDError, match=r"nowhere\.txt: there is no such file to calibrate on"):
        from_file(tmp_path / "nowhere.txt", tokenizer, num_samples=4, max_seq_length=16)


def test_a_directory_is_not_a_file(tokenizer, tmp_path):
    with pytest.raises(SRDError, match="there is no such file to calibrate on"):
        from_file(tmp_path, tokenizer, num_samples=4, max_seq_length=16)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_bytes_that_are_no_text_are_refused(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(SRDError, match=rf"{name} is not UTF-8 text"):
        from_file(tmp_path / name, tokenizer, num_samples=4, max_seq_length=16)


def test_messages_need_a_chat_template(tokenizer, tmp_path):
    path = write(tmp_path / "a.json", RECORDS)
    with pytest.raises(SRDError, match="record 5 has messages, but the tokenizer has no chat template"):
        from_file(path, tokenizer, num_samples=4, max_seq_length=16)


# from_model


def test_the_model_writes_as_many_samples_as_asked(model, tokenizer):
    samples = from_model(model, tokenizer, num_samples=33, max_seq_length=6)  # more than one batch
    assert [len(sample) for sample in samples] == [6] * 33
    assert len({tuple(sample) for sample in samples}) == 33


def test_a_sample_begins_with_bos_and_does_not_end_early(model, tokenizer):
    assert model.generation_config.eos_token_id == tokenizer.bos_token_id == 0
    model.lm_head.weight.data[0] *= 32  # half of all samples would end at any word
    try:
        samples = from_model(model, tokenizer, num_samples=8, max_seq_length=12)
    finally:
        model.lm_head.weight.data[0] /= 32
    assert all(sample[0] == 0 and 0 not in sample[1:] for sample in samples)


def test_a_sample_begins_with_eos_where_there_is_no_bos(model, tokenizer):
    tokenizer.bos_token, tokenizer.eos_token = None, tokenizer.convert_ids_to_tokens(300)
    samples = from_model(model, tokenizer, num_samples=2, max_seq_length=4)
    assert [sample[0] for sample in samples] == [300, 300]


def test_a_tokenizer_with_neither_is_refused(model, tokenizer):
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(SRDError, match=r"neither a BOS nor an EOS token to start from; give --dataset a text file"):
        from_model(model, tokenizer, num_samples=2, max_seq_length=4)


def test_samples_follow_the_seed_and_nothing_else(model, tokenizer):
    torch.manual_seed(1)
    first = from_model(model, tokenizer, num_samples=3, max_seq_length=8, seed=0)
    torch.manual_seed(2)
    assert from_model(model, tokenizer, num_samples=3, max_seq_length=8, seed=0) == first
    assert from_model(model, tokenizer, num_samples=3, max_seq_length=8, seed=1) != first


def test_sampling_leaves_the_global_generator_alone(model, tokenizer):
    before = torch.get_rng_state()
    from_model(model, tokenizer, num_samples=2, max_seq_length=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_no_longer_than_the_model_has_positions(model, tokenizer):
    model.config.max_position_embeddings = 20
    assert len(from_model(model, tokenizer, num_samples=1, max_seq_length=400)[0]) == 20


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 3),
        ("repetition_penalty", 5.0),
        ("no_repeat_ngram_size", 1),
        ("temperature", 0.01),
        ("top_k", 1),
        ("top_p", 0.01),
        ("typical_p", 0.2),
        ("num_beams", 2),
        ("stop_strings", ["a"]),
        ("return_dict_in_generate", True),
    ],
)
def test_the_model_writes_from_its_own_distribution(model, tokenizer, setting, value):
    """generation_config.json says how to chat with a model; calibration wants temperature 1 and all of the words."""
    expected = from_model(model, tokenizer, num_samples=2, max_seq_length=12)
    setattr(model.generation_config, setting, value)
    assert from_model(model, tokenizer, num_samples=2, max_seq_length=12) == expected
    assert getattr(model.generation_config, setting) == value


def test_the_temperature_is_one(model, tokenizer):
    """The second token of many samples follows the model's own probabilities after BOS."""
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([[0]])).logits[0, -1].double().softmax(-1)
    probabilities[0] = 0  # EOS is not written
    probabilities /= probabilities.sum()
    samples = from_model(model, tokenizer, num_samples=2048, max_seq_length=2)
    found = -torch.stack([probabilities[sample[1]].log() for sample in samples])
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum()
    assert abs(found.mean() - entropy) < 5 * found.std() / len(found) ** 0.5


# as_dataset


def test_a_data_set_has_the_samples_and_masks_without_padding():
    dataset = as_dataset([[3, 1, 2], [5]])
    assert dataset.column_names == ["input_ids", "attention_mask"]
    assert dataset["input_ids"][:] == [[3, 1, 2], [5]]
    assert dataset["attention_mask"][:] == [[1, 1, 1], [1]]
