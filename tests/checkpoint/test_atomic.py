import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.checkpoint.atomic import (
    flush_tree,
    link_or_copy,
    merge_directory,
    new_directory,
    refuse_existing,
    sibling,
    write_json,
    write_text,
)
from srd_modifier.errors import CheckpointError

NEW = {"config.json": "new", "model.safetensors": "new weights", "srd/residual.safetensors": "new residual"}
OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old weights",
    "model-00002-of-00002.safetensors": "old weights too",
    "model.safetensors.index.json": "old index",
    "srd/residual-00001-of-00002.safetensors": "old residual",
    "srd/residual-00002-of-00002.safetensors": "old residual too",
    "README.md": "the user's own",
    "notes/plan.txt": "the user's own too",
}
KEPT = {name: text for name, text in OLD.items() if text.startswith("the user's")}


def fill(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def left_over(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.endswith(".partial"))


def fill_and_raise(writing: AbstractContextManager[Path], error: BaseException) -> None:
    with writing as staging:
        fill(staging, NEW)
        raise error


def open_path(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# --- new_directory ---------------------------------------------------------------------------------------------------


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_directory(target) as staging:
        fill(staging, NEW)
        assert staging.parent == tmp_path
        assert not target.exists()
    assert contents(target) == NEW
    assert left_over(tmp_path) == []


def test_parents_are_made(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "out") as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "a" / "b" / "out") == NEW


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "out") == NEW
    assert left_over(tmp_path) == []


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_directory(Path("out")) as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "out") == NEW


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    message = f"^{re.escape(str(tmp_path / 'out'))} already exists; choose another directory or pass --overwrite"
    with pytest.raises(CheckpointError, match=message), new_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "out") == OLD


def test_an_existing_model_is_overwritten_when_asked(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    with new_directory(tmp_path / "out", overwrite=True) as staging:
        fill(staging, NEW)
        assert contents(tmp_path / "out") == OLD
    assert contents(tmp_path / "out") == NEW
    assert left_over(tmp_path) == []


def test_what_is_not_a_model_is_never_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "home", KEPT)
    with (
        pytest.raises(CheckpointError, match=r"home is not a model directory and is not overwritten; remove it"),
        new_directory(tmp_path / "home", overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "home") == KEPT


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match=r"out is a file, expected a directory"):
        refuse_existing(tmp_path / "out", overwrite=overwrite)
    with (
        pytest.raises(CheckpointError, match=r"out is a file, expected a directory"),
        new_directory(tmp_path / "out", overwrite=overwrite),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_error_in_the_block_leaves_the_target_as_it_was(
    tmp_path: Path, existing: bool, error: type[BaseException]
) -> None:
    before = contents(fill(tmp_path / "out", OLD)) if existing else None
    with pytest.raises(error):
        fill_and_raise(new_directory(tmp_path / "out", overwrite=existing), error())
    assert (contents(tmp_path / "out") if existing else None) == before
    assert (tmp_path / "out").exists() == existing
    assert left_over(tmp_path) == []


def test_a_disk_error_in_the_block_names_the_target(tmp_path: Path) -> None:
    message = f"^cannot write {re.escape(str(tmp_path / 'out'))}: No space left on device"
    with pytest.raises(CheckpointError, match=message):
        fill_and_raise(new_directory(tmp_path / "out"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_flush_that_fails_leaves_the_target_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        fill(tmp_path / "out", OLD)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*out: Input/output error"),
        new_directory(tmp_path / "out", overwrite=True) as staging,
    ):
        fill(staging, NEW)
    assert (tmp_path / "out").exists() == existing
    if existing:
        assert contents(tmp_path / "out") == OLD
    assert left_over(tmp_path) == []


def test_the_old_directory_comes_back_when_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", OLD)
    rename, calls = Path.rename, []

    def second_fails(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            failing(errno.EIO)()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*out: Input/output error"),
        new_directory(tmp_path / "out", overwrite=True) as staging,
    ):
        fill(staging, NEW)
    assert len(calls) == 3
    assert contents(tmp_path / "out") == OLD
    assert left_over(tmp_path) == []


def test_everything_is_flushed_before_the_target_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(open_path(descriptor)))
    rename, seen = Path.rename, []

    def note(source: Path, target: Path) -> Path:
        seen.append({str(path) for path in [source, *source.rglob("*")]} - flushed)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", note)
    with new_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    assert seen == [set()]
    assert str(tmp_path) in flushed  # the name itself


@pytest.mark.parametrize("writing", [new_directory, merge_directory])
def test_a_link_to_a_directory_stays_a_link(tmp_path: Path, writing: Any) -> None:
    """`out -> /big/disk/out`: the model belongs where the link leads, and nothing is left beside the link."""
    fill(tmp_path / "disk" / "out", {"config.json": "old", "model.safetensors": "old weights"})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "out").symlink_to(tmp_path / "disk" / "out")
    with writing(tmp_path / "here" / "out", **({"overwrite": True} if writing is new_directory else {})) as staging:
        fill(staging, NEW)
    assert (tmp_path / "here" / "out").is_symlink()
    assert contents(tmp_path / "disk" / "out") == NEW
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    assert left_over(tmp_path / "disk") == []


# --- merge_directory -------------------------------------------------------------------------------------------------


def test_merging_into_nothing_makes_the_directory(tmp_path: Path) -> None:
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "out") == NEW
    assert left_over(tmp_path) == []


