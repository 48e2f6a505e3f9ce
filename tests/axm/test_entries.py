import hashlib
import math
import mmap
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from containers import FILES, SECRET, container, write_files
from packing import KEY_HEX, flip_byte, pack_copy
from safetensors.torch import save_file
from small_checkpoint import BIG, CORRECTED, DAMAGES, flip_bit, write_base, write_checkpoint

from srd_modifier.axm.container import Container
from srd_modifier.axm.entries import EntryPath, is_container, mount, open_root
from srd_modifier.axm.keys import ENVIRONMENT, Key
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.config import read_srd_config
from srd_modifier.checkpoint.extents import open_extent
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.checkpoint.sensitivity import read_sensitivity
from srd_modifier.checkpoint.shards import Shard
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.summary import summarize
from srd_modifier.errors import CheckpointError, SRDError


@pytest.fixture
def root(packed: Path) -> EntryPath:
    return open_root(packed)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SRD checkpoint with a sensitivity."""
    folder = tmp_path_factory.mktemp("entries")
    return write_checkpoint(folder / "checkpoint", folder / "scratch", sensitivity=DAMAGES)


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> EntryPath:
    """The same in a container."""
    return open_root(pack_copy(directory, directory.with_name("checkpoint.axm")))


# paths


def test_the_files_are_those_that_were_packed(root):
    assert {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()} == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_like_any_other(root, name):
    path, content = root / name, FILES[name]
    assert (path.exists(), path.is_file(), path.is_dir(), path.is_symlink()) == (True, True, False, False)
    assert path.stat().st_size == path.lstat().st_size == len(content)
    assert path.sha256 == hashlib.sha256(content).hexdigest()
    assert str(path) == f"{root}/{name}"
    assert root in path.parents
    with path.open("rb") as file:
        assert file.seek(-3, os.SEEK_END) == len(content) - 3
        assert file.read() == content[-3:]
        assert file.read() == b""
        assert (file.seek(2), file.tell(), file.read(4)) == (2, 2, content[2:6])
    with path.open("rb", buffering=0) as file:
        assert file.read() == content


def test_a_text_is_read_as_text(root):
    path = root / "notes" / "about.txt"
    assert path.read_text(encoding="utf-8") == FILES["notes/about.txt"].decode()
    with path.open(encoding="utf-8") as file:
        assert list(file) == ["What this is.\n"]


def test_folders_are_listed(root):
    assert [path.name for path in root.iterdir()] == ["met.json", "model.gguf", "notes", "tokenizer.json"]
    assert [path.name for path in root.glob("*.json")] == ["met.json", "tokenizer.json"]
    assert list(root.glob("*.bin")) == list((root / "met.json").glob("*")) == list((root / "nothing").glob("*")) == []
    notes = root / "notes"
    assert (notes.is_dir(), notes.is_file(), [*notes.iterdir()]) == (True, False, [notes / "about.txt"])
    assert root.is_dir()
    with pytest.raises(IsADirectoryError):
        notes.open()
    with pytest.raises(NotADirectoryError):
        list((root / "met.json").iterdir())


@pytest.mark.parametrize("name", ["nothing", "notes/nothing", "met.json/x", "note", "axm.json", "manifest.json"])
def test_what_is_not_packed_is_not_there(root, name):
    path = root / name
    assert (path.exists(), path.is_file(), path.is_dir()) == (False, False, False)
    with pytest.raises(FileNotFoundError):
        path.open("rb")


@pytest.mark.parametrize("mode", ["w", "wb", "a", "r+b", "x"])
def test_nothing_can_be_written(root, mode):
    with pytest.raises(PermissionError, match="cannot be written to"):
        (root / "met.json").open(mode)


def test_times_are_those_of_the_container(root, packed):
    assert (root / "met.json").stat().st_mtime_ns == packed.stat().st_mtime_ns
    assert (root / "met.json").stat().st_mtime == packed.stat().st_mtime


def test_no_two_files_are_the_same(root):
    assert (root / "met.json").samefile(root / "met.json")
    assert not (root / "met.json").samefile(root / "tokenizer.json")


def test_a_path_that_leads_to_no_container_is_no_file(tmp_path):
    assert not EntryPath(tmp_path / "file").exists()
    with pytest.raises(FileNotFoundError, match="no container is mounted"):
        EntryPath(tmp_path / "file").open()


# verification comes first


def test_an_unverified_container_cannot_be_mounted(packed):
    with Container(packed) as opened, pytest.raises(ValueError, match="is not verified"):
        mount(opened)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_not_opened(packed, name):
    flip_byte(packed, FILES[name])
    with pytest.raises(CheckpointError, match=f"{name} was changed after it was packed"):
        open_root(packed)


def test_a_container_is_verified_once(packed, monkeypatch):
    calls = []
    verify = Container.verify
    monkeypatch.setattr(Container, "verify", lambda self, progress=None: (calls.append(self.path), verify(self)))
    first, second = open_root(packed), open_root(str(packed))
    assert first == second
    assert calls == [packed]


def test_a_container_that_was_changed_is_verified_again(packed, root):
    flip_byte(packed, FILES["tokenizer.json"])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was changed"):
        open_root(packed)


def test_threads_share_one_verification(packed, monkeypatch):
    calls, roots = [], []
    verify = Container.verify
    monkeypatch.setattr(Container, "verify", lambda self, progress=None: (calls.append(1), verify(self)))
    threads = [threading.Thread(target=lambda: roots.append(open_root(packed))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(roots), len(set(roots))) == (1, 8, 1)


def test_a_container_of_the_same_name_does_not_take_the_place_of_an_open_one(packed, root, tmp_path):
    changed = FILES | {"tokenizer.json": b'{"other":{}}\n'}
    other = tmp_path / "other.axm"
    other.write_bytes(container(changed))
    other.replace(packed)
    second = open_root(packed)
    assert str(second).startswith(f"{packed}@")
    assert (root / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert (second / "tokenizer.json").read_bytes() == changed["tokenizer.json"]


def test_the_key_in_the_environment_counts(packed, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, SECRET.hex())
    assert open_root(packed).container.key.key_id == Key(SECRET).key_id


def test_another_key_in_the_environment_opens_nothing(packed, root, monkeypatch):
    """Although it was opened without a key before."""
    monkeypatch.setenv(ENVIRONMENT, KEY_HEX)
    with pytest.raises(CheckpointError, match="was packed with another key"):
        open_root(packed)


def test_a_key_that_is_none_is_refused(packed, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "no hexadecimal")
    with pytest.raises(SRDError, match=f"{ENVIRONMENT} is not hexadecimal"):
        open_root(packed)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"a text"], ids=["empty", "zip", "text"])
def test_a_file_that_is_no_container_is_refused(tmp_path, content):
    (tmp_path / "x.axm").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.axm: it is "):
        open_root(tmp_path / "x.axm")


def test_a_missing_container_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_root(tmp_path / "x.axm")


def test_a_refused_container_leaves_no_descriptor(packed):
    flip_byte(packed, FILES["model.gguf"])
    before = descriptors()
    for _ in range(3):
        with pytest.raises(CheckpointError):
            open_root(packed)
    assert descriptors() == before


def test_progress_is_told(packed):
    seen: list[tuple[int, int]] = []
    open_root(packed, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(map(len, FILES.values())),) * 2


def test_what_names_a_container(packed, tmp_path):
    (tmp_path / "folder.axm").mkdir()
    (tmp_path / "model.bin").write_bytes(packed.read_bytes())
    assert is_container(packed)
    assert is_container(str(packed))
    others = [
        tmp_path / "folder.axm",
        tmp_path / "missing.axm",
        tmp_path / "model.bin",
        b"x.axm",
        None,
        3,
        "owner/name",
    ]
    assert not any(map(is_container, others))


# checkpoints, read in place


def test_the_parts_of_a_checkpoint_are_as_in_the_directory(directory, checkpoint):
    assert read_srd_config(checkpoint) == read_srd_config(directory)
    assert read_sensitivity(checkpoint) == read_sensitivity(directory)
    assert find_model(checkpoint) == checkpoint
    base, theirs = BaseCheckpoint(checkpoint), BaseCheckpoint(directory)
    assert (list(base), base.digest(), base.fingerprint()) == (list(theirs), theirs.digest(), theirs.fingerprint())
    assert all(torch.equal(base.tensor(name), theirs.tensor(name)) for name in theirs)
    assert [file.relative_to(checkpoint).as_posix() for file in base.files] == [
        file.relative_to(directory).as_posix() for file in theirs.files
    ]


def test_the_residual_is_as_in_the_directory(directory, checkpoint):
    found, expected = Sidecar.open(checkpoint), Sidecar.open(directory)
    found.verify()
    assert found.entries == expected.entries
    assert [path.name for path in found.files()] == [path.name for path in expected.files()]
    for module in CORRECTED:
        assert torch.equal(found.correct(module, 0.5), expected.correct(module, 0.5))


@pytest.mark.parametrize("corrected", [None, [], [BIG]], ids=["all", "none", "one"])
def test_sizes_are_those_of_the_files_inside(directory, checkpoint, corrected):
    assert measure(checkpoint, corrected=corrected) == measure(directory, corrected=corrected)
    assert not math.isnan(measure(checkpoint).bits_per_weight)


def test_the_summary_is_that_of_the_directory(directory, checkpoint):
    found, expected = summarize(checkpoint).as_json(), summarize(directory).as_json()
    assert found.pop("directory") == str(checkpoint)
    assert expected.pop("directory") == str(directory)
    assert found == expected


def test_a_plain_checkpoint_is_summarized(tmp_path):
    write_base(tmp_path / "base")
    root = open_root(pack_copy(tmp_path / "base", tmp_path / "base.axm"))
    assert summarize(root).as_json() == summarize(tmp_path / "base").as_json() | {"directory": str(root)}
    with pytest.raises(CheckpointError, match="has no srd_config"):
        Sidecar.open(root)


def test_damage_from_before_packing_is_found(directory, tmp_path):
    damaged = Path(shutil.copytree(directory, tmp_path / "damaged"))
    flip_bit(damaged / "srd" / "residual-00001-of-00002.safetensors", f"{BIG}.weight_d8")
    sidecar = Sidecar.open(open_root(pack_copy(damaged, tmp_path / "damaged.axm")))
    with pytest.raises(CheckpointError, match=rf"damaged\.axm/srd/.*{BIG}.weight_d8 does not match its digest"):
        sidecar.verify()


def test_only_the_file_is_mapped_and_its_memory_is_given_back(tmp_path):
    """A tensor of 32 MiB between two files, which this process has in memory only while it is used."""
    write_base(tmp_path / "model")
    size = 2**25
    save_file({"a": torch.arange(size, dtype=torch.uint8), "b": torch.ones(3)}, tmp_path / "model" / "big.safetensors")
    root = open_root(pack_copy(tmp_path / "model", tmp_path / "model.axm"))
    shard = Shard.open(root / "big.safetensors")
    assert len(shard._map) == (root / "big.safetensors").stat().st_size
    before = resident()
    assert torch.equal(shard.tensor("a"), torch.arange(size, dtype=torch.uint8))
    assert resident() - before > 0.9 * size
    shard.release()
    assert resident() - before < 0.1 * size
    assert shard.tensor("a")[-1] == 255
    assert shard.tensor("b").tolist() == [1, 1, 1]
    assert b"".join(shard.chunks("a")) == bytes(range(256)) * (size // 256)
    assert list(shard.read([shard.tensors["a"].start + 5], 3, end=shard.tensors["a"].end)) == [bytes([5, 6, 7])]


def descriptors() -> int:
    """Files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_pages_larger_than_the_alignment_are_mapped_from_before_the_file(checkpoint, monkeypatch):
    """As on machines whose pages have 64 KiB: the offset of a map is a multiple of that."""
    expected = Shard.open(checkpoint / "model.safetensors")
    monkeypatch.setattr(mmap, "ALLOCATIONGRANULARITY", 2**16)
    shard = Shard.open(checkpoint / "model.safetensors")
    assert shard._origin == checkpoint.container.entry("model.safetensors").data % 2**16 > 0
    assert shard.tensors == expected.tensors
    for name in expected.tensors:
        assert torch.equal(shard.tensor(name), expected.tensor(name))
        assert shard.view(name) == expected.view(name)


def test_an_extent_does_not_reach_into_the_next_file(root):
    with open_extent(root / "met.json") as extent:
        assert extent.read(0, 1000) == FILES["met.json"]
        assert extent.read(1, 1000) == FILES["met.json"][1:]
        assert extent.read(1000, 10) == b""
        mapped, origin = extent.map(mmap.ACCESS_READ)
    assert mapped[origin:] == FILES["met.json"]


def test_descriptors_are_closed(root):
    before = descriptors()
    for _ in range(5):
        (root / "tokenizer.json").read_bytes()
        with open_extent(root / "met.json") as extent:
            extent.read(0, 1)
    assert descriptors() == before


def test_a_container_in_the_place_of_a_directory_is_a_sentence(packed):
    with pytest.raises(SRDError, match=r"packed\.axm is a file, expected a model directory .* with `srd axm extract`"):
        find_model(packed)


def test_another_file_in_the_place_of_a_directory_is_a_sentence(tmp_path):
    path = write_files(tmp_path / "model") / "tokenizer.json"
    with pytest.raises(SRDError, match=re.escape(f"{path} is a file, expected a model directory or a hub id") + "$"):
        find_model(path)
