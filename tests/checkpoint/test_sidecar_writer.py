import errno
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_checkpoint import (
    BIG,
    CORRECTED,
    DEFAULT,
    DENSE,
    ENTRIES,
    MAX_SHARD_BYTES,
    SPARSE,
    SPARSE_MODULE,
    digests,
    read_header,
    residuals,
    write_sidecar,
)
from torch import Tensor

from srd_modifier.checkpoint.shards import DTYPES, Shard
from srd_modifier.checkpoint.writer import INDEX_NAME, METADATA_KEY, ResidualEntry, SidecarWriter, tensor_bytes
from srd_modifier.errors import CheckpointError
from srd_modifier.residual import EncodedResidual, ResidualFormat, encode

ENCODED = residuals()


def write_all(folder: Path, order: tuple[str, ...] = CORRECTED, **kwargs: Any) -> Path:
    writer = SidecarWriter(folder, ENTRIES, **kwargs)
    for module in order:
        writer.write(module, ENCODED[module])
    writer.finish(DEFAULT)
    return folder


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- layout ----------------------------------------------------------------------------------------------------------


def test_safetensors_reads_back_what_was_written(tmp_path: Path) -> None:
    write_all(tmp_path)
    found = load_file(tmp_path / "residual-00001-of-00001.safetensors")
    expected = {
        f"{module}.{suffix}": tensor
        for module, encoded in ENCODED.items()
        for suffix, tensor in encoded.tensors().items()
    }
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_index_has_the_hugging_face_shape(tmp_path: Path) -> None:
    write_all(tmp_path, max_shard_bytes=MAX_SHARD_BYTES)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert set(index) == {"metadata", "weight_map"}
    assert index["metadata"]["version"] == 2
    assert index["metadata"]["formats"] == {SPARSE_MODULE: SPARSE.to_dict()}
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.itemsize for encoded in ENCODED.values() for tensor in encoded.tensors().values()
    )
    assert index["weight_map"] == {
        f"{BIG}.weight_d8": "residual-00001-of-00002.safetensors",
        f"{BIG}.weight_d8_scale": "residual-00001-of-00002.safetensors",
        f"{DENSE}.weight_d8": "residual-00002-of-00002.safetensors",
        f"{DENSE}.weight_d8_scale": "residual-00002-of-00002.safetensors",
        f"{SPARSE_MODULE}.weight_d8": "residual-00002-of-00002.safetensors",
        f"{SPARSE_MODULE}.weight_d8_mask": "residual-00002-of-00002.safetensors",
        f"{SPARSE_MODULE}.weight_d8_scale": "residual-00002-of-00002.safetensors",
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_the_metadata_describes_every_module(tmp_path: Path) -> None:
    write_all(tmp_path)
    with safe_open(tmp_path / "residual-00001-of-00001.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    srd = json.loads(metadata[METADATA_KEY])
    assert srd["version"] == 2
    assert tuple(srd["modules"]) == CORRECTED
    for module, record in srd["modules"].items():
        tensors = ENCODED[module].tensors()
        assert set(record) == {"shape", "format", "sha256"}
        assert record["shape"] == [ENTRIES[module].out_features, ENTRIES[module].in_features]
        assert ResidualFormat.from_dict(record["format"]) == ENTRIES[module].format
        assert record["sha256"] == {
            suffix: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for suffix, tensor in tensors.items()
        }


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (10**9, [CORRECTED]),
        (MAX_SHARD_BYTES, [(BIG,), (DENSE, SPARSE_MODULE)]),
        (sum(entry.bytes() for entry in ENTRIES.values()), [CORRECTED]),
        (sum(entry.bytes() for entry in ENTRIES.values()) - 1, [(BIG, DENSE), (SPARSE_MODULE,)]),
        (1, [(BIG,), (DENSE,), (SPARSE_MODULE,)]),  # a module is never divided
    ],
)
def test_a_new_file_is_begun_beyond_the_limit(tmp_path: Path, limit: int, files: list[tuple[str, ...]]) -> None:
    write_all(tmp_path, max_shard_bytes=limit)
    found = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in found] == [
        f"residual-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    for path, modules in zip(found, files, strict=True):
        assert {name.rpartition(".")[0] for name in load_file(path)} == set(modules)
        header, data = read_header(path)
        assert len(data) == sum(ENTRIES[module].bytes() for module in modules)
        assert set(json.loads(header["__metadata__"]["srd"])["modules"]) == set(modules)


def test_any_order_of_writing_gives_the_same_bytes(tmp_path: Path) -> None:
    found = [
        digests(write_all(tmp_path / str(number), order, max_shard_bytes=MAX_SHARD_BYTES))
        for number, order in enumerate(itertools.permutations(CORRECTED))
    ]
    assert len(found[0]) == 3
    assert all(other == found[0] for other in found)


def test_writing_a_module_again_replaces_it(tmp_path: Path) -> None:
    expected = digests(write_all(tmp_path / "once"))
    writer = SidecarWriter(tmp_path / "twice", ENTRIES)
    for seed in (1, 0):
        for module, encoded in residuals(seed).items():
            writer.write(module, encoded)
    writer.finish(DEFAULT)
    assert digests(tmp_path / "twice") == expected


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    expected = digests(write_all(tmp_path / "plain"))
    writer = SidecarWriter(tmp_path / "strided", ENTRIES)
    for module, encoded in ENCODED.items():
        writer.write(
            module, EncodedResidual(*(None if part is None else part.t().contiguous().t() for part in encoded))
        )
    writer.finish(DEFAULT)
    assert digests(tmp_path / "strided") == expected


def test_every_tensor_is_aligned_whatever_the_shapes(tmp_path: Path) -> None:
    entries = {
        "a": ResidualEntry(3, 5, ResidualFormat(group_size=8)),  # 15 bytes of codes before anything else
        "b": ResidualEntry(7, 9, ResidualFormat(group_size=8, scale_dtype="float32", density=0.4)),
    }
    writer = SidecarWriter(tmp_path, entries)
    for module, entry in entries.items():
        writer.write(module, encode(torch.randn(entry.out_features, entry.in_features), entry.format, key=module))
    writer.finish(DEFAULT)
    path = tmp_path / "residual-00001-of-00001.safetensors"
    header, data = read_header(path)
    header.pop("__metadata__")
    starts = {
        name: (entry["dtype"], path.stat().st_size - len(data) + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    assert {name: start % DTYPES[dtype].itemsize for name, (dtype, start) in starts.items()} == dict.fromkeys(starts, 0)


def test_a_module_that_is_named_beyond_ascii(tmp_path: Path) -> None:
    entry, encoded = ResidualEntry(2, 8, ResidualFormat(group_size=8)), encode(torch.ones(2, 8), ResidualFormat())
    writer = SidecarWriter(tmp_path, {'modèle."x"': entry})
    writer.write('modèle."x"', encoded)
    writer.finish(entry.format)
    assert 'modèle."x".weight_d8' in load_file(tmp_path / "residual-00001-of-00001.safetensors")


def test_a_sidecar_without_modules_has_an_index_alone(tmp_path: Path) -> None:
    SidecarWriter(tmp_path, {}).finish(DEFAULT)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX_NAME]
    assert json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"] == {}


def test_the_folder_is_made_and_holds_nothing_else(tmp_path: Path) -> None:
    files = write_sidecar(tmp_path / "a" / "b")
    assert [path.name for path in files] == [
        "residual-00001-of-00002.safetensors",
        "residual-00002-of-00002.safetensors",
        INDEX_NAME,
    ]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_tensor_bytes_are_those_of_safetensors(dtype: torch.dtype) -> None:
    tensor: Tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert bytes(tensor_bytes(tensor.t())) == tensor.t().contiguous().view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(tensor[:0])) == b""


# --- missing and wrong -----------------------------------------------------------------------------------------------


def test_what_is_missing_is_known_and_refused(tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path, ENTRIES)
    assert writer.missing == list(CORRECTED)
    writer.write(DENSE, ENCODED[DENSE])
    assert writer.missing == [BIG, SPARSE_MODULE]
    with pytest.raises(CheckpointError, match=f"{tmp_path}: 2 modules were never written, first {re.escape(BIG)}"):
        writer.finish(DEFAULT)
    writer.close()
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_shape_that_was_not_planned_is_refused(tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path, ENTRIES)
    message = rf"{re.escape(DENSE)}.weight_d8 is torch.int8 \(256, 1024\), planned torch.int8 \(64, 96\)"
    with pytest.raises(ValueError, match=message):
        writer.write(DENSE, ENCODED[BIG])
    assert DENSE in writer.missing
    writer.close()


def test_a_dtype_that_was_not_planned_is_refused(tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path, ENTRIES)
    codes, scale, _ = ENCODED[DENSE]
    with pytest.raises(ValueError, match=rf"{re.escape(DENSE)}.weight_d8_scale is torch.float32"):
        writer.write(DENSE, EncodedResidual(codes, scale.float()))
    writer.close()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    before = open_files()
    writer = SidecarWriter(tmp_path, ENTRIES)
    writer.close()
    writer.close()
    assert open_files() == before
    with pytest.raises(CheckpointError, match=r"residual-00001-of-00001.safetensors is closed"):
        writer.write(DENSE, ENCODED[DENSE])


def test_finishing_gives_the_files_back(tmp_path: Path) -> None:
    before = open_files()
    write_all(tmp_path)
    assert open_files() == before


def test_a_file_that_was_never_finished_cannot_be_read(tmp_path: Path) -> None:
    """The header comes last: until then the file's first bytes are zeros."""
    writer = SidecarWriter(tmp_path, ENTRIES)
    writer.write(DENSE, ENCODED[DENSE])
    writer.close()
    with pytest.raises(CheckpointError, match=r"residual-00001-of-00001.safetensors is not a safetensors file"):
        Shard.open(tmp_path / "residual-00001-of-00001.safetensors")


# --- a disk that is full ---------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def full(descriptor: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        if len(asked) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_files()
    message = rf"cannot reserve \d+ bytes for the residual in {re.escape(str(tmp_path))}: No space left on device"
    with pytest.raises(CheckpointError, match=message):
        SidecarWriter(tmp_path, ENTRIES, max_shard_bytes=MAX_SHARD_BYTES)
    assert [offset for offset, _ in asked] == [0, 0]
    assert asked[0][1] > ENTRIES[BIG].bytes()
    assert open_files() == before


def test_the_space_of_every_file_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path, ENTRIES, max_shard_bytes=MAX_SHARD_BYTES)
    reserved = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert all(status.st_blocks * 512 >= status.st_size for status in reserved.values())
    for module in CORRECTED:
        writer.write(module, ENCODED[module])
    writer.finish(DEFAULT)
    assert {name: (tmp_path / name).stat().st_size for name in reserved} == {
        name: status.st_size for name, status in reserved.items()
    }


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "file" / "srd"))):
        SidecarWriter(tmp_path / "file" / "srd", ENTRIES)


@pytest.mark.parametrize("moment", ["write", "finish"])
def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Reserved space does not help on a copy-on-write file system, or when the disk breaks."""
    writer = SidecarWriter(tmp_path, ENTRIES)

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if moment == "finish":
        for module in CORRECTED:
            writer.write(module, ENCODED[module])
    monkeypatch.setattr(os, "pwrite", broken)
    message = r"cannot write .*residual-00001-of-00001.safetensors: Input/output error"
    with pytest.raises(CheckpointError, match=message):
        writer.write(BIG, ENCODED[BIG]) if moment == "write" else writer.finish(DEFAULT)
    writer.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(write_all(tmp_path / "whole"))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:1000], offset))
    assert digests(write_all(tmp_path / "short")) == expected
