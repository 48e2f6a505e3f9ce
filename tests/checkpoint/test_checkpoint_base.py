import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from small_checkpoint import (
    BIG,
    DENSE,
    SHAPES,
    SPARSE_MODULE,
    UNCORRECTED,
    base_tensors,
    edit_header,
    edit_tensors,
    flip_bit,
    write_base,
)
from torch import Tensor

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shard(directory: Path, parts: list[dict[str, Tensor]]) -> None:
    """The same model in several files with an index."""
    (directory / SINGLE).unlink()
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]


# --- what it finds ---------------------------------------------------------------------------------------------------


def test_knows_its_tensors(base: Path) -> None:
    found, expected = BaseCheckpoint(base), base_tensors()
    assert set(found) == set(expected)
    assert f"{BIG}.weight_packed" in found
    assert f"{BIG}.weight" not in found
    assert found.files == [base / SINGLE]
    assert found.path_of(f"{BIG}.weight_packed") == base / SINGLE
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in expected.items())


def test_knows_its_modules_and_layers(base: Path) -> None:
    found = BaseCheckpoint(base)
    assert sorted(found.quantized_modules) == sorted(SHAPES)
    assert {module: found.weight_shape(module) for module in SHAPES} == SHAPES
    assert found.layers == 2
    assert set(found.module_tensors(BIG)) == {"weight_packed", "weight_scale", "weight_shape"}
    assert set(found.module_tensors(SPARSE_MODULE)) == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
    }
    info = found.info(f"{DENSE}.weight_packed")
    assert (info.dtype, info.shape) == ("I32", (64, 12))


@pytest.mark.parametrize("module", SHAPES)
def test_dequantizes_as_compressed_tensors_does(base: Path, module: str) -> None:
    state = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in base_tensors().items()
        if name.startswith(f"{module}.")
    }
    weights = QuantizationArgs(num_bits=4, symmetric="weight_zero_point" not in state, strategy="group", group_size=32)
    theirs = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=weights))
    found = BaseCheckpoint(base).dequantize(module)
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), theirs["weight"])


def test_a_sharded_model_is_the_same_model(base: Path) -> None:
    single = BaseCheckpoint(base)
    digest, fingerprint, weight = single.digest(), single.fingerprint(), single.dequantize(BIG)
    shard(base, halves(base_tensors()))
    found = BaseCheckpoint(base)
    assert [path.name for path in found.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert torch.equal(found.dequantize(BIG), weight)
    assert sorted(found.quantized_modules) == sorted(SHAPES)
    assert (found.digest(), found.fingerprint()) == (digest, fingerprint)


# --- the digest ------------------------------------------------------------------------------------------------------


def test_the_digest_depends_on_neither_order_nor_metadata(base: Path) -> None:
    before = BaseCheckpoint(base).digest()
    assert re.fullmatch("sha256:[0-9a-f]{64}", before)
    save_file(dict(reversed(list(base_tensors().items()))), base / SINGLE, metadata={"other": "metadata"})
    assert BaseCheckpoint(base).digest() == before
    shard(base, halves(base_tensors())[::-1])
    assert BaseCheckpoint(base).digest() == before


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm2.weight"] = tensors.pop("model.norm.weight")


def other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float16)  # the same bytes


def other_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(8, 8)