def test_merging_into_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "out") == NEW
    assert left_over(tmp_path) == []


def test_merging_replaces_the_model_and_keeps_the_rest(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
        assert contents(tmp_path / "out") == OLD
    assert contents(tmp_path / "out") == NEW | KEPT
    assert left_over(tmp_path) == []


def test_merging_keeps_a_users_own_weights(tmp_path: Path) -> None:
    """`save_pretrained` removes stale shards of the model, never an adapter that lies beside it."""
    fill(tmp_path / "out", OLD | {"adapter_model.safetensors": "an adapter"})
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    assert contents(tmp_path / "out") == NEW | KEPT | {"adapter_model.safetensors": "an adapter"}


def test_merging_replaces_files_of_the_same_name(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD | {"tokenizer.json": "old tokenizer", "extra/a.txt": "old"})
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW | {"tokenizer.json": "new tokenizer", "extra/b.txt": "new"})
    assert contents(tmp_path / "out") == NEW | KEPT | {"tokenizer.json": "new tokenizer", "extra/b.txt": "new"}


def test_merging_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match=r"out is a file"), merge_directory(tmp_path / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
def test_an_error_while_merging_leaves_the_target_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "out", OLD)
    with pytest.raises(error):
        fill_and_raise(merge_directory(tmp_path / "out"), error())
    assert contents(tmp_path / "out") == OLD
    assert left_over(tmp_path) == []


def test_a_flush_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", OLD)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device"),
        merge_directory(tmp_path / "out") as staging,
    ):
        fill(staging, NEW)
    assert contents(tmp_path / "out") == OLD
    assert left_over(tmp_path) == []


def test_config_json_is_removed_first_and_put_there_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", OLD)
    unlink, replace, order = Path.unlink, Path.replace, []

    def note_unlink(path: Path, **kwargs: Any) -> None:
        order.append(f"-{path.name}")
        unlink(path, **kwargs)

    def note_replace(source: Path, target: Path) -> Path:
        order.append(f"+{target.name}")
        return replace(source, target)

    monkeypatch.setattr(Path, "unlink", note_unlink)
    monkeypatch.setattr(Path, "replace", note_replace)
    with merge_directory(tmp_path / "out") as staging:
        fill(staging, NEW)
    monkeypatch.undo()
    assert order[0] == "-config.json"
    assert order[-1] == "+config.json"
    assert order.count("-config.json") == order.count("+config.json") == 1


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "empty"])
def test_a_link_to_another_disk_loses_nothing(tmp_path: Path, existing: bool) -> None:
    """Files cannot be renamed from one file system to another: that must show before the old model is removed."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory) as other_disk:
        real = Path(other_disk, "out")
        real.mkdir()
        if existing:
            fill(real, OLD)
        (tmp_path / "out").symlink_to(real)
        with merge_directory(tmp_path / "out") as staging:
            fill(staging, NEW)
        assert contents(real) == (NEW | KEPT if existing else NEW)
        assert (tmp_path / "out").is_symlink()
        assert left_over(tmp_path) == left_over(Path(other_disk)) == []


@pytest.mark.parametrize("files", [OLD, {}], ids=["existing", "empty"])
@pytest.mark.parametrize("writing", ["merge_directory(out)", "new_directory(out, overwrite=True)"])
def test_a_mount_point_takes_a_model(tmp_path: Path, writing: str, files: dict[str, str]) -> None:
    """`docker run -v disk:/out`: no rename leads into it from beside it, and none takes it away."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]).returncode:
        pytest.skip("needs leave to mount in a namespace of its own")
    program = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_atomic import KEPT, NEW, contents, fill, left_over
from srd_modifier.checkpoint.atomic import merge_directory, new_directory
out, old = Path({str(tmp_path / "out")!r}), {files!r}
fill(out, old)
with {writing} as staging:
    fill(staging, NEW)
expected = NEW | KEPT if old and {writing.startswith("merge")} else NEW
assert contents(out) == expected, contents(out)
assert left_over(out) == left_over(out.parent) == []
"""
    (tmp_path / "out").mkdir()
    command = f'mount -t tmpfs none "{tmp_path / "out"}" && exec "{sys.executable}" -c "$PROGRAM"'
    done = subprocess.run(
        [*unshare, "sh", "-c", command], env=os.environ | {"PROGRAM": program}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- files -----------------------------------------------------------------------------------------------------------


def test_write_text_replaces_a_file_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "naïve")
    assert (tmp_path / "a.txt").read_bytes() == "naïve".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")], ids=["flush", "rename"])
def test_a_text_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str
) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(owner, call, failing(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"cannot write .*a.txt: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"a.txt": "old"}


def test_write_json_keeps_the_order_of_the_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere/a.json: No such file or directory"):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_a_file_is_linked_where_that_works(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(os, "link", failing(errno.EXDEV))
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"
    assert not (tmp_path / "a").samefile(tmp_path / "b")


def test_a_sibling_is_beside_its_target_and_new_every_time(tmp_path: Path) -> None:
    first, second = sibling(tmp_path / "out"), sibling(tmp_path / "out")
    assert first.parent == second.parent == tmp_path
    assert first != second
    assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.partial", first.name)


def test_flush_tree_flushes_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", NEW)
    flushed: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(open_path(descriptor)))
    flush_tree(tmp_path / "out")
    assert flushed == {str(tmp_path / "out"), *(str(path) for path in (tmp_path / "out").rglob("*"))}
    assert contents(tmp_path / "out") == NEW
