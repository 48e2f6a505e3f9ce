"""The text that everything of a run is calibrated on, as one file that the checkpoint and the GGUF files share."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from srd_modifier.checkpoint.atomic import write_text
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.digest import file_digest

SELF = "self"

_CHARACTERS_PER_TOKEN = 8  # more than a token has on average, so that there is text enough

# the columns that `srd_modifier.calibration` reads
_RECORDS = ("messages", "instruction", "input", "output")


@dataclass(frozen=True)
class CalibrationText:
    """The file, and where its text is from.

    Attributes:
        path: of the file, text or JSON lines.
        name: for readers of the results.
        sha256: of its bytes.
    """

    path: Path
    name: str
    sha256: str


def prepare(
    source: str, original: Path, output: Path, *, samples: int, sample_tokens: int, device: str
) -> CalibrationText:
    """Find the text, fetch it, or let the model write it; what is not a file yet becomes one in the output directory.

    Args:
        source: a text or JSON file; `self` for text that the model writes; or NAME[:CONFIG[:SPLIT]], a data set of the
            hub or a directory of one, split `train` if nothing else is said.
        original: the model's directory.
        output: where the file goes.
        samples: how many.
        sample_tokens: tokens of each.
        device: where the model writes.

    Raises:
        SRDError: there is no such file or data set, or it has no text.
    """
    if Path(source).is_file():
        return CalibrationText(Path(source), Path(source).name, file_digest(Path(source)))
    if source == SELF:
        path = output / "calibration-self.jsonl"
        if not path.is_file():
            print("letting the model write a calibration text", flush=True)
            _write_records(path, _own_texts(original, samples=samples, sample_tokens=sample_tokens, device=device))
    else:
        path = _from_data_set(source, output, samples=samples, sample_tokens=sample_tokens)
    return CalibrationText(path, source, file_digest(path))


def _own_texts(original: Path, *, samples: int, sample_tokens: int, device: str) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    from srd_modifier.calibration import from_model
    from srd_modifier.evaluation.load import load_tokenizer

    tokenizer = load_tokenizer(str(original))
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto").to(device).eval()
    written = from_model(model, tokenizer, num_samples=samples, max_seq_length=sample_tokens)
    # the token that a sample starts with is added again where the text is read
    return [{"text": tokenizer.decode(ids, skip_special_tokens=True)} for ids in written]


def _from_data_set(source: str, output: Path, *, samples: int, sample_tokens: int) -> Path:
    """The first rows of a data set: conversations and instructions as records, plain text joined into one."""
    stem = output / f"calibration-{re.sub(r'[^A-Za-z0-9_]+', '-', source).strip('-')}"
    for path in (stem.with_suffix(".jsonl"), stem.with_suffix(".txt")):
        if path.is_file():
            return path
    name, config, split = (*source.split(":"), "", "")[:3]
    rows = iter(_rows(source, name, config or None, split or "train"))
    try:
        first = next(rows, None)
        if first is None:
            raise SRDError(f"{source}: the data set has no rows")
        if "messages" in first or "instruction" in first:
            path = stem.with_suffix(".jsonl")
            records = [first, *islice(rows, samples - 1)]
            _write_records(path, [{name: row[name] for name in _RECORDS if name in row} for row in records])
            return path
        if "text" not in first:
            raise SRDError(
                f"{source}: its rows have {', '.join(sorted(first))}, expected text, messages or instruction"
            )
        path = stem.with_suffix(".txt")
        write_text(path, _joined((row["text"] for row in rows), first["text"], samples * sample_tokens))
        return path
    except SRDError:
        raise
    except Exception as error:  # the hub's client has no common base for what may go wrong on the way
        raise SRDError(f"{source}: the data set could not be read ({type(error).__name__})") from error


def _rows(source: str, name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split, streaming=True)  # only the first rows are fetched
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SRDError(
            f"{source} is neither a file, nor self, nor a data set that could be fetched as NAME[:CONFIG[:SPLIT]] "
            f"({type(error).__name__}: {reason})"
        ) from error


def _joined(texts: Iterable[str], first: str, tokens: int) -> str:
    parts, length = [first], len(first)
    for text in texts:
        if length >= tokens * _CHARACTERS_PER_TOKEN:
            break
        parts.append(text)
        length += len(text) + 1
    return "\n".join(parts)


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
