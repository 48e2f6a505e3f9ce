"""The files are those of the safetensors library and of Transformers, byte for byte."""

import errno
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srd_modifier.checkpoint import base_writer
from srd_modifier.checkpoint.base_writer import _RANKS, INDEX_NAME, BaseLayout, BaseWriter, SafetensorsLayout
from srd_modifier.checkpoint.shards import DTYPES
from srd_modifier.checkpoint.writer import tensor_bytes
from srd_modifier.errors import CheckpointError

DTYPES_OF_FILES = list(_RANKS)
ODD_NAMES = [
    "größe.weight",
    'a "quoted" name',
    "back\\slash",
    "tab\tnew\nline\rfeed\fbell\x07back\x08",
    "\x00\x1f",
    "delete\x7f",
    "line\u2028separator",
    "emoji 🦙",
    "\u5168\u89d2",
    "/slash</script>",
    "",
    " ",
    "Z",
    "a",
    "é",
]


def fill(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of random bytes; of zeros and ones where not every byte is a value."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    data = bytearray(random.Random(seed).randbytes(count))
    if dtype == torch.bool:
        data = bytearray(value & 1 for value in data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def mixed(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every dtype, in no order."""
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (), (0,), (2, 0, 4), (1, 1, 1)]
    places = [(dtype, shape) for dtype in DTYPES_OF_FILES for shape in shapes]
    random.Random(seed).shuffle(places)
    return {f"tensor.{number * 7 % 100}": fill(*place, number) for number, place in enumerate(places)}


def layout_of(tensors: dict[str, Tensor]) -> base_writer.Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], *, buffers: Sequence[str] = ()) -> list[Path]:
    """Write tensors in a random order, each in a few pieces."""
    folder.mkdir(exist_ok=True)
    writer = BaseWriter(folder, layout_of(tensors), buffers=buffers)
    names = list(tensors)
    random.Random(0).shuffle(names)
    for name in names:
        data = tensor_bytes(tensors[name])
        digest = writer.write(name, [data[: len(data) // 3], data[len(data) // 3 :]])
        assert digest == hashlib.sha256(data).hexdigest()
        assert writer.holds(name, digest)
    writer.flush(tensors)
    return writer.finish()


def check_as_saved(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "expected.safetensors", metadata={"format": "pt"})
    assert write(folder / "out", tensors) == [folder / "out" / "model.safetensors"]
    assert (folder / "out" / "model.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()


# one file


def test_every_dtype_that_we_read_has_its_rank() -> None:
    assert set(_RANKS) == set(DTYPES.values())


@pytest.mark.parametrize("dtype", DTYPES_OF_FILES, ids=str)
def test_a_file_of_one_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    check_as_saved(tmp_path, {name: fill(dtype, (3, 5), number) for number, name in enumerate("zayb")})


@pytest.mark.parametrize("seed", range(5))
def test_a_file_of_all_dtypes(seed: int, tmp_path: Path) -> None:
    check_as_saved(tmp_path, mixed(seed))


@pytest.mark.parametrize("pair", range(1, len(DTYPES_OF_FILES)))
def test_two_dtypes_in_both_orders(pair: int, tmp_path: Path) -> None:
    """The library has an order between dtypes of the same width, too."""
    first, second = DTYPES_OF_FILES[pair - 1 : pair + 1]
    for number, (a, b) in enumerate([(first, second), (second, first)]):
        check_as_saved(tmp_path / str(number), {"a": fill(a, (5,), 0), "b": fill(b, (5,), 1)})


def test_odd_names(tmp_path: Path) -> None:
    check_as_saved(tmp_path, {name: fill(torch.int16, (3,), number) for number, name in enumerate(ODD_NAMES)})


@pytest.mark.parametrize("length", range(1, 10))
def test_headers_of_any_length(length: int, tmp_path: Path) -> None:
    """They are filled up to a whole number of words."""
    check_as_saved(tmp_path, {"n" * length: fill(torch.float32, (3,), 0)})


def test_only_empty_tensors(tmp_path: Path) -> None:
    check_as_saved(tmp_path, {"a": torch.empty(0), "b": torch.empty(3, 0, dtype=torch.int64)})


_SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
_PLACES = st.tuples(st.sampled_from(DTYPES_OF_FILES), _SHAPES)
# no half of a surrogate pair, which is no text; and not the name of the header's own entry
_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(_NAMES, _PLACES, min_size=1, max_size=8))
def test_any_tensors(tmp_path_factory: pytest.TempPathFactory, places: dict[str, Any]) -> None:
    check_as_saved(
        tmp_path_factory.mktemp("any"),
        {name: fill(*place, number) for number, (name, place) in enumerate(places.items())},
    )


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"größe": 'a "b"'}])
def test_headers_with_other_metadata(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = mixed()
    save_file(tensors, tmp_path / "expected.safetensors", metadata=metadata)
    layout = SafetensorsLayout(layout_of(tensors), metadata=metadata)
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert expected.startswith(layout.header)
    assert len(expected) == layout.size
    for name, (start, end) in layout.places.items():
        assert expected[start:end] == bytes(tensor_bytes(tensors[name]))


# several files


class Tensors(nn.Module):
    """Linear modules, buffers, and one large tensor among them."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(12):
            self.add_module(f"layer{number}", nn.Linear(20, 30 + number, dtype=torch.bfloat16))
        self.register_buffer("table", torch.arange(40))
        self.large = nn.Parameter(torch.randn(300, 40))


def save_as_transformers(folder: Path, model: nn.Module, size: str) -> None:
    """A model saved by `save_pretrained`."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Whole(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            for name, child in model.named_children():
                self.add_module(name, child)
            self.table, self.large = nn.Buffer(model.table), model.large

    Whole().save_pretrained(folder, max_shard_size=size)


def load_order(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors as the copy above has them: modules first, then its own."""
    own = {**dict(model.named_parameters(recurse=False)), **dict(model.named_buffers(recurse=False))}
    nested = [(name, tensor) for name, tensor in model.state_dict().items() if name not in own]
    return [*own.items(), *nested]


@pytest.mark.parametrize("size", ["2KB", "5KB", "20KB", "60KB", "1GB"])
def test_files_and_index_are_those_of_transformers(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_writer, "MAX_FILE", size)
    model = Tensors()
    save_as_transformers(tmp_path / "expected", model, size)
    tensors = {name: tensor.detach() for name, tensor in load_order(model)}
    paths = write(tmp_path / "out", tensors, buffers=["table"])
    expected = {path.name: path for path in (tmp_path / "expected").glob("model*")}
    assert {path.name for path in paths} == set(expected)
    assert (INDEX_NAME in expected) == (size != "1GB") == (len(expected) > 1)
    for path in paths:
        assert path.read_bytes() == expected[path.name].read_bytes()


def test_one_file_has_no_index() -> None:
    assert BaseLayout(layout_of(mixed())).index is None


def test_an_index_is_written_with_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_writer, "MAX_FILE", 100)
    tensors = mixed()
    paths = write(tmp_path, tensors)
    assert len(paths) > 3
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(tensors)
    for name, file in index["weight_map"].items():
        found = load_file(tmp_path / file)[name]
        assert bytes(tensor_bytes(found)) == bytes(tensor_bytes(tensors[name]))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())


# going on


@pytest.mark.parametrize("size", ["20GB", 100])
@pytest.mark.parametrize("written", [0, 1, 20, 71])
def test_a_writer_goes_on_where_another_stopped(
    written: int, size: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_writer, "MAX_FILE", size)
    tensors = mixed()
    expected = {path.name: path.read_bytes() for path in write(tmp_path / "expected", tensors)}
    (tmp_path / "out").mkdir()
    first = BaseWriter(tmp_path / "out", layout_of(tensors))
    digests = {name: first.write(name, [tensor_bytes(tensors[name])]) for name in list(tensors)[:written]}
    first.close()
    second = BaseWriter(tmp_path / "out", layout_of(tensors), keep=True)
    assert all(second.holds(name, digest) for name, digest in digests.items())
    for name in list(tensors)[written:]:
        second.write(name, [tensor_bytes(tensors[name])])
    assert {path.name: path.read_bytes() for path in second.finish()} == expected


def test_finishing_twice_over_gives_the_same(tmp_path: Path) -> None:
    """As after a kill between the header and the end."""
    tensors = mixed()
    before = write(tmp_path, tensors)[0].read_bytes()
    writer = BaseWriter(tmp_path, layout_of(tensors), keep=True)
    assert all(writer.holds(name, hashlib.sha256(tensor_bytes(t)).hexdigest()) for name, t in tensors.items())
    assert writer.finish()[0].read_bytes() == before


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    tensors = {"a": fill(torch.int32, (50,), 0), "b": fill(torch.int32, (50,), 1)}
    writer = BaseWriter(tmp_path, layout_of(tensors))
    digests = {name: writer.write(name, [tensor_bytes(tensor)]) for name, tensor in tensors.items()}
    place = SafetensorsLayout(layout_of(tensors), metadata={"format": "pt"}).places["b"][0]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(bytes([tensor_bytes(tensors["b"])[0] ^ 128]))
    assert writer.holds("a", digests["a"])
    assert not writer.holds("b", digests["b"])
    assert not writer.holds("a", digests["b"])


def test_without_keep_nothing_is_left_of_another(tmp_path: Path) -> None:
    tensors = {"a": fill(torch.int32, (50,), 0)}
    write(tmp_path, tensors)
    writer = BaseWriter(tmp_path, layout_of(tensors))
    assert not writer.holds("a", hashlib.sha256(tensor_bytes(tensors["a"])).hexdigest())


# a disk that is full


@pytest.mark.parametrize("file", [0, 3])
def test_no_room_is_noticed_at_the_start(file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, reserve = [], os.posix_fallocate

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) > file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*args)

    monkeypatch.setattr(base_writer, "MAX_FILE", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(
        CheckpointError, match=r"^cannot reserve \d+ bytes for the W4 model in .*: No space left on dev"
    ):
        BaseWriter(tmp_path, layout_of(mixed()))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_disk_that_fills_up_later_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = mixed()
    writer = BaseWriter(tmp_path, layout_of(tensors))
    monkeypatch.setattr(os, "pwrite", full)
    expected = f"^cannot write {tmp_path}/model.safetensors: No space left on device$"
    name = next(name for name, tensor in tensors.items() if tensor.numel())
    with pytest.raises(CheckpointError, match=expected):
        writer.write(name, [tensor_bytes(tensors[name])])
    with pytest.raises(CheckpointError, match=expected):
        writer.finish()
    writer.close()
