"""Calibration samples, for `oneshot` and for GGUF files: from a file, or sampled from the model itself.

Samples from the model (as in LLM-QAT, Liu et al. 2023, arXiv:2305.17888) need neither data nor a network, and follow
the distribution the model was trained on better than a text of another kind would.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from datasets import Dataset

SELF = "self"
"""The name of the text that a model writes itself, where a data set is asked for."""

_SELF_BATCH = 32


def from_file(path: Path, tokenizer: Any, *, num_samples: int, max_seq_length: int, seed: int = 0) -> list[list[int]]:
    """Token ids: windows of `max_seq_length` tokens from a text, or one sample per record of a JSON file.

    Args:
        path: `.json` (a list) or `.jsonl` of records with `messages`, `text`, or `instruction`, `input` and `output`;
            anything else is read as UTF-8 text.
        tokenizer: of the model.
        num_samples: at most so many, chosen at random if there are more.
        max_seq_length: tokens per sample.
        seed: of the choice.

    Raises:
        SRDError: the file is missing, not what its name says, or gives no sample.
    """
    if not path.is_file():
        raise SRDError(f"{path}: there is no such file to calibrate on")
    if path.suffix in (".json", ".jsonl"):
        samples = [ids[:max_seq_length] for ids in _record_ids(path, tokenizer)]
    else:
        ids = tokenizer(read_text(path), verbose=False)["input_ids"]
        samples = [ids[start : start + max_seq_length] for start in range(0, len(ids), max_seq_length)]
        if len(samples) > 1 and len(samples[-1]) < max_seq_length:
            samples.pop()
    samples = [sample for sample in samples if len(sample) > 1]
    if not samples:
        raise SRDError(f"{path}: there is no text to calibrate on")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[index] for index in order[:num_samples]]


@torch.no_grad()
def from_model(model: Any, tokenizer: Any, *, num_samples: int, max_seq_length: int, seed: int = 0) -> list[list[int]]:
    """Token ids of samples that the model writes itself, at temperature 1 over its whole vocabulary.

    Args:
        model: a causal language model, on its device.
        tokenizer: of the model; a sample begins with its BOS token, or EOS where it has none.
        num_samples: how many.
        max_seq_length: tokens per sample, at most the positions the model has.
        seed: of the sampling.

    Raises:
        SRDError: the tokenizer has neither BOS nor EOS.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SRDError("the tokenizer has neither a BOS nor an EOS token to start from; give --dataset a text file")
    length = min(max_seq_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_seq_length))
    samples: list[list[int]] = []
    bar = tqdm(total=num_samples, desc="Writing calibration text", unit="sample")
    with torch.random.fork_rng(), _sampling_plainly(model, length=length, pad_token_id=first), bar:
        torch.manual_seed(seed)
        while len(samples) < num_samples:
            start = torch.full((min(_SELF_BATCH, num_samples - len(samples)), 1), first, device=model.device)
            samples += model.generate(start, attention_mask=torch.ones_like(start)).tolist()
            bar.update(len(start))
    return samples


def as_dataset(samples: list[list[int]]) -> "Dataset":
    """Samples as `oneshot` takes them."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]})


@contextmanager
def _sampling_plainly(model: Any, *, length: int, pad_token_id: int) -> Iterator[None]:
    """Set the model's generation_config aside: it says how to chat, and `generate` fills every gap from it."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        min_length=length,  # EOS would end a sample early
        eos_token_id=own.eos_token_id,
        pad_token_id=pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _record_ids(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    text = read_text(path)
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise SRDError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise SRDError(f"{path} is not a list of records")
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise SRDError(f"{where} is not an object")
        if "messages" in record:
            yield _message_ids(where, record["messages"], tokenizer)
        elif "text" in record:
            yield tokenizer(_string(where, record, "text"))["input_ids"]
        elif "instruction" in record:
            names = [name for name in ("instruction", "input", "output") if record.get(name) is not None]
            parts = [_string(where, record, name) for name in names]
            yield tokenizer("\n\n".join(part for part in parts if part))["input_ids"]
        else:
            raise SRDError(f"{where} has neither messages, text nor instruction")


def _string(where: str, record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise SRDError(f"{where}: {name} is {record[name]!r}, expected a string")
    return record[name]


def _message_ids(where: str, messages: Any, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise SRDError(f"{where} has messages, but the tokenizer has no chat template")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise SRDError(f"{where}: messages is {messages!r}, expected a list of objects with role and content")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise SRDError(f"{where}: the chat template refuses its messages: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        SRDError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SRDError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise SRDError(f"{path} cannot be read: {error.strerror or error}") from error
