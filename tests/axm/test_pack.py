"""Packing: the same bytes every time, the same fingerprint for everybody, and nothing at the target when it fails."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import FILES, OTHER_FILES, OTHER_SECRET, container, write_files
from small_checkpoint import SECOND, digests, flip_bit, write_base, write_checkpoint

from srd_modifier.axm.container import Container
from srd_modifier.axm.extract import extract
from srd_modifier.axm.keys import Key
from srd_modifier.axm.pack import pack
from srd_modifier.errors import CheckpointError


def verified(path: Path, key: Key) -> list[str]:
    """The files of a container whose every byte is right."""
    with Container(path, key=key) as opened:
        opened.verify()
        return [record.path for record in opened.manifest.files]


def test_the_bytes_are_those_of_the_second_writer(model: Path, tmp_path: Path, key: Key) -> None:
    manifest = pack([model], tmp_path / "x.axm", key)
    assert (tmp_path / "x.axm").read_bytes() == container()
    assert [record.path for record in manifest.files] == list(FILES)


def test_the_same_files_give_the_same_bytes(model: Path, tmp_path: Path, key: Key) -> None:
    """Whatever their times, modes and order on the disk."""
    pack([model], tmp_path / "first.axm", key)
    again = write_files(tmp_path / "again", dict(reversed(FILES.items())))
    for path in again.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    pack([again], tmp_path / "second.axm", key)
    assert (tmp_path / "first.axm").read_bytes() == (tmp_path / "second.axm").read_bytes()


def test_the_fingerprint_is_that_of_the_files(model: Path, tmp_path: Path, key: Key) -> None:
    """Under another key, and after they were unpacked and packed again."""
    manifest = pack([model], tmp_path / "x.axm", key)
    other = pack([model], tmp_path / "other.axm", Key(OTHER_SECRET))
    assert (tmp_path / "x.axm").read_bytes() != (tmp_path / "other.axm").read_bytes()
    with Container(tmp_path / "x.axm", key=key) as opened:
        extract(opened, tmp_path / "unpacked")
    again = pack([tmp_path / "unpacked"], tmp_path / "again.axm", key)
    assert manifest.fingerprint == other.fingerprint == again.fingerprint
    changed = pack([write_files(tmp_path / "changed", OTHER_FILES)], tmp_path / "changed.axm", key)
    assert changed.fingerprint != manifest.fingerprint


def test_a_checkpoint(tmp_path: Path, key: Key) -> None:
    directory = write_checkpoint(tmp_path / "model", tmp_path / "scratch")
    (directory / "met.json").write_text("{}")
    pack([directory], tmp_path / "x.axm", key)
    assert sorted(verified(tmp_path / "x.axm", key)) == sorted(digests(directory))


def test_a_gguf_file_beside_a_directory(model: Path, tmp_path: Path, key: Key) -> None:
    other = write_files(tmp_path / "elsewhere", {"small.gguf": b"GGUF"}) / "small.gguf"
    pack([model, other], tmp_path / "x.axm", key)
    assert verified(tmp_path / "x.axm", key) == [
        "met.json",
        "model.gguf",
        "notes/about.txt",
        "small.gguf",
        "tokenizer.json",
    ]


def test_progress_counts_every_byte(model: Path, tmp_path: Path, key: Key) -> None:
    shown: list[tuple[int, int]] = []
    pack([model], tmp_path / "x.axm", key, progress=lambda done, total: shown.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert shown[-1] == (size, size)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)


def test_a_policy_is_built_where_there_is_none(tiny_llama: Path, tmp_path: Path, key: Key) -> None:
    pack([tiny_llama], tmp_path / "x.axm", key)
    with Container(tmp_path / "x.axm", key=key) as opened:
        assert opened.manifest.files[0].path == "met.json"
        assert "chunks" in json.loads(opened.read("met.json"))
    assert not (tiny_llama / "met.json").exists()


def test_a_signed_directory_without_a_policy_is_refused(tmp_path: Path, key: Key) -> None:
    """Its signature would not hold for the container."""
    model = write_files(tmp_path / "model", {"model.gguf": b"GGUF", "model.sig": b"{}"})
    with pytest.raises(CheckpointError, match=rf"^{model}/model\.sig signs the files beside it, and met\.json would"):
        pack([model], tmp_path / "x.axm", key)
    assert not (tmp_path / "x.axm").exists()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_directory_that_is_no_model(tmp_path: Path, key: Key) -> None:
    model = write_files(tmp_path / "model", {"met.json": b"{}", "notes.txt": b"x"})
    with pytest.raises(
        CheckpointError, match=rf"^{model} has neither config\.json nor a GGUF file, so it is not a model$"
    ):
        pack([model], tmp_path / "x.axm", key)


def damaged(directory: Path) -> None:
    (directory / SECOND).unlink()


def cut(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100_000)


@pytest.mark.parametrize(("damage", "named"), [(damaged, SECOND), (cut, "model.safetensors")])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], named: str, tmp_path: Path, key: Key) -> None:
    """A container would carry our word for it."""
    directory = write_checkpoint(tmp_path / "model", tmp_path / "scratch")
    (directory / "met.json").write_text("{}")
    damage(directory)
    with pytest.raises(CheckpointError, match=named):
        pack([directory], tmp_path / "x.axm", key)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_with_the_residual_of_another_base(tmp_path: Path, key: Key) -> None:
    directory = write_checkpoint(tmp_path / "model", tmp_path / "scratch")
    (directory / "met.json").write_text("{}")
    flip_bit(directory / "model.safetensors", "model.layers.0.mlp.up_proj.weight_packed")
    with pytest.raises(CheckpointError):
        pack([directory], tmp_path / "x.axm", key)


def test_a_base_whose_file_is_no_safetensors(tmp_path: Path, key: Key) -> None:
    write_base(tmp_path / "model")
    write_files(tmp_path / "model", {"met.json": b"{}", "model.safetensors": b"nonsense"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        pack([tmp_path / "model"], tmp_path / "x.axm", key)


# --- what is at the target -------------------------------------------------------------------------------------------


def test_an_existing_container(model: Path, tmp_path: Path, key: Key) -> None:
    output = tmp_path / "x.axm"
    pack([write_files(tmp_path / "other", OTHER_FILES)], output, key)
    before = output.read_bytes()
    with pytest.raises(CheckpointError, match=rf"^{output} already exists; choose another name or pass --overwrite$"):
        pack([model], output, key)
    assert output.read_bytes() == before
    pack([model], output, key, overwrite=True)
    assert output.read_bytes() == container()


def test_another_file_is_never_overwritten(model: Path, tmp_path: Path, key: Key) -> None:
    output = tmp_path / "model.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="is not a container and is not overwritten; remove it yourself"):
        pack([model], output, key, overwrite=True)
    assert output.read_bytes() == b"precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_at_the_target(overwrite: bool, model: Path, tmp_path: Path, key: Key) -> None:
    with pytest.raises(CheckpointError, match="is a directory, expected the name of a file to make"):
        pack([model], tmp_path, key, overwrite=overwrite)


def test_a_pipe_at_the_target(model: Path, tmp_path: Path, key: Key) -> None:
    """It is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a container and is not overwritten"):
        pack([model], tmp_path / "pipe", key, overwrite=True)


