import json
import re
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.errors import CheckpointError
from srd_modifier.resuming.journal import Journal
from srd_modifier.streaming.record import Record

TASK = {"model": "sha256:1", "recipe": "abc", "version of torch": "2.9"}
RECORDS = [
    Record("model.embed_tokens", {"model.embed_tokens.weight": "0a"}, {}, False),
    Record("layer 0", {"a.weight_packed": "1b", "größe\n": "2c"}, {"a": {"codes": "3d", "scale": "4e"}}, True),
    Record("layer 1", {"b.weight_packed": "5f"}, {"b": {"codes": "6a"}}, True),
]


@pytest.fixture
def journal(tmp_path: Path) -> Journal[Record]:
    journal = Journal(tmp_path / "finished.jsonl", TASK, Record.parse)
    journal.begin()
    for record in RECORDS:
        journal.add(record)
    return journal


def test_what_was_added_is_read(journal: Journal[Record]) -> None:
    assert journal.read() == RECORDS
    assert Journal(journal.path, TASK, Record.parse).read() == RECORDS


def test_one_line_for_the_task_and_one_for_each_step(journal: Journal[Record]) -> None:
    lines = journal.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == TASK
    assert [json.loads(line)["step"] for line in lines[1:]] == [record.step for record in RECORDS]


def test_beginning_anew_forgets_everything(journal: Journal[Record]) -> None:
    journal.begin()
    assert journal.read() == []


def test_a_line_that_is_cut_off_at_any_byte_is_not_counted(journal: Journal[Record]) -> None:
    content = journal.path.read_bytes()
    for size in range(len(content) + 1):
        journal.path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert journal.read() == RECORDS[: max(0, whole - 1)]
        # and what is added next does not continue the broken line
        if whole:
            journal.add(RECORDS[-1])
            assert journal.read() == [*RECORDS[: whole - 1], RECORDS[-1]]


@pytest.mark.parametrize("field", TASK)
def test_another_task_is_refused_by_its_field(journal: Journal[Record], field: str) -> None:
    before = journal.path.read_bytes()
    without = {name: value for name, value in TASK.items() if name != field}
    for task in (TASK | {field: "other"}, TASK | {f"{field} too": "new"}, without):
        name = next(name for name in [*task, *TASK] if task.get(name) != TASK.get(name))
        expected = (
            f"{journal.path.parent} was begun with another {name}, so that it cannot be resumed; pass --overwrite "
            "instead of --resume to start anew"
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}$"):
            Journal(journal.path, task, Record.parse).read()
    assert journal.path.read_bytes() == before


RECORD: dict[str, Any] = {"step": "layer 0", "base": {}, "residual": {}, "lost": False}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\x00\x00\x00",
        b"\xff\xfe{}",
        b"",
        b"[]",
        b"3",
        b'"layer 0"',
        b"null",
        json.dumps({"step": "layer 0"}).encode(),
        *(json.dumps(RECORD | change).encode() for change in ({"more": 1}, {"base": 3}, {"residual": []})),
        *(json.dumps(RECORD | change).encode() for change in ({"residual": {"a": "1"}}, {"step": None})),
    ],
)
def test_a_damaged_line_is_a_sentence(journal: Journal[Record], line: bytes) -> None:
    lines = journal.path.read_bytes().splitlines()
    lines[2] = line
    journal.path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(
        CheckpointError, match=r"finished\.jsonl is damaged, so that the quantization cannot be resumed"
    ):
        journal.read()


@pytest.mark.parametrize("line", [b"[]", b"null", b"7"])
def test_a_first_line_that_is_no_task_is_refused(journal: Journal[Record], line: bytes) -> None:
    journal.path.write_bytes(line + b"\n")
    with pytest.raises(CheckpointError, match="pass --overwrite instead of --resume to start anew"):
        journal.read()


def test_a_flipped_byte_is_never_a_stack_trace(journal: Journal[Record]) -> None:
    content = journal.path.read_bytes()
    for position in range(len(content)):
        for value in (0, 0x0A, 0x22, 0x80, content[position] ^ 1):
            journal.path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
            try:
                records = journal.read()
            except CheckpointError:
                continue
            assert all(isinstance(record, Record) for record in records)


def test_no_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*finished\.jsonl: No such file or directory"):
        Journal(tmp_path / "finished.jsonl", TASK, Record.parse).read()


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*finished\.jsonl: No such file or directory"):
        Journal(tmp_path / "missing" / "finished.jsonl", TASK, Record.parse).begin()


def test_a_full_disk_is_a_sentence(journal: Journal[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*finished\.jsonl: No space left on device"):
        journal.add(RECORDS[0])
