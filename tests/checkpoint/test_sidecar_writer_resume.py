"""A sidecar that several writers have written, one after the other, is that of one."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import CORRECTED, DEFAULT, ENTRIES, MAX_SHARD_BYTES, digests, residuals

from srd_modifier.checkpoint.shards import Shard
from srd_modifier.checkpoint.writer import SidecarWriter, tensor_bytes
from srd_modifier.errors import CheckpointError

ENCODED = residuals()
SIZES = [MAX_SHARD_BYTES, 5 * 10**9]


def write_all(folder: Path, size: int) -> dict[str, str]:
    writer = SidecarWriter(folder, ENTRIES, max_shard_bytes=size)
    for module in CORRECTED:
        writer.write(module, ENCODED[module])
    writer.finish(DEFAULT)
    return digests(folder)


def begin(folder: Path, size: int, modules: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Write some modules, and stop; their digests."""
    writer = SidecarWriter(folder, ENTRIES, max_shard_bytes=size)
    for module in modules:
        writer.write(module, ENCODED[module])
        writer.flush([module])
    found = {module: writer.digests(module) for module in modules}
    writer.close()
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", range(len(CORRECTED) + 1))
def test_a_writer_goes_on_where_another_stopped(size: int, count: int, tmp_path: Path) -> None:
    expected = write_all(tmp_path / "expected", size)
    done = begin(tmp_path / "out", size, CORRECTED[:count])
    writer = SidecarWriter(tmp_path / "out", ENTRIES, max_shard_bytes=size, keep=True)
    assert all(writer.restore(module, found) for module, found in done.items())
    assert writer.missing == list(CORRECTED[count:])
    for module in CORRECTED[count:]:
        writer.write(module, ENCODED[module])
    writer.finish(DEFAULT)
    assert digests(tmp_path / "out") == expected


def test_digests_are_those_of_the_tensors(tmp_path: Path) -> None:
    for module, found in begin(tmp_path, SIZES[0], CORRECTED).items():
        tensors = ENCODED[module].tensors()
        assert found == {suffix: hashlib.sha256(tensor_bytes(tensors[suffix])).hexdigest() for suffix in found}
        assert set(found) == set(ENTRIES[module].layout())


def test_a_writer_may_go_on_after_the_headers_were_written(tmp_path: Path) -> None:
    expected = write_all(tmp_path, SIZES[0])
    done = begin(tmp_path / "other", SIZES[0], CORRECTED)
    writer = SidecarWriter(tmp_path, ENTRIES, max_shard_bytes=SIZES[0], keep=True)
    assert all(writer.restore(module, found) for module, found in done.items())
    writer.finish(DEFAULT)
    assert {name: value for name, value in digests(tmp_path).items() if "/" not in name} == expected


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    """The first and the last of every tensor."""
    expected = write_all(tmp_path / "expected", SIZES[1])
    (name,) = (file for file in expected if file.endswith(".safetensors"))
    done = begin(tmp_path / "out", SIZES[1], CORRECTED)
    path = tmp_path / "out" / name
    content = path.read_bytes()
    writer = SidecarWriter(tmp_path / "out", ENTRIES, keep=True)
    for tensor, info in Shard.open(tmp_path / "expected" / name).tensors.items():
        for position in (info.start, info.end - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(changed)
            (module,) = (module for module in CORRECTED if tensor.startswith(f"{module}."))
            for other in CORRECTED:
                assert writer.restore(other, done[other]) == (other != module)
            writer._digests.clear()
    writer.close()


def change_suffix(found: dict[str, str]) -> dict[str, Any]:
    return {f"{suffix}_": digest for suffix, digest in found.items()}


def leave_one_out(found: dict[str, str]) -> dict[str, Any]:
    return dict(list(found.items())[1:])


def add_one(found: dict[str, str]) -> dict[str, Any]:
    return {**found, "weight_more": "0" * 64}


def change_digest(found: dict[str, str]) -> dict[str, Any]:
    return {suffix: digest[::-1] for suffix, digest in found.items()}


@pytest.mark.parametrize("change", [change_suffix, leave_one_out, add_one, change_digest, lambda found: {}])
def test_other_digests_are_refused(tmp_path: Path, change: Any) -> None:
    done = begin(tmp_path, SIZES[1], CORRECTED)
    writer = SidecarWriter(tmp_path, ENTRIES, keep=True)
    for module in CORRECTED:
        assert not writer.restore(module, change(done[module]))
    assert writer.missing == list(CORRECTED)
    with pytest.raises(CheckpointError, match=rf"{len(CORRECTED)} modules were never written, first "):
        writer.finish(DEFAULT)
    writer.close()


def test_what_is_refused_is_written_again(tmp_path: Path) -> None:
    expected = write_all(tmp_path / "expected", SIZES[1])
    done = begin(tmp_path / "out", SIZES[1], CORRECTED[:2])
    writer = SidecarWriter(tmp_path / "out", ENTRIES, keep=True)
    assert not writer.restore(CORRECTED[0], change_digest(done[CORRECTED[0]]))
    assert writer.restore(CORRECTED[1], done[CORRECTED[1]])
    for module in writer.missing:
        writer.write(module, ENCODED[module])
    writer.finish(DEFAULT)
    assert digests(tmp_path / "out") == expected


def test_without_keep_there_is_nothing_to_restore(tmp_path: Path) -> None:
    done = begin(tmp_path, SIZES[1], CORRECTED)
    writer = SidecarWriter(tmp_path, ENTRIES)
    assert not any(writer.restore(module, found) for module, found in done.items())
    writer.close()


def test_only_the_files_of_the_modules_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SidecarWriter(tmp_path, ENTRIES, max_shard_bytes=SIZES[0])
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    writer.flush([CORRECTED[0]])
    assert len(flushed) == 1
    flushed.clear()
    writer.flush(CORRECTED)
    assert len(flushed) == len(set(flushed)) == len(list(tmp_path.glob("*.safetensors"))) > 1
    writer.flush([])
    writer.close()


def test_flushing_is_refused_by_a_full_disk_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    writer = SidecarWriter(tmp_path, ENTRIES)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        CheckpointError, match=r"^cannot write .*residual-00001-of-00001\.safetensors: No space left on"
    ):
        writer.flush(CORRECTED)
    writer.close()
