from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srd_modifier.errors import CheckpointError
from srd_modifier.gguf import ggml
from srd_modifier.gguf.families.base import GGUFTensor, Piece
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.importance import importance_by_tensor, read_imatrix, write_imatrix

QUERY = "blk.0.attn_q.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"


def some_importance(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str | None = "imatrix") -> Path:
    """A file with these tensors, in llama.cpp's layout as far as `tensors` is."""
    import gguf

    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    if kind is not None:
        writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(name: str, sums: object, counts: object) -> dict[str, np.ndarray]:
    return {f"{name}.in_sum2": np.array(sums, np.float32), f"{name}.counts": np.array(counts, np.float32)}


# reading


def test_the_importance_is_the_mean_square_per_expert(tmp_path: Path) -> None:
    tensors = entry(QUERY, [[2, 4, 8]], [[2]]) | entry(EXPERTS, [[2, 4], [9, 3]], [[2], [3]])
    found = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", tensors))
    assert {name: values.tolist() for name, values in found.items()} == {QUERY: [1, 2, 4], EXPERTS: [[1, 2], [3, 1]]}
    assert all(values.dtype == torch.float32 for values in found.values())


def test_axes_of_one_may_be_left_out_as_ggml_writes_them(tmp_path: Path) -> None:
    found = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", entry(QUERY, [2, 4, 8], [2])))
    assert found[QUERY].tolist() == [1, 2, 4]


def test_an_expert_that_was_never_reached_counts_every_input_alike(tmp_path: Path) -> None:
    found = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", entry(EXPERTS, [[2, 4], [0, 0]], [[2], [0]])))
    assert found[EXPERTS].tolist() == [[1, 2], [1, 1]]


def test_an_input_that_was_always_zero_is_of_next_to_no_importance(tmp_path: Path) -> None:
    tensors = entry(QUERY, [[4, 0]], [[2]]) | entry(EXPERTS, [[0, 0]], [[2]])
    found = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", tensors))
    assert found[QUERY].tolist() == pytest.approx([2, 1e-6])
    assert found[EXPERTS].tolist() == [1, 1]


def test_importance_with_zeros_can_be_quantized_with(tmp_path: Path) -> None:
    sums = some_importance(512)
    sums[100:400] = 0  # the whole first half of the second block, and more
    importance = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", entry(QUERY, sums.numpy(), [1])))[QUERY]
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    error = ggml.dequantize(ggml.quantize(weight, GGMLType.Q4_K, importance), GGMLType.Q4_K) - weight
    assert error.square().mean() < 0.01