def test_no_folder_for_the_target(model: Path, tmp_path: Path, key: Key) -> None:
    with pytest.raises(CheckpointError, match=r"^cannot write .*x\.axm: No such file or directory$"):
        pack([model], tmp_path / "nowhere" / "x.axm", key)


def test_a_container_in_the_directory_that_is_packed(model: Path, key: Key) -> None:
    """It does not pack itself; the next one would pack it, and takes another fingerprint."""
    pack([model], model / "x.axm", key)
    assert verified(model / "x.axm", key) == list(FILES)


# --- what happens on the way -----------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of several blocks."""
    return write_files(tmp_path / "large", FILES | {"model.gguf": bytes(6 << 20)})


@pytest.mark.parametrize(
    ("size", "sentence"),
    [(1 << 20, "has only 2097152 of 6291456 bytes: it was changed while it was packed"), (7 << 20, "has grown while")],
    ids=["shorter", "longer"],
)
def test_a_file_whose_length_changes(size: int, sentence: str, large: Path, tmp_path: Path, key: Key) -> None:
    path = large / "model.gguf"

    def change(done: int, total: int) -> None:
        if done > 1 << 20:
            os.truncate(path, size)

    with pytest.raises(CheckpointError, match=f"^{path} {sentence}"):
        pack([large], tmp_path / "x.axm", key, progress=change)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large"]


def test_a_file_whose_bytes_change_is_packed_as_it_was_read(large: Path, tmp_path: Path, key: Key) -> None:
    """Digest and copy are of the same read."""

    def change(done: int, total: int) -> None:
        with (large / "model.gguf").open("r+b") as file:
            file.write(b"other")

    pack([large], tmp_path / "x.axm", key, progress=change)
    assert "model.gguf" in verified(tmp_path / "x.axm", key)


def test_a_file_that_disappears(large: Path, tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    find = os.truncate

    def remove(target: int, size: int) -> None:
        (large / "tokenizer.json").unlink()
        find(target, size)

    monkeypatch.setattr(os, "truncate", remove)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        pack([large], tmp_path / "x.axm", key)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(
    existing: bool, large: Path, model: Path, tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.axm"
    if existing:
        pack([model], output, key)
    before = sorted(tmp_path.iterdir())
    write, written = os.pwrite, []

    def full(descriptor: int, data: bytes, start: int) -> int:
        written.append(len(data))
        if sum(written) > 3 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match=f"^cannot write {output}: No space left on device$"):
        pack([large], output, key, overwrite=True)
    assert sorted(tmp_path.iterdir()) == before
    if existing:
        assert output.read_bytes() == container()


def test_an_interrupt(large: Path, tmp_path: Path, key: Key) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([large], tmp_path / "x.axm", key, progress=interrupt)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large"]


def test_nobody_sees_it_before_it_is_whole(large: Path, tmp_path: Path, key: Key) -> None:
    output, seen, stop = tmp_path / "x.axm", [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if output.exists():
                seen.append(verified(output, key))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        pack([large], output, key, overwrite=True)
    stop.set()
    watcher.join()
    assert all(names == list(FILES) for names in seen)
    assert verified(output, key) == list(FILES)
