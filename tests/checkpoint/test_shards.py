"""Our reader against the safetensors library, and every way for a file to be malformed."""

import json
import math
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import FIRST, INDEX, SECOND, named_in_the_error, read_header, safetensors_bytes
from torch import Tensor

from srd_modifier.checkpoint.shards import DTYPE_NAMES, DTYPES, Shard
from srd_modifier.errors import CheckpointError

SHAPE_CHOICES = ((), (1,), (0,), (7,), (3, 5), (2, 0, 3), (1, 1, 1), (33, 3))


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A tensor of any bits of a dtype, NaN and infinity included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat_left, flat_right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(flat_left, flat_right)


# --- what is well formed is read alike -------------------------------------------------------------------------------


def test_reads_a_file_that_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "as it is"})
    shard = Shard.open(tmp_path / "x.safetensors")
    assert shard.metadata == {"format": "pt", "note": "as it is"}
    assert set(shard.tensors) == {"a", "b"}
    assert (shard.tensors["a"].dtype, shard.tensors["a"].shape) == ("I64", (2, 3))
    assert all(same_bits(shard.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPES)
def test_reads_every_dtype_in_every_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{number}": sample(dtype, shape, number) for number, shape in enumerate(SHAPE_CHOICES)}
    save_file(tensors, tmp_path / "x.safetensors")
    shard = Shard.open(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert shard.tensors[name].dtype == DTYPE_NAMES[dtype]
        assert same_bits(shard.tensor(name), tensor)
        assert bytes(shard.view(name)) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 99)),
        max_size=6,
    )
)
def test_reads_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, Any]) -> None:
    tensors = {name: sample(DTYPES[dtype], tuple(shape), seed) for name, (dtype, shape, seed) in contents.items()}
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    save_file(tensors, path)
    shard, theirs = Shard.open(path), load_file(path)
    assert set(shard.tensors) == set(theirs)
    assert all(same_bits(shard.tensor(name), theirs[name]) for name in theirs)


def test_reads_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = {"a": entry(0, 1, [1], "U8"), "b": entry(1, 9, [2], "F32")}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(json.dumps(header).ljust(160).encode(), b"\7" + values.numpy().tobytes()))
    shard = Shard.open(path)
    assert shard.tensors["b"].start % 4 == 1
    assert torch.equal(shard.tensor("b"), values)
    assert torch.equal(load_file(path)["b"], values)


def test_reads_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert Shard.open(tmp_path / "x.safetensors").tensors == {}


def test_a_tensor_outlives_its_shard_and_its_file(tmp_path: Path) -> None:
    expected = torch.arange(1000)
    save_file({"a": expected}, tmp_path / "x.safetensors")
    found = Shard.open(tmp_path / "x.safetensors").tensor("a")
    (tmp_path / "x.safetensors").unlink()
    assert torch.equal(found, expected)


def test_a_file_can_be_read_only(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    path.chmod(0o400)
    before = path.read_bytes()
    Shard.open(path).tensor("a").fill_(1)
    assert path.read_bytes() == before


def test_a_dtype_that_is_not_ours_is_refused_only_when_it_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, dtype=torch.uint16), "b": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    shard = Shard.open(tmp_path / "x.safetensors")
    assert torch.equal(shard.tensor("b"), tensors["b"])
    assert len(shard.view("a")) == 6
    with pytest.raises(CheckpointError, match=re.escape("x.safetensors: a has dtype U16")):
        shard.tensor("a")


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_safetensors_reads_the_files_we_write(small_template: Path, file: str) -> None:
    shard, theirs = Shard.open(small_template / file), load_file(small_template / file)
    with safe_open(small_template / file, framework="pt") as opened:
        assert opened.metadata() == shard.metadata
    assert set(shard.tensors) == set(theirs)
    assert all(same_bits(shard.tensor(name), theirs[name]) for name in theirs)


