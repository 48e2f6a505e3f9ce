import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srd_modifier.checkpoint.atomic import refuse_existing_file
from srd_modifier.errors import SRDError
from srd_modifier.gguf import writer
from srd_modifier.gguf.ggml import GGMLType, quantize
from srd_modifier.gguf.writer import Entry, open_writer, write_gguf

ENTRIES = (
    Entry("token_embd.weight", (5, 256), GGMLType.Q6_K),
    Entry("blk.0.ffn_up_exps.weight", (3, 4, 64), GGMLType.Q5_0),
    Entry("output_norm.weight", (7,), GGMLType.F32),  # 28 bytes: the next tensor begins after a gap
    Entry("output.weight", (2, 33), GGMLType.BF16),
)


def weight(entry: Entry) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(entry.name))
    return torch.randn(entry.shape, generator=generator)


def data(entry: Entry) -> Iterator[NDArray[np.uint8]]:
    whole = weight(entry)
    for part in whole if whole.dim() == 3 else [whole]:
        yield quantize(part.reshape(-1, entry.shape[-1]), entry.ggml_type)


def add_metadata(writer: Any) -> None:
    writer.add_block_count(1)
    writer.add_string("srd.method", "a test")


def write(path: Path, **options: Any) -> Path:
    write_gguf(path, "llama", add_metadata, ENTRIES, data, **options)
    return path


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_gguf_reads_what_was_written(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "model.gguf"))
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["llama.block_count"] == 1
    assert values["srd.method"] == "a test"
    assert [tensor.name for tensor in reader.tensors] == [entry.name for entry in ENTRIES]
    for tensor, entry in zip(reader.tensors, ENTRIES, strict=True):
        assert tensor.tensor_type is entry.ggml_type.in_gguf()
        assert tuple(tensor.shape)[::-1] == entry.shape
        assert tensor.n_bytes == entry.nbytes
        assert tensor.data_offset % 32 == 0
        assert np.asarray(tensor.data).tobytes() == b"".join(part.tobytes() for part in data(entry))
    assert leftovers(tmp_path) == ["model.gguf"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one.gguf").read_bytes() == write(tmp_path / "two.gguf").read_bytes()


def test_gguf_itself_writes_the_same_bytes(tmp_path: Path) -> None:
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    add_metadata(theirs)
    for entry in ENTRIES:
        blocks = np.concatenate(list(data(entry))).reshape(*entry.shape[:-1], -1)
        theirs.add_tensor(entry.name, blocks, raw_dtype=entry.ggml_type.in_gguf())
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    assert write(tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


ARRAYS = {
    "texts": ["a", "", "\u00fc", "\u2581\U0001f600"],
    "tuple of texts": ("a", "b"),
    "numbers": [1, -2, 2**31 - 1],
    "members": (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL),
    "floats": [0.1, -1e30, float("-inf")],
    "bools": [True, False],
    "bytes": b"\x00\xff",
    "bytes objects": [b"a", b"\xff"],
    "arrays": [[1, 2], [3]],
    "subclasses": [np.float64(0.5), 0.25],
}


def head(writer: Any) -> bytes:
    writer.add_uint32("a number", 7)
    writer.add_string("a text", "\u00fc")
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Path(writer.path).read_bytes()


def test_arrays_are_packed_as_gguf_packs_them(tmp_path: Path) -> None:
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    assert head(open_writer(tmp_path / "ours.gguf", "llama")) == head(theirs)


@pytest.mark.parametrize("values", [["a"], [1], [gguf.TokenType.NORMAL], [0.5]], ids=str)
def test_long_arrays_are_packed_at_once(values: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pack = gguf.GGUFWriter._pack_val
    monkeypatch.setattr(gguf.GGUFWriter, "_pack_val", lambda *args, **named: calls.append(args) or pack(*args, **named))
    made = open_writer(tmp_path / "model.gguf", "llama")
    made.add_array("a", values * 1000)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.close()
    assert len(calls) < 10


@pytest.mark.parametrize(("values", "error"), [([2**31], struct.error), ([1, "a"], ValueError)], ids=str)
def test_what_gguf_refuses_is_refused(values: list[Any], error: type[Exception], tmp_path: Path) -> None:
    made = open_writer(tmp_path / "model.gguf", "llama")
    made.add_array("a", values)
    made.write_header_to_file()
    with pytest.raises(error):
        made.write_kv_data_to_file()
    made.close()


def test_data_is_asked_for_one_tensor_at_a_time(tmp_path: Path) -> None:
    order = []

    def noted(entry: Entry) -> Iterator[NDArray[np.uint8]]:
        order.append(f"begin {entry.name}")
        yield from data(entry)
        order.append(f"end {entry.name}")

    write_gguf(tmp_path / "model.gguf", "llama", add_metadata, ENTRIES, noted)
    assert order == [f"{moment} {entry.name}" for entry in ENTRIES for moment in ("begin", "end")]


def test_one_piece_is_made_while_the_one_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("experts", (9, 8, 8), GGMLType.F32)
    begun = threading.Event()
    streams = []
    write_head = writer._write_head

    def write_head_meanwhile(*arguments: Any) -> Any:
        assert begun.wait(timeout=60), "the first piece waits for the head"
        streams.append(write_head(*arguments))
        return streams[0]

    def counted(entry: Entry) -> Iterator[NDArray[np.uint8]]:
        for number, piece in enumerate(weight(entry)):
            begun.set()
            if number > 1:
                assert streams[0].tell() >= (number - 1) * 256, "more than one piece ahead"
            yield quantize(piece, entry.ggml_type)

    monkeypatch.setattr(writer, "_write_head", write_head_meanwhile)
    write_gguf(tmp_path / "model.gguf", "llama", add_metadata, [entry], counted)
    (found,) = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert found.data.tolist() == weight(entry).tolist()


def test_directories_are_made(tmp_path: Path) -> None:
    assert write(tmp_path / "a" / "b" / "model.gguf").is_file()


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(SRDError, match=r"model\.gguf already exists; choose another name or pass --overwrite"):
        write(path)
    assert path.read_text() == "mine"


def test_an_existing_file_is_replaced_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    assert write(path, overwrite=True).read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    with pytest.raises(SRDError, match="is a directory, expected the name of a file"):
        refuse_existing_file(tmp_path, overwrite=overwrite)


def test_an_error_in_the_data_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing(entry: Entry) -> Iterator[NDArray[np.uint8]]:
        if entry is ENTRIES[2]:
            raise SRDError("a weight is not finite")
        yield from data(entry)

    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(SRDError, match="not finite"):
        write_gguf(path, "llama", add_metadata, ENTRIES, failing, overwrite=True)
    assert leftovers(tmp_path) == ["model.gguf"]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("count", [0, 2])
def test_data_of_another_size_is_a_mistake(count: int, tmp_path: Path) -> None:
    def wrong(entry: Entry) -> list[NDArray[np.uint8]]:
        return list(data(entry)) * count

    with pytest.raises(ValueError, match=r"token_embd\.weight got \d+ bytes, a Q6_K of its shape has 1050"):
        write_gguf(tmp_path / "model.gguf", "llama", add_metadata, ENTRIES, wrong)
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SRDError, match=r"cannot write .*model\.gguf: No space left on device"):
        write(tmp_path / "model.gguf")
    assert leftovers(tmp_path) == []


def test_rows_that_are_not_whole_blocks_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="rows of 33 weights cannot be Q8_0"):
        _ = Entry("output.weight", (2, 33), GGMLType.Q8_0).nbytes
