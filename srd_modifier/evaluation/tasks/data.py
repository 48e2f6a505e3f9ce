"""Where the data of the tasks comes from: a directory of local files, or a data set of the Hugging Face hub."""

import hashlib
import json
from pathlib import Path
from typing import Any

from srd_modifier._extras import require
from srd_modifier.errors import SRDError
from srd_modifier.evaluation.text import Text, read_text

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_WIKITEXT_FILES = ("wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wikitext/wiki.test.raw")

_SPLITS = ("test", "validation", "dev", "train")
_KINDS = (".jsonl", ".json", ".parquet", ".csv")


def wikitext2(data_dir: Path | None) -> Text:
    """WikiText-2's raw test split, byte for byte as `wiki.test.raw` has it.

    Args:
        data_dir: A directory that may have `wiki.test.raw`. Without one the hub's data set is read, whose rows are the
            lines of that file.

    Raises:
        SRDError: The file is not there and the data set cannot be fetched, or the file is not UTF-8.
    """
    if data_dir is not None:
        for name in _WIKITEXT_FILES:
            if (data_dir / name).is_file():
                return read_text(data_dir / name)
    require("datasets", extra="eval")
    from datasets import load_dataset

    path, name, split = WIKITEXT
    try:
        rows = load_dataset(path, name, split=split)["text"]
    except Exception as error:  # the hub's client has no common base for what may go wrong on the way
        raise SRDError(
            f"{path} could not be fetched from the Hugging Face hub ({type(error).__name__}); "
            f"give --data-dir a directory with {_WIKITEXT_FILES[0]}"
        ) from error
    # the data set has an empty string for a line of one space
    content = "".join(row or " \n" for row in rows)
    return Text(Path(f"{path}/{name}/{split}"), content, hashlib.sha256(content.encode()).hexdigest())


def joined_rows(raw: Text) -> Text:
    """WikiText as the perplexity guide of Transformers reads it: rows of the data set with blank lines between."""
    lines = raw.content.split("\n")
    rows = [f"{line}\n" if line.strip() else "" for line in lines[: len(lines) - (not lines[-1])]]
    content = "\n\n".join(rows)
    return Text(raw.path, content, hashlib.sha256(content.encode()).hexdigest())


def local_files(task: str, data_dir: Path, folder: Path) -> dict[str, str] | None:
    """Files of a harness task by the name of their split, `None` where there are none.

    `DIR/TASK.jsonl` (or .json, .parquet, .csv) is what is asked: test and validation split at once;
    `DIR/TASK/SPLIT.jsonl` is one split, train included. Their columns are those of the hub's data set. TruthfulQA is
    also taken as its authors publish it, `mc_task.json`.

    Args:
        task: The task's name.
        data_dir: Where to look.
        folder: Where a file may be written that has to be put in another shape.

    Raises:
        SRDError: `mc_task.json` is not what it should be.
    """
    single = [data_dir / f"{task}{kind}" for kind in _KINDS]
    for path in single:
        if path.is_file():
            return dict.fromkeys(("test", "validation"), str(path.absolute()))
    splits = {
        split: str(path.absolute())
        for split in _SPLITS
        for kind in _KINDS
        if (path := data_dir / task / f"{split}{kind}").is_file()
    }
    if splits:
        return splits
    if task.startswith("truthfulqa_mc") and (data_dir / "mc_task.json").is_file():
        converted = folder / "mc_task.json"
        rows = _truthfulqa_rows(data_dir / "mc_task.json")
        converted.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"validation": str(converted)}
    return None


def reader_of(files: dict[str, str]) -> str:
    """The loader of `datasets` for these files."""
    kinds = {Path(file).suffix.removeprefix(".").replace("jsonl", "json") for file in files.values()}
    if len(kinds) > 1:
        raise SRDError(f"{', '.join(sorted(files.values()))}: files of one task must be of one kind")
    return kinds.pop()


def _truthfulqa_rows(path: Path) -> list[dict[str, Any]]:
    """The authors' file in the shape of the hub's data set: answers and labels as two lists."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SRDError(f"{path} is not JSON: {error}") from error
    try:
        return [
            {
                "question": record["question"],
                **{
                    name: {"choices": list(record[name]), "labels": list(record[name].values())}
                    for name in ("mc1_targets", "mc2_targets")
                },
            }
            for record in records
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SRDError(f"{path}: expected a list of objects with question, mc1_targets and mc2_targets") from error
