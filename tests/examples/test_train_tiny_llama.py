"""`examples/train_tiny_llama.py`: what it makes, that it learns and repeats itself, and what it refuses."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny_llama.py"
VOCABULARY = 300
NOUNS = ["river", "lamp", "ledger", "bridge", "miller", "clock", "heron", "tide"]
VERBS = ["carries", "turns", "keeps", "finds"]


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


BATCH = flags(batch_size=4, sequence_length=32)
TINY = flags(hidden_size=64, layers=1, intermediate_size=128, vocabulary=VOCABULARY) + BATCH
STEPS = flags(steps=30)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_llama", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(7)
    for number in range(3):
        sentences = [
            f"The {words.choice(NOUNS)} {words.choice(VERBS)} the {words.choice(NOUNS)} {words.randrange(100)} times."
            for _ in range(300)
        ]
        paragraphs = [" ".join(sentences[start : start + 5]) for start in range(0, 300, 5)]
        path = folder / "books" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model_dir(script: ModuleType, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "first"
    assert script.main([str(text_folder), "--output", str(output), *STEPS, *TINY]) == 0
    return output


def mean_loss(model_dir: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_transformers_loads_the_geometry_that_was_asked_for(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 1, 128)
    assert config.vocab_size == len(tokenizer) == VOCABULARY
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_tokenizer_splits_digits_and_keeps_every_byte(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = "Ünïcode, 2024 times: \t\n\n\N{SNOWMAN}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("2024")["input_ids"]) == 4
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_it_learns(model_dir: Path) -> None:
    untrained = math.log(VOCABULARY)
    assert (
        mean_loss(model_dir, "The heron keeps the clock 12 times. The tide turns the lamp 7 times.") < 0.7 * untrained
    )


def test_the_same_seed_makes_the_same_model(script: ModuleType, text_folder: Path, model_dir: Path) -> None:
    again = model_dir.with_name("again")
    assert script.main([str(text_folder), "--output", str(again), *STEPS, *TINY]) == 0
    assert (again / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, again))
    # equal to the bit on a CPU; a GPU, which the script prefers, adds up in another order each time
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


def test_resuming_keeps_the_tokenizer_and_goes_on_learning(
    script: ModuleType, text_folder: Path, model_dir: Path
) -> None:
    further = model_dir.with_name("further")
    schedule = [*STEPS, *BATCH, *flags(seed=1)]
    assert script.main([str(text_folder), "--output", str(further), "--resume-from", str(model_dir), *schedule]) == 0
    assert (further / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    text = "The miller finds the ledger 40 times. The bridge carries the river 9 times."
    assert mean_loss(further, text) < mean_loss(model_dir, text)


FAULTS = {
    "hidden-size": (["--hidden-size", "100"], "--hidden-size must be a multiple of 64, got 100"),
    "layers": (["--layers", "0"], "--layers must be at least 1, got 0"),
    "intermediate-size": (["--intermediate-size", "0"], "--intermediate-size must be at least 1, got 0"),
    "vocabulary": (["--vocabulary", "256"], "--vocabulary must be 257 to 65536, got 256"),
    "vocabulary-beyond-text": (["--vocabulary", "60000"], "tokens: add text or lower --vocabulary to "),
    "steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
    "minutes": (["--minutes", "0"], "--minutes must be above 0, got 0"),
    "batch-size": (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    "sequence-length": (["--sequence-length", "4096"], "--sequence-length must be 2 to 2048, got 4096"),
    "learning-rate": (["--learning-rate", "0"], "--learning-rate must be above 0, got 0"),
    "text-too-short": (["--batch-size", "100000"], "the text is too short: it has "),
    "resumed-geometry": (["--resume-from", "."], "--hidden-size cannot go with --resume-from"),
}


@pytest.mark.parametrize(("arguments", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_sentence(
    arguments: list[str],
    message: str,
    script: ModuleType,
    text_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "model"
    command = [str(text_folder), "--output", str(output), "--steps", "1", *TINY, *arguments]
    assert script.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no .txt file in it"),
        ({"notes.md": b"text"}, "has no .txt file in it"),
        ({"a.txt": b" \n"}, "has only empty .txt files in it"),
        ({"a.txt": b"caf\xe9"}, "a.txt is not UTF-8: byte 3 cannot be read"),
    ],
    ids=["empty", "no-txt", "blank", "latin-1"],
)
def test_a_folder_without_text_is_refused(
    content: dict[str, bytes], message: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    assert script.main([str(tmp_path), "--output", str(tmp_path / "model"), "--steps", "1", *TINY]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_folder_is_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "none"), "--output", str(tmp_path / "model"), *TINY]) == 1
    assert "none is not a folder" in capsys.readouterr().err


def test_an_existing_output_is_refused_and_left_alone(
    script: ModuleType, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(text_folder), "--output", str(tmp_path), "--steps", "1", *TINY]) == 1
    assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_resuming_from_something_else_is_refused(
    script: ModuleType, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(text_folder), "--output", str(tmp_path / "model"), "--resume-from", str(tmp_path)]
    assert script.main(command) == 1
    assert "is not a model directory: it has no config.json" in capsys.readouterr().err
