"""Training samples: windows of a text, of a data set, or text that the model writes itself.

All samples of a run are of one length. They are kept as one int32 array, four bytes a token, where lists of Python's
integers would take ten times as much.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from srd_modifier import calibration
from srd_modifier._extras import require
from srd_modifier.errors import ConfigError, SRDError

_IGNORED = -100  # the label that no loss counts

# characters that are tokenized at a time: a tokenizer needs some hundred bytes for each token it returns
_BLOCK = 1 << 20

_ROWS = 1000  # rows of a data set that are read at a time

# part of a document, and whether it ends it
_Piece = tuple[str, bool]


class Samples(Dataset[dict[str, Tensor]]):
    """Samples of one length for a `Trainer`.

    Attributes:
        token_ids: int32 `[samples, tokens]`.
    """

    def __init__(self, token_ids: np.ndarray) -> None:
        self.token_ids = token_ids

    def __len__(self) -> int:
        """How many there are, which may be less than was asked for."""
        return len(self.token_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, int64 `[tokens]`."""
        return {"input_ids": torch.from_numpy(self.token_ids[index].astype(np.int64))}


class Collator:
    """Makes a batch of samples, which are padded on the right to the longest; padding has no label.

    Args:
        pad_token_id: what to pad with; any token will do, as attention and labels leave it out.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 `[batch, tokens]`; the model shifts the labels itself."""
        samples = [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features]
        shape = (len(samples), max(len(sample) for sample in samples))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, _IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample)] = labels[row, : len(sample)] = sample
            attention_mask[row, : len(sample)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_length(max_seq_length: int, config: Any) -> None:
    """Raise ConfigError unless a model of this configuration can read, and learn from, samples of so many tokens."""
    if max_seq_length < 2:
        raise ConfigError(f"max_seq_length is {max_seq_length}; a sample needs at least 2 tokens to predict one")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_seq_length > context:
        raise ConfigError(
            f"max_seq_length is {max_seq_length}, but the model's context has {context} tokens; ask for at most that"
        )


def from_text(
    path: Path, tokenizer: Any, *, max_seq_length: int, num_samples: int | None = None, seed: int = 0
) -> Samples:
    """Windows of a text file, of all texts in a folder, or of the records of a JSON file.

    Documents are put one after the other, with EOS between them if the tokenizer has one, and cut into windows. The
    last window is left out where it is incomplete, unless it is the only one.

    Args:
        path: a folder, of which every `.txt` file below it is a document; a `.json` or `.jsonl` file of records as
            `srd_modifier.calibration.from_file` takes them, each a document; or any other file, read as UTF-8 text.
        tokenizer: of the model.
        max_seq_length: tokens per sample.
        num_samples: at most so many; None for all.
        seed: of their choice and order.

    Raises:
        SRDError: there is no such file, it is not what its name says, or it gives no sample.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise SRDError(f"{path}: there is no .txt file in this folder to train on")
        token_ids = _tokenized((piece for file in files for piece in _file_pieces(file)), tokenizer)
    elif not path.is_file():
        raise SRDError(f"{path}: there is no such file or folder to train on")
    elif path.suffix in (".json", ".jsonl"):
        token_ids = _joined(_records(path, tokenizer, seed), tokenizer)
    else:
        token_ids = _tokenized(_file_pieces(path), tokenizer)
    return _windows(str(path), token_ids, max_seq_length=max_seq_length, num_samples=num_samples, seed=seed)


def from_data_set(
    source: str, tokenizer: Any, *, max_seq_length: int, num_samples: int | None = None, seed: int = 0
) -> Samples:
    """Windows of a data set, whose rows are documents as in `from_text`.

    A row that is a single line with its newline, as WikiText's are, is no document but goes on in the next row.

    Args:
        source: `NAME[:CONFIG[:SPLIT]]`, a data set of the Hugging Face hub or a directory of one; split `train` if
            nothing else is said. Its rows have `messages`, `text`, or only one column of strings.
        tokenizer: of the model.
        max_seq_length: tokens per sample.
        num_samples: at most so many; None for all. They are chosen among all rows, so all are fetched.
        seed: of their choice and order.

    Raises:
        MissingExtraError: `datasets` is not installed.
        SRDError: there is no such data set, no network to fetch it, or no text in it.
    """
    require("datasets", extra="qat")
    rows = _load(source)
    column = _column(source, rows)
    values = (value for batch in rows.select_columns([column]).iter(_ROWS) for value in batch[column])
    if column == "messages":
        token_ids = _joined(_conversations(source, values, tokenizer), tokenizer)
    else:
        token_ids = _tokenized(_row_pieces(values), tokenizer)
    return _windows(source, token_ids, max_seq_length=max_seq_length, num_samples=num_samples, seed=seed)


def from_model(model: Any, tokenizer: Any, *, max_seq_length: int, num_samples: int | None, seed: int = 0) -> Samples:
    """Samples that the model writes itself, as in LLM-QAT; see `srd_modifier.calibration.from_model`.

    Args:
        model: a causal language model, on its device.
        tokenizer: of the model.
        max_seq_length: tokens per sample.
        num_samples: how many.
        seed: of the sampling.

    Raises:
        ConfigError: it is not said how many.
        SRDError: the tokenizer has neither BOS nor EOS.
    """
    if num_samples is None:
        raise ConfigError("num_samples is not given; say how many samples the model shall write")
    _check(max_seq_length, num_samples)
    written = calibration.from_model(
        model, tokenizer, num_samples=num_samples, max_seq_length=max_seq_length, seed=seed
    )
    return Samples(np.array(written, dtype=np.int32))


def _check(max_seq_length: int, num_samples: int | None) -> None:
    if max_seq_length < 2:
        raise ConfigError(f"max_seq_length is {max_seq_length}; a sample needs at least 2 tokens to predict one")
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}; expected at least 1")


def _windows(source: str, token_ids: np.ndarray, *, max_seq_length: int, num_samples: int | None, seed: int) -> Samples:
    _check(max_seq_length, num_samples)
    if len(token_ids) < 2:
        raise SRDError(f"{source}: there is no text to train on")
    length = min(max_seq_length, len(token_ids))
    windows = token_ids[: len(token_ids) // length * length].reshape(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).numpy()
    return Samples(windows[order[:num_samples]])


def _tokenized(pieces: Iterable[_Piece], tokenizer: Any) -> np.ndarray:
    """int32 ids of documents that come in pieces."""
    return _joined(
        ((tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], ends) for text, ends in pieces),
        tokenizer,
        begin=_begin(tokenizer),
    )


def _begin(tokenizer: Any) -> list[int]:
    """BOS, if this tokenizer begins a text with it."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]


def _joined(pieces: Iterable[tuple[list[int], bool]], tokenizer: Any, begin: Sequence[int] = ()) -> np.ndarray:
    """int32 ids of documents one after the other, with one EOS between; those without a token are left out."""
    end = tokenizer.eos_token_id
    token_ids = array("i")
    between = True
    for ids, ends in pieces:
        if between and ids:
            if token_ids and end is not None and end not in (token_ids[-1], (*begin, *ids)[0]):
                token_ids.append(end)
            token_ids.extend(begin)
            between = False
        token_ids.extend(ids)
        between = between or ends
    return np.frombuffer(token_ids, dtype=np.int32) if token_ids else np.empty(0, np.int32)


def _file_pieces(path: Path) -> Iterator[_Piece]:
    """A file's text, cut at ends of lines where it is too long to tokenize at once."""
    text = calibration.read_text(path)
    start = 0
    while len(text) - start > _BLOCK:
        newline = text.find("\n", start + _BLOCK - 1)
        if newline < 0:
            break
        yield text[start : newline + 1], False
        start = newline + 1
    yield text[start:], True


def _row_pieces(rows: Iterable[str | None]) -> Iterator[_Piece]:
    """Documents of a column; rows that are single lines are joined to one."""
    lines: list[str] = []
    length = 0
    for row in rows:
        if row and row.find("\n") == len(row) - 1:
            lines.append(row)
            length += len(row)
            if length >= _BLOCK:
                yield "".join(lines), False
                lines, length = [], 0
        elif row:
            # a document ends the lines before it
            yield "".join(lines), True
            lines, length = [], 0
            yield row, True
        elif lines:
            lines.append(" \n")  # WikiText's data set has an empty string for a line of one space
    yield "".join(lines), True


def _records(path: Path, tokenizer: Any, seed: int) -> Iterator[tuple[list[int], bool]]:
    try:
        documents = calibration.from_file(
            path, tokenizer, num_samples=sys.maxsize, max_seq_length=sys.maxsize, seed=seed
        )
    except SRDError as error:
        raise SRDError(str(error).replace("to calibrate on", "to train on")) from error
    return ((ids, True) for ids in documents)


def _conversations(source: str, conversations: Iterable[Any], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise SRDError(f"{source} has messages, but the tokenizer has no chat template")
    for number, messages in enumerate(conversations, 1):
        if not messages:
            continue
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise SRDError(f"{source}: row {number}: the chat template refuses its messages: {error}") from error
        # the template writes BOS itself
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], True


def _load(source: str) -> Any:
    """The rows of a data set."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, config, split = (source, "", "") if Path(source).exists() else (*source.split(":", 2), "", "")[:3]
    split = split or "train"
    try:
        if not any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "dataset_info.json")):
            return load_dataset(name, config or None, split=split)
        saved = load_from_disk(name)
    except Exception as error:  # the hub's client has no common base for what may go wrong on the way
        reason = " ".join(str(error).split())[:200]
        raise SRDError(
            f"{source} is no data set that could be read as NAME[:CONFIG[:SPLIT]] ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise SRDError(f"{source} has no split {split}; it has {', '.join(saved)}")
    return saved[split]


def _column(source: str, rows: Any) -> str:
    """The column with the text."""
    if "messages" in rows.column_names:
        return "messages"
    strings = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise SRDError(
            f"{source}: its rows have {', '.join(sorted(rows.column_names)) or 'no columns'}, "
            "expected messages, text, or one column of strings"
        )
    return strings[0]