def test_only_what_belongs_to_the_model_is_returned(tmp_path: Path) -> None:
    tensors = entry(QUERY, [2, 4], [2]) | entry("output.weight", [1, 1, 1], [1]) | entry(EXPERTS, [1, 2, 3, 4], [1])
    tensors |= entry("token_embd.weight", [1], [1])
    path = write_gguf(tmp_path / "imatrix.gguf", tensors)
    found = read_imatrix(path, {QUERY: (7, 2), EXPERTS: (2, 5, 2), "token_embd.weight": (9, 2), "other": (3, 3)})
    assert {name: values.tolist() for name, values in found.items()} == {QUERY: [1, 2], EXPERTS: [[1, 2], [3, 4]]}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the imatrix has no entries"),
        ({"blk.0.attn_q.weight": np.ones(4, np.float32)}, "the imatrix has no entries"),
        ({f"{QUERY}.counts": np.ones(1, np.float32)}, r"attn_q.weight.counts without blk.0.attn_q.weight.in_sum2"),
        ({f"{QUERY}.in_sum2": np.ones(4, np.float32)}, r"attn_q.weight.in_sum2 without blk.0.attn_q.weight.counts"),
        (entry(QUERY, [1, 2, 3], [[1], [1]]), "attn_q.weight has 3 sums for 2 counts"),
        (entry(QUERY, [1, np.nan], [1]), "the sums or counts of blk.0.attn_q.weight have entries that are negative"),
        (entry(QUERY, [1, np.inf], [1]), "the sums or counts of blk.0.attn_q.weight have entries that are negative"),
        (entry(QUERY, [1, -1], [1]), "the sums or counts of blk.0.attn_q.weight have entries that are negative"),
        (entry(QUERY, [1, 1], [-1]), "the sums or counts of blk.0.attn_q.weight have entries that are negative"),
        (entry(QUERY, [1, 1], [np.nan]), "the sums or counts of blk.0.attn_q.weight have entries that are negative"),
        (
            {f"{QUERY}.in_sum2": np.ones(2, np.float16), f"{QUERY}.counts": np.ones(1, np.float32)},
            "the sums and counts of blk.0.attn_q.weight are not F32",
        ),
    ],
)
def test_a_malformed_imatrix_is_refused(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "imatrix.gguf", tensors)
    with pytest.raises(CheckpointError, match=rf"imatrix.gguf: .*{message}"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((QUERY, (7, 3)), r"attn_q.weight has importance of shape \[2\], the model's takes \[3\]; .* another model"),
        ((QUERY, (2, 7, 3)), r"attn_q.weight has importance of shape \[2\], the model's takes \[2, 3\]"),
        (("output.weight", (7, 2)), "has importance for no tensor of this model, but for blk.0.attn_q.weight"),
    ],
)
def test_an_imatrix_of_another_model_is_refused(
    tensor: tuple[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "imatrix.gguf", entry(QUERY, [2, 4], [2]))
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(path, dict([tensor]))


@pytest.mark.parametrize(("kind", "stated"), [("model", "'model'"), (None, "None")])
def test_a_gguf_file_of_another_kind_is_refused(kind: str | None, stated: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", {"x": np.ones(4, np.float32)}, kind)
    with pytest.raises(CheckpointError, match=rf"other.gguf is no imatrix, its general.type is {stated}"):
        read_imatrix(path)


def test_the_older_form_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(np.array([1, 5], np.int32).tobytes() + b"token" + np.array([1, 1, 0], np.int32).tobytes())
    with pytest.raises(CheckpointError, match=r"llama-imatrix --in-file OLD -o NEW.gguf makes one of the older form"):
        read_imatrix(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"imatrix.gguf: there is no such file"):
        read_imatrix(tmp_path / "imatrix.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {QUERY: some_importance(64)}, dataset="text")
    whole = path.read_bytes()
    end = whole.rstrip(b"\0")  # what follows is padding
    for length in range(0, len(end) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"imatrix.gguf is not (a whole GGUF file|an imatrix)"):
            read_imatrix(path)


# writing


def test_a_file_has_the_form_that_llama_cpp_documents(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "imatrix.gguf"
    importance = {QUERY: some_importance(64), EXPERTS: some_importance(4, 32)}
    write_imatrix(path, importance, dataset="wiki.test.raw", tokens=1024)
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.test.raw"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    # dimensions in ggml's order: inputs, then experts
    assert {tensor.name: tensor.shape.tolist() for tensor in reader.tensors} == {
        f"{QUERY}.in_sum2": [64, 1],
        f"{QUERY}.counts": [1, 1],
        f"{EXPERTS}.in_sum2": [32, 4],
        f"{EXPERTS}.counts": [1, 4],
    }
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(stored[f"{EXPERTS}.in_sum2"], importance[EXPERTS].numpy() * 1024)
    np.testing.assert_array_equal(stored[f"{EXPERTS}.counts"], np.full((4, 1), 1024, np.float32))


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple),
    tokens=st.integers(1, 2**20),
    seed=st.integers(0, 2**31),
)
def test_round_trip(shape: tuple[int, ...], tokens: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.gguf"
    values = some_importance(*shape, seed=seed).exp()
    write_imatrix(path, {EXPERTS: values}, dataset="", tokens=tokens)
    found = read_imatrix(path)[EXPERTS]
    torch.testing.assert_close(found.reshape(shape), values, rtol=3e-7, atol=0)


def test_the_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    importance = {QUERY: some_importance(64), EXPERTS: some_importance(4, 32)}
    write_imatrix(tmp_path / "a.gguf", importance, dataset="text", tokens=3)
    write_imatrix(tmp_path / "b.gguf", dict(reversed(importance.items())), dataset="text", tokens=3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({}, "expected importance over at least one token, got 0 tensors"),
        ({QUERY: torch.tensor([1.0, -1.0])}, "the importance of blk.0.attn_q.weight is not a vector or a matrix of"),
        ({QUERY: torch.tensor([1.0, torch.nan])}, "the importance of blk.0.attn_q.weight is not a vector or a matrix"),
        ({QUERY: torch.ones(1, 1, 1)}, "the importance of blk.0.attn_q.weight is not a vector or a matrix of"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    importance: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_imatrix(path, importance, dataset="text")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"imatrix.gguf": b"before"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*imatrix.gguf: No such file"):
        write_imatrix(tmp_path / "none" / "imatrix.gguf", {QUERY: some_importance(4)}, dataset="text")


# by module


def test_importance_goes_from_modules_to_tensors() -> None:
    tensors = [
        GGUFTensor("output_norm.weight", (4,), (Piece("model.norm.weight"),)),
        GGUFTensor("token_embd.weight", (9, 4), (Piece("model.embed_tokens.weight", "model.embed_tokens"),)),
        GGUFTensor(QUERY, (8, 4), (Piece("q_proj.weight", "q_proj"),)),
        GGUFTensor(EXPERTS, (3, 8, 2), tuple(Piece(f"experts.{i}.weight", f"experts.{i}") for i in range(3))),
        GGUFTensor("rope_freqs.weight", (2,), (), torch.ones(2)),
    ]
    by_module = {
        "q_proj": torch.tensor([1.0, 2, 3, 4], dtype=torch.float64),
        "experts.0": torch.tensor([1.0, 2]),
        "experts.2": torch.tensor([4.0, 0]),
        "of another tensor": torch.ones(7),
    }
    found = importance_by_tensor(tensors, by_module)
    assert list(found) == [QUERY, EXPERTS]
    assert found[QUERY].dtype == torch.float32
    assert found[QUERY].tolist() == [1, 2, 3, 4]
    # the second expert saw no token, the third no second input
    torch.testing.assert_close(found[EXPERTS], torch.tensor([[1.0, 2], [1, 1], [4, 2e-6]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2, 3], r"the importance of q_proj is of shape \(3,\), blk.0.attn_q.weight takes \[4\]"),
        ([1.0, 2, 3, -1], "the importance of q_proj has entries that are negative or not finite"),
        ([1.0, 2, 3, float("nan")], "the importance of q_proj has entries that are negative or not finite"),
    ],
)
def test_importance_that_does_not_fit_a_tensor_is_refused(values: list[float], message: str) -> None:
    tensor = GGUFTensor(QUERY, (8, 4), (Piece("q_proj.weight", "q_proj"),))
    with pytest.raises(CheckpointError, match=message):
        importance_by_tensor([tensor], {"q_proj": torch.tensor(values)})