def test_every_tensor_we_write_is_aligned_and_in_the_index(small_template: Path) -> None:
    weight_map = json.loads((small_template / INDEX).read_text())["weight_map"]
    for file in (FIRST, SECOND):
        header, data = read_header(small_template / file)
        header.pop("__metadata__")
        data_start = (small_template / file).stat().st_size - len(data)
        for name, entry in header.items():
            assert (data_start + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0
            assert weight_map[name] == Path(file).name
    assert len(weight_map) == 7


# --- what is malformed is refused ------------------------------------------------------------------------------------


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@dataclass(frozen=True)
class Malformed:
    """A file's bytes, and what is said about them; `ours_alone` where the safetensors library says nothing."""

    name: str
    content: bytes
    message: str
    ours_alone: bool = False


EIGHT = bytes(8)
MALFORMED = [
    Malformed("empty", b"", "x.safetensors is truncated: 0 bytes"),
    Malformed("too_short", b"\1" * 7, "x.safetensors is truncated: 7 bytes"),
    Malformed(
        "header_beyond_the_file",
        (1000).to_bytes(8, "little") + b"{}",
        "x.safetensors is truncated: the header ends at byte 1008, the file at 10",
    ),
    Malformed(
        "header_over_the_limit",
        (100_000_001).to_bytes(8, "little") + b"{}",
        "x.safetensors is not a safetensors file: it claims a header of 100000001 bytes",
    ),
    Malformed(
        "another_file_type",
        b"GGUF\3\0\0\0" + bytes(64),
        "x.safetensors is not a safetensors file: it claims a header of 14064895815 bytes",
    ),
    Malformed("header_not_utf8", safetensors_bytes(b'{"\xff":1}'), "x.safetensors .* its header is not JSON"),
    Malformed("header_not_json", safetensors_bytes(b"{a: 1}"), "x.safetensors .* its header is not JSON"),
    Malformed("header_empty", safetensors_bytes(b""), "x.safetensors .* its header is not JSON"),
    Malformed("header_cut_off", safetensors_bytes(b'{"a":{"dtype"'), "x.safetensors .* its header is not JSON"),
    Malformed(
        "header_nested_without_end", safetensors_bytes(b"[" * 200_000), "x.safetensors .* its header is not JSON"
    ),
    Malformed(
        "header_number_without_end",
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"\0"),
        "x.safetensors .* its header is not JSON",
    ),
    Malformed("header_a_list", safetensors_bytes(b"[]"), "x.safetensors .* its header is not a JSON object"),
    Malformed(
        "duplicate_key",
        safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
        "x.safetensors: the header has 'a' twice",
        ours_alone=True,
    ),
    Malformed("metadata_a_list", safetensors_bytes({"__metadata__": []}), "x.safetensors: .*__metadata__"),
    Malformed("metadata_not_strings", safetensors_bytes({"__metadata__": {"a": 1}}), "x.safetensors: .*__metadata__"),
    Malformed(
        "entry_not_an_object",
        safetensors_bytes({"a": 5}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "entry_without_dtype",
        safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "entry_without_shape",
        safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "entry_without_offsets",
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "three_offsets",
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "offset_a_string",
        safetensors_bytes({"a": entry("0", 8)}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "offset_a_fraction",
        safetensors_bytes({"a": entry(0, 8.0)}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "dtype_not_a_string",
        safetensors_bytes({"a": entry(dtype=["F32"])}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "shape_a_string",
        safetensors_bytes({"a": entry(shape="22")}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "shape_of_strings",
        safetensors_bytes({"a": entry(shape=["2", "1"])}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "shape_of_fractions",
        safetensors_bytes({"a": entry(shape=[2.0])}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "shape_negative",
        safetensors_bytes({"a": entry(shape=[-1, -2])}, EIGHT),
        "x.safetensors: the header entry of a is malformed",
    ),
    Malformed(
        "name_not_text",
        safetensors_bytes(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), EIGHT),
        "x.safetensors",
    ),
    Malformed(
        "hole_at_the_start",
        safetensors_bytes({"a": entry(4, 12)}, bytes(12)),
        r"x.safetensors: a starts at byte \d+, expected \d+",
    ),
    Malformed(
        "hole_between",
        safetensors_bytes({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
        r"x.safetensors: b starts at byte \d+, expected \d+",
    ),
    Malformed(
        "overlap",
        safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        r"x.safetensors: b starts at byte \d+, expected \d+",
    ),
    Malformed(
        "same_place_twice",
        safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
        r"x.safetensors: b starts at byte \d+, expected \d+",
    ),
    Malformed(
        "end_before_start",
        safetensors_bytes({"a": entry(0, 8), "b": entry(8, 4)}, EIGHT),
        r"x.safetensors: b starts at byte \d+",
    ),
    Malformed(
        "offset_negative",
        safetensors_bytes({"a": entry(-8, 0)}, b""),
        r"x.safetensors: (a starts at byte -?\d+, expected \d+|the header entry of a is malformed)",
    ),
    Malformed(
        "size_disagrees_with_shape",
        safetensors_bytes({"a": entry(0, 8, (3,))}, EIGHT),
        r"x.safetensors: a F32 \[3\] takes 12 bytes, the header gives it 8",
    ),
    Malformed(
        "truncated_data",
        safetensors_bytes({"a": entry()}, bytes(7)),
        r"x.safetensors is truncated: its tensors end at byte \d+, the file at \d+",
    ),
    Malformed(
        "trailing_bytes",
        safetensors_bytes({"a": entry()}, bytes(9)),
        r"x.safetensors is longer than its header says: its tensors end at byte \d+, the file at \d+",
    ),
]


@pytest.mark.parametrize("case", MALFORMED, ids=attrgetter("name"))
def test_a_malformed_file_is_refused_by_name(case: Malformed, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(case.content)
    with pytest.raises(CheckpointError, match=case.message) as caught:
        Shard.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", [case for case in MALFORMED if not case.ours_alone], ids=attrgetter("name"))
def test_safetensors_refuses_it_too(case: Malformed, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(case.content)
    with pytest.raises((SafetensorError, OSError, ValueError)):
        load_file(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'x.safetensors'} is missing")):
        Shard.open(tmp_path / "x.safetensors")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"cannot read {tmp_path}")):
        Shard.open(tmp_path)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_still_well_formed(
    small_template: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed anywhere: nothing but CheckpointError may come out, and what opens can be read."""
    content = bytearray((small_template / SECOND).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # most often in the length and the header, where the structure is
        last = data.draw(st.sampled_from([7, 2000, len(content) - 1]))
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(content)
    with named_in_the_error(path):
        shard = Shard.open(path)
        for name in shard.tensors:
            shard.tensor(name)
