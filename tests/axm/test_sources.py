"""Which files are packed, and which are refused before anything is written."""

import os
import re
from pathlib import Path

import pytest
from containers import FILES, write_files

from srd_modifier.axm.sources import find_sources
from srd_modifier.errors import CheckpointError


def test_all_files_of_a_directory(model: Path) -> None:
    assert find_sources([model]) == {name: model / name for name in FILES}


def test_hidden_files_and_folders_are_left_out(model: Path) -> None:
    hidden = {".gitattributes": b"", ".cache/x": b"", "notes/.DS_Store": b"", "notes/.git/config": b""}
    write_files(model, hidden)
    (model / ".link").symlink_to("nowhere")
    (model / ".folder").symlink_to(model)
    assert sorted(find_sources([model])) == sorted(FILES)


def test_a_gguf_file_stands_beside_the_directory(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "small.gguf"
    write_files(tmp_path / "elsewhere", {"small.gguf": b"GGUF"})
    assert find_sources([model, other]) == {name: model / name for name in FILES} | {"small.gguf": other}
    assert find_sources([other]) == {"small.gguf": other}


def test_a_gguf_file_of_the_directory_itself(model: Path) -> None:
    assert find_sources([model, model / "model.gguf"]) == {name: model / name for name in FILES}


def test_two_files_of_one_name(model: Path, tmp_path: Path) -> None:
    other = write_files(tmp_path / "elsewhere", {"model.gguf": b"GGUF"}) / "model.gguf"
    with pytest.raises(
        CheckpointError, match=rf"^{model}/model.gguf and {other} would have the same name in the container$"
    ):
        find_sources([model, other])


def test_two_directories(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one checkpoint directory, more than one was given"):
        find_sources([model, write_files(tmp_path / "second")])


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/nothing: there is no such file or directory$"):
        find_sources([tmp_path / "nothing"])


def test_another_file_than_a_gguf(model: Path) -> None:
    path = model / "tokenizer.json"
    with pytest.raises(CheckpointError, match=f"^{path} is neither a directory nor a file whose name ends in .gguf$"):
        find_sources([path])


def test_a_directory_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/empty: there are no files to pack$"):
        find_sources([tmp_path / "empty"])


@pytest.mark.parametrize("name", ["axm.json", "manifest.json"])
def test_reserved_names(name: str, model: Path) -> None:
    write_files(model, {name: b"{}"})
    with pytest.raises(
        CheckpointError, match=rf"^{model}/{name}: a container keeps the name {name} for itself; rename the file$"
    ):
        find_sources([model])


def test_reserved_names_in_a_folder(model: Path) -> None:
    write_files(model, {"notes/axm.json": b"{}"})
    assert "notes/axm.json" in find_sources([model])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a\\b", r"'a\\b' has a backslash"),
        ("line\nbreak", r"'line\nbreak' has a control character"),
        ("C:x", "'C:x' names a drive"),
    ],
)
def test_names_that_a_container_cannot_hold(name: str, fault: str, model: Path) -> None:
    write_files(model, {name: b""})
    with pytest.raises(CheckpointError, match="^" + re.escape(f"{model}: {fault}, so it cannot be packed")):
        find_sources([model])


def test_a_name_that_is_no_text(model: Path) -> None:
    (model / os.fsdecode(b"x\xff")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not valid UTF-8, so it cannot be packed"):
        find_sources([model])


def test_names_that_differ_in_case_only(model: Path) -> None:
    write_files(model, {"Model.GGUF": b""})
    with pytest.raises(CheckpointError, match=r"differs from 'Model\.GGUF' only in spelling, so it cannot be packed"):
        find_sources([model])


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_link_to_a_file(model: Path, tmp_path: Path) -> None:
    """It may lead to anything, and be something else tomorrow."""
    (model / "link").symlink_to("/etc/passwd")
    with pytest.raises(
        CheckpointError, match=rf"^{model}/link is a symbolic link to /etc/passwd; copy the file, links are not packed$"
    ):
        find_sources([model])


def test_a_link_to_a_folder(model: Path) -> None:
    (model / "folder").symlink_to(model / "notes")
    with pytest.raises(CheckpointError, match="folder is a symbolic link to a folder, which is not packed"):
        find_sources([model])


def test_a_link_to_nothing(model: Path) -> None:
    (model / "link").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="link is a symbolic link to nothing"):
        find_sources([model])


def test_a_pipe(model: Path) -> None:
    """It is not waited for."""
    os.mkfifo(model / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not a regular file, so it cannot be packed"):
        find_sources([model])


def snapshot(tmp_path: Path) -> Path:
    """A model in the cache of Hugging Face: its files are links to blobs named by their digest."""
    repository = tmp_path / "models--someone--model"
    write_files(repository / "blobs", {f"{number:064}": data for number, data in enumerate(FILES.values())})
    folder = repository / "snapshots" / "0123abc"
    for number, name in enumerate(FILES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(repository / "blobs" / f"{number:064}", path.parent))
    return folder


def test_a_snapshot_of_the_hugging_face_cache(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    files = find_sources([folder])
    assert {name: path.read_bytes() for name, path in files.items()} == FILES


def test_a_snapshot_with_a_link_that_leads_elsewhere(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    (folder / "evil").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="evil is a symbolic link to /etc/passwd"):
        find_sources([folder])


def test_a_directory_that_is_itself_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert sorted(find_sources([tmp_path / "link"])) == sorted(FILES)