def removed(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def added(tensors: dict[str, Tensor]) -> None:
    tensors["model.empty"] = torch.empty(0)


def swapped(tensors: dict[str, Tensor]) -> None:
    first, second = f"{BIG}.weight_scale", f"{DENSE}.weight_scale"
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize("change", [renamed, other_dtype, other_shape, removed, added, swapped])
def test_digest_and_fingerprint_notice(base: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    before = BaseCheckpoint(base)
    digest, fingerprint = before.digest(), before.fingerprint()
    edit_tensors(base / SINGLE, change)
    assert BaseCheckpoint(base).digest() != digest
    assert BaseCheckpoint(base).fingerprint() != fingerprint


@pytest.mark.parametrize("tensor", sorted(base_tensors()))
@pytest.mark.parametrize("position", [0.0, 0.5137, 1.0])
def test_the_digest_notices_one_bit(base: Path, tensor: str, position: float) -> None:
    before = BaseCheckpoint(base).digest()
    flip_bit(base / SINGLE, tensor, position)
    assert BaseCheckpoint(base).digest() != before


def test_the_digest_of_a_tensor_is_the_sha256_of_its_bytes(base: Path) -> None:
    expected = {
        name: hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in base_tensors().items()
    }
    found = BaseCheckpoint(base)
    assert found.tensor_digests() == expected
    assert found.combine(expected) == found.digest()


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_the_fingerprint_notices_another_model_with_the_same_shapes(base: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "other", seed=1)
    assert BaseCheckpoint(tmp_path / "other").fingerprint() != BaseCheckpoint(base).fingerprint()


@pytest.mark.parametrize("module", SHAPES)
def test_the_fingerprint_notices_one_module_of_another_model(base: Path, module: str) -> None:
    before = BaseCheckpoint(base).fingerprint()
    name = f"{module}.weight_packed"
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({name: base_tensors(seed=1)[name]}))
    assert BaseCheckpoint(base).fingerprint() != before


@pytest.mark.parametrize("position", [0.0, 1.0])
def test_the_fingerprint_reads_the_first_and_last_byte_of_a_large_tensor(base: Path, position: float) -> None:
    before = BaseCheckpoint(base).fingerprint()
    flip_bit(base / SINGLE, f"{BIG}.weight_packed", position)
    assert BaseCheckpoint(base).fingerprint() != before


def test_the_fingerprint_reads_small_tensors_whole(base: Path) -> None:
    before = BaseCheckpoint(base).fingerprint()
    flip_bit(base / SINGLE, f"{DENSE}.weight_packed", 0.5137)
    assert BaseCheckpoint(base).fingerprint() != before


def test_the_fingerprint_samples_a_large_tensor(tmp_path: Path) -> None:
    """Half of 128 KiB is read: flipping every page in turn is noticed for 16 of the 32."""
    write_base(tmp_path / "base")
    path, tensor = tmp_path / "base" / SINGLE, f"{BIG}.weight_packed"
    before = BaseCheckpoint(path.parent).fingerprint()
    noticed = 0
    for page in range(32):
        position = (page * 4096 + 2048) / (2**17 - 1)
        flip_bit(path, tensor, position)
        noticed += BaseCheckpoint(path.parent).fingerprint() != before
        flip_bit(path, tensor, position)
    assert BaseCheckpoint(path.parent).fingerprint() == before
    assert 14 <= noticed <= 18


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))} has neither {SINGLE} nor {INDEX}"):
        BaseCheckpoint(tmp_path)


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere has neither"):
        BaseCheckpoint(tmp_path / "nowhere")


def test_a_shard_that_is_missing_is_named(base: Path) -> None:
    shard(base, halves(base_tensors()))
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        BaseCheckpoint(base)


def test_a_shard_that_is_truncated_is_named(base: Path) -> None:
    shard(base, halves(base_tensors()))
    path = base / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is truncated"):
        BaseCheckpoint(base)


def test_a_tensor_in_two_shards_is_named(base: Path) -> None:
    first, second = halves(base_tensors())
    shard(base, [first, {**second, "model.embed_tokens.weight": base_tensors()["model.embed_tokens.weight"]}])
    message = r"model.embed_tokens.weight is in both .*model-00001-of-00002.safetensors and .*model-00002-of-00002"
    with pytest.raises(CheckpointError, match=message):
        BaseCheckpoint(base)


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_named(base: Path) -> None:
    first, second = halves(base_tensors())
    shard(base, [first, second])
    path = base / "model-00002-of-00002.safetensors"
    missing = max(second)
    edit_tensors(path, lambda tensors: tensors.pop(missing))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: {re.escape(missing)} is missing"):
        BaseCheckpoint(base)


def test_two_sets_of_weights_in_one_directory_are_refused(base: Path) -> None:
    """Transformers loads model.safetensors, vLLM what the index names: neither may be what was verified."""
    single = (base / SINGLE).read_bytes()
    shard(base, halves(base_tensors(seed=1)))
    (base / SINGLE).write_bytes(single)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(base))} has both {SINGLE} and {INDEX}"):
        BaseCheckpoint(base)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", f"{INDEX} has no weight_map"),
        ('{"weight_map": {}}', f"{INDEX} has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', f"{INDEX} has no weight_map"),
        ('{"weight_map": {"a": 5}}', f"{INDEX}: a points to 5"),
        ('{"weight_map": {"a": null, "b": "x.safetensors"}}', f"{INDEX}: a points to None"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', f"{INDEX}: a points to '../other/model.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', f"{INDEX}: a points to '/etc/passwd'"),
        ("[]", f"{INDEX} is not a JSON object"),
        ("{", f"cannot read .*{INDEX}"),
    ],
)
def test_an_index_with_a_fault_is_named(base: Path, index: str, message: str) -> None:
    (base / SINGLE).unlink()
    (base / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        BaseCheckpoint(base)


@pytest.mark.parametrize("tensor", ["weight_scale", "weight_shape", "weight_packed"])
def test_a_module_without_one_of_its_tensors_is_refused(base: Path, tensor: str) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.pop(f"{DENSE}.{tensor}"))
    with pytest.raises(CheckpointError, match=re.escape(f"{base} has no tensor {DENSE}.{tensor}")):
        BaseCheckpoint(base).dequantize(DENSE)


