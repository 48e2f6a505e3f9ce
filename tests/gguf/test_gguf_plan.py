"""What a plan says of its file before there is one: sizes to the byte, and which tensors fall back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.metadata import CalibrationText, Method
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import head_bytes_of, plan_export, write_plan
from srd_modifier.gguf.writer import Entry, padded_bytes

DENSE = ("llama-biases", "gemma3", "gemma4-moe", "qwen3moe")


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("file_type", [FileType.F32, FileType.Q8_0, FileType.Q4_K_M])
@pytest.mark.parametrize("name", DENSE)
def test_head_and_padded_tensors_are_the_whole_file(
    name: str, file_type: FileType, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = plan_export(small_model(name), file_type=file_type)
    write_plan(plan, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    head = head_bytes_of(plan)
    assert head == min(tensor.data_offset for tensor in reader.tensors)
    expected = head
    for entry, tensor in zip(plan.entries, sorted(reader.tensors, key=lambda tensor: tensor.data_offset), strict=True):
        assert (entry.name, entry.nbytes, entry.weights) == (tensor.name, tensor.n_bytes, tensor.n_elements)
        assert tensor.data_offset == expected
        expected += padded_bytes(entry)
    assert (tmp_path / "a.gguf").stat().st_size == expected


@pytest.mark.usefixtures("numbered")
def test_the_head_is_as_long_whatever_is_chosen(small_model: Callable[[str], Path]) -> None:
    """The types, the importance and the calibration text are known only after the budget is spent."""
    plan = plan_export(small_model("tinyllama"))
    wider = {name: GGMLType.Q8_0 if own in (GGMLType.Q5_0, GGMLType.Q5_1) else own for name, own in plan.types.items()}
    text = CalibrationText(name="text.txt", sha256="0" * 64, tokens=12345)

    def size(**changes: Any) -> int:
        return head_bytes_of(replace(plan, **changes))

    assert wider != plan.types
    assert size() == size(types=wider)
    assert size() == size(file_type=FileType.Q8_0)
    assert size() == size(method=Method.OUTPUT_ERROR, calibration=text, importance={"a": torch.ones(3)})
    assert size() != size(mixture="5bpw" + " " * 1024)


def test_asking_for_the_size_of_the_head_leaves_nothing(
    small_model: Callable[[str], Path], numbered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert head_bytes_of(plan_export(small_model("tinyllama"))) > 0
    assert list(tmp_path.iterdir()) == []


@given(
    st.sampled_from(list(GGMLType)),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_padding_reaches_the_next_multiple_of_32(ggml_type: GGMLType, rows: int, blocks: int) -> None:
    entry = Entry("a", (rows, blocks * ggml_type.block_weights), ggml_type)
    padded = padded_bytes(entry)
    assert padded % 32 == 0
    assert 0 <= padded - entry.nbytes < 32


@pytest.mark.usefixtures("numbered")
def test_what_falls_back_is_told_by_what_it_should_have_been(small_model: Callable[[str], Path]) -> None:
    plan = plan_export(small_model("tinyllama"))  # rows of 64 and 96, of which no K-quant takes one
    assert plan.fallen_back["blk.1.attn_q.weight"] == (GGMLType.Q4_K, GGMLType.Q5_0)
    assert plan.fallen_back["output.weight"] == (GGMLType.Q6_K, GGMLType.Q8_0)
    assert plan.fallen_back.keys() == {name for name in plan.types if "norm" not in name}
    assert plan_export(small_model("tinyllama"), file_type=FileType.Q8_0).fallen_back == {}
