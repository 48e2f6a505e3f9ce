"""The header of a file, against gguf's reader, and every way in which it can be damaged."""

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.header import DamageError, read_header
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.gguf.writer import open_writer

SHARED = Path(__file__).parents[3] / "shared" / "models"
F32, Q8_0 = int(gguf.GGMLQuantizationType.F32), int(gguf.GGMLQuantizationType.Q8_0)
UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "a", shape: tuple[int, ...] = (32, 2), kind: int = Q8_0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def file(
    keys: tuple[bytes, ...] = (key("general.architecture", TEXT, text("llama")),),
    tensors: tuple[bytes, ...] = (tensor(),),
    data: int = 68,  # of the one tensor
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment + data)


def opened(content: bytes, folder: Path) -> GGUFFile:
    (folder / "m.gguf").write_bytes(content)
    return GGUFFile(folder / "m.gguf")


def everything(path: Path) -> Path:
    """A file with a value of every type and tensors of several."""
    writer = gguf.GGUFWriter(path, "llama")
    limits = {8: writer.add_uint8, 16: writer.add_uint16, 32: writer.add_uint32, 64: writer.add_uint64}
    for bits, add in limits.items():
        add(f"uint{bits}", 2**bits - 1)
    signed = {8: writer.add_int8, 16: writer.add_int16, 32: writer.add_int32, 64: writer.add_int64}
    for bits, add in signed.items():
        add(f"int{bits}", -(2 ** (bits - 1)))
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "\u00fcber\n\U0001f600")
    writer.add_array("texts", ["", "a", "\u2581b"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1e30])
    writer.add_array("bools", [True, False])
    writer.add_array("bytes", b"\x00\xff")
    writer.add_custom_alignment(64)
    generator = np.random.default_rng(0)
    for name, shape in {"vector": (7,), "matrix": (3, 64), "experts": (2, 3, 32)}.items():
        writer.add_tensor(name, generator.standard_normal(shape, np.float32))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
        weights = generator.standard_normal((2, 3, 64), np.float32)
        writer.add_tensor(kind.name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("half", generator.standard_normal((5, 3)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["everything", "tiny1m/tiny1m-f32.gguf", "stories260K/stories260Ktok512.gguf"])
def test_gguf_reads_the_same(name: str, tmp_path: Path) -> None:
    path = everything(tmp_path / "m.gguf") if name == "everything" else SHARED / name
    if not path.is_file():
        pytest.skip(f"needs the file {path}")
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {name: type(value) for name, value in ours.metadata.items()} == {n: type(v) for n, v in fields.items()}
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for found, expected in zip(ours.tensors.values(), theirs.tensors, strict=True):
        assert found.shape == tuple(expected.shape)
        assert found.tensor_type is expected.tensor_type
        assert (found.start, found.n_bytes, found.n_elements) == (
            expected.data_offset,
            expected.n_bytes,
            expected.n_elements,
        )
        weights = gguf.quants.dequantize(expected.data, expected.tensor_type)
        torch.testing.assert_close(ours.tensor(found.name), torch.from_numpy(weights.copy()), rtol=0, atol=0)


def test_what_is_by_hand_is_read(tmp_path: Path) -> None:
    whole = opened(file(), tmp_path)
    assert whole.metadata == {"general.architecture": "llama"}
    assert whole.tensor("a").tolist() == [[0.0] * 32] * 2
    assert opened(file(version=2), tmp_path).metadata == whole.metadata


def test_an_empty_array_is_read(tmp_path: Path) -> None:
    keys = (
        key("general.architecture", TEXT, text("llama")),
        key("none", ARRAY, struct.pack("<IQ", UINT32, 0)),
        key("silent", ARRAY, struct.pack("<IQ", TEXT, 0)),
    )
    metadata = opened(file(keys), tmp_path).metadata
    assert (metadata["none"], metadata["silent"]) == ([], [])


def test_tokens_are_read_without_a_call_for_each(tmp_path: Path) -> None:
    """As gguf has several, so that a large vocabulary takes it a dozen seconds."""

    def calls(count: int) -> int:
        words, scores = [f"token {number}" for number in range(count)], [-0.5 * number for number in range(count)]
        writer = open_writer(tmp_path / "m.gguf", "llama")
        writer.add_array("tokens", words)
        writer.add_array("scores", scores)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            whole = GGUFFile(tmp_path / "m.gguf")
        finally:
            sys.setprofile(None)
        assert (whole.metadata["tokens"], whole.metadata["scores"]) == (words, scores)
        return events.count("call")

    assert calls(5000) == calls(5)


DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "magic": (file(magic=b"GGML"), r"it begins with b'GGML' instead of b'GGUF'"),
    "version": (file(version=1), "it is of version 1, only 2 and 3 can be read"),
    "byte-order": (file(version=3 << 24), r"it is of version 50331648 of another byte order, only 2 and 3"),
    "keys": (file(counts=(1, 2**60)), r"ends at byte \d+, the file at"),
    "tensors": (file(counts=(2**60, 1), data=0, alignment=1), r"tensor 2 of .* ends at byte \d+, the file at"),
    "key-text": (file((key(b"\xff", BOOL, b"\1"),)), "key 1 of 1 is not UTF-8"),
    "key-length": (file((struct.pack("<Q", 2**63),)), rf"key 1 of 1 ends at byte {2**63 + 32}, the file at \d+"),
    "key-twice": (file((key("a", BOOL, b"\1"),) * 2), "it has the key a twice"),
    "value-type": (file((key("a", 13, b""),)), "a is of a type with the number 13, which is not known"),
    "value-bool": (file((key("a", BOOL, b"\2"),)), "a is neither true nor false"),
    "value-text": (file((key("a", TEXT, text(b"\xff")),)), "a is not UTF-8"),
    "array-type": (file((key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "a is of a type with the number 9, which"),
    "array-length": (file((key("a", ARRAY, struct.pack("<IQ", UINT32, 2**62)),)), r"a ends at byte \d+, the file at"),
    "texts-length": (file((key("a", ARRAY, struct.pack("<IQ", TEXT, 2**62)),)), r"a ends at byte \d+, the file at"),
    "alignment": (
        file((key("general.alignment", UINT32, struct.pack("<I", 48)),)),
        r"its general\.alignment is 48, expected a power of two",
    ),
    "alignment-zero": (
        file((key("general.alignment", UINT32, bytes(4)),)),
        r"its general\.alignment is 0, expected a power of two",
    ),
    "alignment-text": (file((key("general.alignment", TEXT, text("32")),)), r"its general\.alignment is '32'"),
    "tensor-name": (file(tensors=(tensor().replace(b"a", b"\xff"),)), "tensor 1 of 1 is not UTF-8"),
    "no-dimensions": (file(tensors=(tensor(shape=()),)), "a has 0 dimensions, expected 1 to 4"),
    "dimensions": (file(tensors=(tensor(shape=(32, 1, 1, 1, 1)),)), "a has 5 dimensions, expected 1 to 4"),
    "no-rows": (file(tensors=(tensor(shape=(32, 0)),)), r"a is of shape \[32, 0\], which is empty"),
    "huge": (file(tensors=(tensor(shape=(2**40, 2**40)),)), r"a ends at byte \d+, the file at \d+"),
    "tensor-type": (file(tensors=(tensor(kind=5),)), "a is of a type with the number 5, which is not known"),
    "blocks": (file(tensors=(tensor(shape=(33, 2)),)), "a has rows of 33 weights, and Q8_0 blocks of 32"),
    "tensor-twice": (file(tensors=(tensor(), tensor(start=96)), data=192), "it has the tensor a twice"),
    "place": (file(tensors=(tensor(start=32),), data=128), "the data of a begins at 32, expected 0"),
    "overlap": (file(tensors=(tensor(), tensor("b")), data=192), "the data of b begins at 0, expected 96"),
    "data": (file(data=67), r"a ends at byte \d+, the file at \d+"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.gguf is not a whole GGUF file: .*{message}"):
        opened(content, tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = everything(tmp_path / "m.gguf").read_bytes()
    start = max(tensor.start + tensor.n_bytes for tensor in GGUFFile(tmp_path / "m.gguf").tensors.values())
    metadata: Any = None
    for size in range(start):
        with pytest.raises(DamageError):
            metadata = read_header(content[:size])
    assert metadata is None
    assert read_header(content[:start])


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        GGUFFile(tmp_path)