def test_8_bit_codes_are_refused(base: Path) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({f"{DENSE}.weight_packed": torch.zeros(64, 24).int()}))
    message = rf"{SINGLE}: {re.escape(DENSE)}.weight_packed is I32 \[64, 24\], expected I32 \[64, 12\] for 4-bit"
    with pytest.raises(CheckpointError, match=message):
        BaseCheckpoint(base).dequantize(DENSE)


def test_codes_of_another_dtype_are_refused(base: Path) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({f"{DENSE}.weight_packed": torch.zeros(64, 12)}))
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: {re.escape(DENSE)}.weight_packed is F32 \[64, 12\]"):
        BaseCheckpoint(base).weight_shape(DENSE)


def test_groups_ordered_by_activation_are_refused(base: Path) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({f"{DENSE}.weight_g_idx": torch.zeros(96).int()}))
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: {re.escape(DENSE)} orders its groups .*actorder: static"):
        BaseCheckpoint(base).dequantize(DENSE)


@pytest.mark.parametrize(
    "shape",
    [
        torch.tensor(64),
        torch.tensor([64]),
        torch.tensor([2, 64, 96]),
        torch.tensor([[64], [96]]),
        torch.tensor([64.0, float("nan")]),
        torch.tensor([-64, -96]),
        torch.tensor([64, 0]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=str,
)
def test_a_weight_shape_that_is_no_matrix_is_refused(base: Path, shape: Tensor) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({f"{DENSE}.weight_shape": shape}))
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: {re.escape(DENSE)}.weight_"):
        BaseCheckpoint(base).dequantize(DENSE)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("weight_scale", torch.ones(64)),  # one axis
        ("weight_scale", torch.ones(1, 3)),  # would be spread over the rows
        ("weight_scale", torch.ones(32, 3)),
        ("weight_scale", torch.ones(64, 5)),  # does not divide 96
        ("weight_scale", torch.ones(64, 0)),
        ("weight_scale", torch.ones(64, 3).int()),
        ("weight_zero_point", torch.zeros(8, 1).int()),  # would be spread over the groups
        ("weight_zero_point", torch.zeros(7, 3).int()),
        ("weight_zero_point", torch.zeros(64, 3, dtype=torch.int8)),
    ],
    ids=lambda value: (
        f"{value.dtype}_{list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else value
    ),
)
def test_scales_and_zero_points_that_do_not_fit_are_refused(base: Path, tensor: str, value: Tensor) -> None:
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({f"{DENSE}.{tensor}": value}))
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: {re.escape(DENSE)}.{tensor} is "):
        BaseCheckpoint(base).dequantize(DENSE)


def test_a_tensor_that_is_not_there_is_named(base: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{base} has no tensor lm_head.weight")):
        BaseCheckpoint(base).tensor("lm_head.weight")


def test_a_dense_model_has_no_quantized_modules(random_llama: Path) -> None:
    found = BaseCheckpoint(random_llama)
    assert found.quantized_modules == []
    assert found.layers == 6
    expected = load_file(random_llama / SINGLE)
    assert set(found) == set(expected)


def test_a_header_that_claims_more_than_the_file_has_is_refused(base: Path) -> None:
    edit_header(base / SINGLE, lambda header: header.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=f"{SINGLE}: .* starts at byte|{SINGLE} is longer than its header says"):
        BaseCheckpoint(base)
    (base / SINGLE).write_bytes(struct.pack("<Q", 2**40))
    with pytest.raises(CheckpointError, match=f"{SINGLE} is not a safetensors file"):
        BaseCheckpoint(base)


def test_the_uncorrected_module_is_read_like_the_others(base: Path) -> None:
    assert BaseCheckpoint(base).dequantize(UNCORRECTED).shape == SHAPES[UNCORRECTED]
