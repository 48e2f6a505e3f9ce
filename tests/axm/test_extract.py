"""Unpacking: everything, verified, or nothing."""

import errno
import os
import stat
from pathlib import Path

import pytest
from containers import FILES, OTHER_FILES, same_checksum, signed_entries, write_files, write_zip

from srd_modifier.axm.container import Container
from srd_modifier.axm.extract import extract, extract_gguf
from srd_modifier.axm.keys import Key
from srd_modifier.errors import CheckpointError


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_all_files(packed: Path, tmp_path: Path, key: Key) -> None:
    with Container(packed, key=key) as opened:
        assert extract(opened, tmp_path / "out") == list(FILES)
    assert contents(tmp_path / "out") == FILES
    assert all(
        stat.S_IMODE(path.stat().st_mode) & 0o111 == 0 for path in (tmp_path / "out").rglob("*") if path.is_file()
    )


def test_without_a_key(packed: Path, tmp_path: Path) -> None:
    """The bytes are those that the manifest has, whoever made it."""
    with Container(packed) as opened:
        extract(opened, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


def test_progress_counts_every_byte(packed: Path, tmp_path: Path, key: Key) -> None:
    shown: list[tuple[int, int]] = []
    with Container(packed, key=key) as opened:
        extract(opened, tmp_path / "out", progress=lambda done, total: shown.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert shown[-1] == (size, size)


def test_empty_files(tmp_path: Path, key: Key) -> None:
    path, files = tmp_path / "x.axm", {"a": b"", "b/c": b"", "z": b"end"}
    path.write_bytes(write_zip(signed_entries(files)))
    with Container(path, key=key) as opened:
        extract(opened, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_an_existing_directory(packed: Path, tmp_path: Path, key: Key) -> None:
    output = write_files(tmp_path / "out", {"config.json": b"{}", "old.txt": b"old"})
    with Container(packed, key=key) as opened:
        with pytest.raises(
            CheckpointError, match=rf"^{output} already exists; choose another directory or pass --overwrite$"
        ):
            extract(opened, output)
        assert sorted(contents(output)) == ["config.json", "old.txt"]
        extract(opened, output, overwrite=True)
    assert contents(output) == FILES


def test_a_directory_that_is_no_model_is_never_overwritten(packed: Path, tmp_path: Path, key: Key) -> None:
    output = write_files(tmp_path / "out", {"thesis.tex": b"mine"})
    with Container(packed, key=key) as opened, pytest.raises(CheckpointError, match="is not a model directory"):
        extract(opened, output, overwrite=True)
    assert contents(output) == {"thesis.tex": b"mine"}


def changed(path: Path) -> Path:
    """A container whose last file was changed, the first of which is right."""
    entries = signed_entries()
    entries[-1].data = same_checksum(b'{"evil":{   }', FILES["tokenizer.json"])
    path.write_bytes(write_zip(entries))
    return path


@pytest.mark.parametrize("existing", [False, True])
def test_a_changed_file_leaves_nothing(existing: bool, tmp_path: Path, key: Key) -> None:
    path, output = changed(tmp_path / "x.axm"), tmp_path / "out"
    if existing:
        write_files(output, {"config.json": b"{}"})
    before = sorted(tmp_path.rglob("*"))
    with Container(path, key=key) as opened, pytest.raises(CheckpointError, match=r"tokenizer\.json was changed after"):
        extract(opened, output, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_container_that_shrinks_meanwhile(packed: Path, tmp_path: Path, key: Key) -> None:
    with Container(packed, key=key) as opened:
        os.truncate(packed, 17_000)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json has only 0 of 13 bytes|about\.txt has only"):
            extract(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(packed: Path, tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, start: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    before = sorted(tmp_path.iterdir())
    with Container(packed, key=key) as opened:
        with pytest.raises(CheckpointError, match=f"^cannot write {tmp_path / 'out'}: No space left on device$"):
            extract(opened, tmp_path / "out")
        with pytest.raises(CheckpointError, match=f"^cannot write {tmp_path / 'out.gguf'}: No space left on device$"):
            extract_gguf(opened, tmp_path / "out.gguf")
    assert sorted(tmp_path.iterdir()) == before


# --- GGUF files only -------------------------------------------------------------------------------------------------


def test_the_gguf_file(packed: Path, tmp_path: Path, key: Key) -> None:
    output = tmp_path / "out.gguf"
    with Container(packed, key=key) as opened:
        assert extract_gguf(opened, output) == ["model.gguf"]
        assert output.read_bytes() == FILES["model.gguf"]
        with pytest.raises(
            CheckpointError, match=rf"^{output} already exists; choose another name or pass --overwrite$"
        ):
            extract_gguf(opened, output)
        output.write_bytes(b"old")
        extract_gguf(opened, output, overwrite=True)
    assert output.read_bytes() == FILES["model.gguf"]


def test_only_the_gguf_file_is_read(tmp_path: Path, key: Key) -> None:
    """What else was changed is not unpacked, and is nobody's business here."""
    with Container(changed(tmp_path / "x.axm"), key=key) as opened:
        extract_gguf(opened, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == FILES["model.gguf"]


def test_the_gguf_file_into_a_directory(packed: Path, tmp_path: Path, key: Key) -> None:
    with Container(packed, key=key) as opened:
        extract_gguf(opened, tmp_path / "out")
        with pytest.raises(CheckpointError, match="already exists"):
            extract_gguf(opened, tmp_path / "out")
    assert contents(tmp_path / "out") == {"model.gguf": FILES["model.gguf"]}


def test_several_gguf_files(tmp_path: Path, key: Key) -> None:
    path, files = tmp_path / "x.axm", {"a.gguf": b"GGUF1", "b/c.gguf": b"GGUF2", "z": b""}
    path.write_bytes(write_zip(signed_entries(files)))
    with Container(path, key=key) as opened:
        with pytest.raises(
            CheckpointError, match=rf"^{path} holds 2 GGUF files \(a\.gguf, b/c\.gguf\); name a directory for them$"
        ):
            extract_gguf(opened, tmp_path / "out.gguf")
        extract_gguf(opened, tmp_path / "out")
    assert contents(tmp_path / "out") == {"a.gguf": b"GGUF1", "b/c.gguf": b"GGUF2"}


def test_no_gguf_file(tmp_path: Path, key: Key) -> None:
    path = tmp_path / "x.axm"
    path.write_bytes(write_zip(signed_entries({"config.json": b"{}"})))
    with Container(path, key=key) as opened, pytest.raises(CheckpointError, match=rf"^{path} holds no GGUF file$"):
        extract_gguf(opened, tmp_path / "out.gguf")


def test_a_changed_gguf_file_leaves_nothing(tmp_path: Path, key: Key) -> None:
    path, output = tmp_path / "x.axm", tmp_path / "out.gguf"
    path.write_bytes(write_zip(signed_entries()).replace(FILES["model.gguf"], OTHER_FILES["model.gguf"]))
    output.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    with Container(path, key=key) as opened, pytest.raises(CheckpointError, match=r"model\.gguf was changed after"):
        extract_gguf(opened, output, overwrite=True)
    assert output.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before
