from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.writer import tensor_bytes
from srd_modifier.streaming import originals as module
from srd_modifier.streaming.originals import Originals

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Block(nn.Module):
    """An embedding that is tied to the head, a Linear with a bias, and buffers of both kinds."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, dtype=dtype)
        self.proj = nn.Linear(6, 5, dtype=dtype)
        self.head = nn.Linear(6, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.scalar = nn.Parameter(torch.ones((), dtype=dtype))


TENSORS = {
    "embed.weight": torch.randn(7, 6, generator=torch.Generator().manual_seed(0)),
    "proj.weight": torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 300,
    "proj.bias": torch.randn(5, generator=torch.Generator().manual_seed(2)),
    "scalar": torch.tensor(0.3),
    "steps": torch.arange(3),
}


def make(folder: Path, stored: torch.dtype, wanted: torch.dtype, *, without: str = "") -> tuple[Originals, Block]:
    """Files in one dtype for a model in another."""
    tensors = {name: t.to(stored) if t.is_floating_point() else t for name, t in TENSORS.items() if name != without}
    save_file(tensors, folder / "model.safetensors")
    with torch.device("meta"):
        model = Block(wanted)
    return Originals(BaseCheckpoint(folder), model), model


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_tensors_have_the_dtype_of_the_model(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    originals, _ = make(tmp_path, stored, wanted)
    assert originals.missing == []
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
        assert torch.equal(originals.tensor(name), expected)
        assert originals.tensor(name).dtype == expected.dtype
        assert b"".join(originals.chunks(name)) == bytes(tensor_bytes(expected))


@pytest.mark.parametrize("block", [4, 12, 16, 1000])
def test_chunks_may_end_anywhere(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    originals, _ = make(tmp_path, torch.float32, torch.bfloat16)
    for name in ("proj.weight", "scalar"):
        assert b"".join(originals.chunks(name)) == bytes(tensor_bytes(originals.tensor(name)))
    assert len(list(originals.chunks("proj.weight"))) == -(-30 * 4 // block)


def test_a_tensor_without_entries_has_no_bytes(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.zeros(0, 4), "bias": torch.zeros(0, dtype=torch.float16)}, tmp_path / "model.safetensors"
    )
    model = nn.Linear(4, 0, device="meta", dtype=torch.float16)
    originals = Originals(BaseCheckpoint(tmp_path), model)
    assert [b"".join(originals.chunks(name)) for name in ("weight", "bias")] == [b"", b""]


def test_a_tied_tensor_is_found_by_both_names(tmp_path: Path) -> None:
    for name in ("embed.weight", "head.weight"):
        (tmp_path / name).mkdir()
        others = {other: tensor for other, tensor in TENSORS.items() if other != "embed.weight"}
        save_file({**others, name: TENSORS["embed.weight"]}, tmp_path / name / "model.safetensors")
        with torch.device("meta"):
            originals = Originals(BaseCheckpoint(tmp_path / name), Block(torch.float32))
        assert originals.missing == originals.doubled == []
        for alias in ("embed.weight", "head.weight"):
            assert torch.equal(originals.tensor(alias), TENSORS["embed.weight"])


def test_a_tied_tensor_that_is_stored_twice_is_told(tmp_path: Path) -> None:
    save_file({**TENSORS, "head.weight": torch.zeros(7, 6)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        originals = Originals(BaseCheckpoint(tmp_path), Block(torch.float32))
    assert originals.doubled == [("embed.weight", "head.weight")]
    assert not originals.tensor("head.weight").any()


@pytest.mark.parametrize("name", ["proj.bias", "steps", "scalar"])
def test_what_the_files_lack_is_missing(tmp_path: Path, name: str) -> None:
    assert make(tmp_path, torch.float32, torch.float32, without=name)[0].missing == [name]


def test_a_tied_tensor_is_missing_by_both_names(tmp_path: Path) -> None:
    originals, _ = make(tmp_path, torch.float32, torch.float32, without="embed.weight")
    assert originals.missing == ["embed.weight", "head.weight"]


def test_modules_are_present_for_a_while(tmp_path: Path) -> None:
    originals, model = make(tmp_path, torch.float32, torch.bfloat16)
    # as a quantizer's parameter, which no file has
    model.proj.weight_scale = nn.Parameter(torch.empty(5, 1, device="meta", dtype=torch.bfloat16), requires_grad=False)
    with originals.present([("proj", model.proj)]):
        assert torch.equal(model.proj.weight, TENSORS["proj.weight"].bfloat16())
        assert torch.equal(model.proj.bias, TENSORS["proj.bias"].bfloat16())
        assert not model.proj.weight_scale.any()
        assert model.embed.weight.is_meta
        assert model.head.weight is model.embed.weight
    assert all(tensor.is_meta for tensor in (model.proj.weight, model.proj.bias, model.proj.weight_scale))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.proj.parameters())


def test_the_root_has_tensors_too(tmp_path: Path) -> None:
    originals, model = make(tmp_path, torch.float32, torch.float32)
    with originals.present([("", model)]):
        assert model.scalar.item() == pytest.approx(0.3)
        assert torch.equal(model.steps, torch.arange(3))
        assert isinstance(model.scalar, nn.Parameter)
        assert "steps" in model._buffers
    assert model.scalar.is_meta
    assert model.steps.is_meta


def test_what_is_made_inside_is_put_away_too(tmp_path: Path) -> None:
    """Packing replaces the weight."""
    originals, model = make(tmp_path, torch.float32, torch.float32)
    with originals.present([("proj", model.proj)]):
        del model.proj.weight
        model.proj.weight_packed = nn.Parameter(torch.ones(5, 1, dtype=torch.int32), requires_grad=False)
    assert model.proj.weight_packed.is_meta
    assert model.proj.weight_packed.dtype == torch.int32


def test_an_error_inside_puts_them_away_too(tmp_path: Path) -> None:
    originals, model = make(tmp_path, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="midway"), originals.present([("proj", model.proj)]):
        raise RuntimeError("midway")
    assert model.proj.weight.is_meta


def test_the_files_are_not_written_to(tmp_path: Path) -> None:
    """A tensor shares the map's memory, which is private."""
    originals, model = make(tmp_path, torch.float32, torch.float32)
    before = (tmp_path / "model.safetensors").read_bytes()
    with originals.present([("proj", model.proj)]), torch.no_grad():
        model.proj.weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
