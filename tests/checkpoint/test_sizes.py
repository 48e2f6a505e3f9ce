"""Sizes against sums over the headers, which are read here and not by the package."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import (
    BIG,
    CORRECTED,
    DENSE,
    FIRST,
    SECOND,
    SHAPES,
    SPARSE_MODULE,
    UNCORRECTED,
    edit_json,
    read_header,
)

from srd_modifier.checkpoint.sizes import measure
from srd_modifier.errors import CheckpointError

BASE_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def tensor_sizes(path: Path) -> dict[str, int]:
    header, _ = read_header(path)
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def base_bytes(directory: Path, modules: list[str]) -> int:
    sizes = tensor_sizes(directory / "model.safetensors")
    return sum(sizes.get(f"{module}.{suffix}", 0) for module in modules for suffix in BASE_SUFFIXES)


def residual_bytes(directory: Path, modules: list[str] | tuple[str, ...]) -> int:
    sizes: dict[str, int] = {}
    for path in (directory / "srd").glob("residual*.safetensors"):
        sizes |= tensor_sizes(path)
    return sum(size for name, size in sizes.items() if name.rpartition(".")[0] in modules)


def residual_headers(directory: Path) -> int:
    paths = (directory / "srd").glob("residual*.safetensors")
    return sum(path.stat().st_size - len(read_header(path)[1]) for path in paths)


# --- the small checkpoint --------------------------------------------------------------------------------------------


def test_by_hand(small_template: Path) -> None:
    """The dense modules: 8 bits and a bfloat16 scale per 32; the sparse one: half of 4 bits, a scale and a mask."""
    weights = {module: math.prod(shape) for module, shape in SHAPES.items()}
    base = sum(count // 2 + count // 32 * 2 + 16 for count in weights.values())
    base += 40 // 8 * 2 * 4  # zero points of one module: 40 rows to a word of eight, 2 groups
    residual = sum(weights[module] + weights[module] // 32 * 2 for module in (BIG, DENSE))
    residual += weights[SPARSE_MODULE] // 2 // 2 + weights[SPARSE_MODULE] // 32 * 2 + weights[SPARSE_MODULE] // 8
    found = measure(small_template)
    assert found.quantized_weights == sum(weights.values())
    assert found.bits_per_weight == 8 * (base + residual) / sum(weights.values())
    header, _ = read_header(small_template / "model.safetensors")
    header.pop("__metadata__", None)
    dense = [entry["shape"] for name, entry in header.items() if name.rpartition(".")[0] not in SHAPES]
    assert dense
    assert found.total_weights == sum(weights.values()) + sum(map(math.prod, dense))
    files = [small_template / name for name in ("model.safetensors", FIRST, SECOND)]
    assert found.bytes_on_disk == sum(path.stat().st_size for path in files)
    assert found.total_bits_per_weight == 8 * found.bytes_on_disk / found.total_weights


@pytest.mark.parametrize(
    "corrected",
    [None, CORRECTED, [], [BIG], [DENSE], [SPARSE_MODULE], {BIG, SPARSE_MODULE}, (DENSE, SPARSE_MODULE)],
    ids=lambda value: str(value if value is None else sorted(value)),  # a set has another order in every process
)
def test_counts_the_modules_that_are_used(small_template: Path, corrected: Any) -> None:
    used = CORRECTED if corrected is None else tuple(corrected)
    found = measure(small_template, corrected=corrected)
    weights = sum(math.prod(shape) for shape in SHAPES.values())
    size = base_bytes(small_template, list(SHAPES)) + residual_bytes(small_template, used)
    assert found.bits_per_weight == 8 * size / weights
    assert found.quantized_weights == weights
    headers = residual_headers(small_template) if set(used) == set(CORRECTED) else 0
    file_size = (small_template / "model.safetensors").stat().st_size
    assert found.bytes_on_disk == file_size + residual_bytes(small_template, used) + headers


def test_takes_a_directory_by_its_name(small_template: Path) -> None:
    assert measure(str(small_template)) == measure(small_template)


def test_the_size_of_the_whole_is_that_of_its_files(small: Path) -> None:
    """Headers included; importance and sensitivity hold no weights and are not counted, and nor is the index."""
    files = [small / name for name in ("model.safetensors", FIRST, SECOND)]
    (small / "srd" / "sensitivity.json").write_text("{}")
    assert (small / "srd" / "importance.safetensors").is_file()
    assert measure(small).bytes_on_disk == sum(path.stat().st_size for path in files)


def test_modules_that_have_no_residual_do_not_count_as_used(small_template: Path) -> None:
    assert measure(small_template, corrected=list(SHAPES)) == measure(small_template)
    assert measure(small_template, corrected=[UNCORRECTED]) == measure(small_template, corrected=[])


def test_a_w4_model_has_no_residual(small: Path) -> None:
    before = measure(small, corrected=[])
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    assert measure(small) == before


def test_a_damaged_sidecar_is_not_measured(small: Path) -> None:
    (small / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(SECOND).name} is missing"):
        measure(small)
    assert measure(small, corrected=[]).quantized_weights > 0  # plain W4, asked for


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_dense_bfloat16_model_has_16_bits(random_llama: Path) -> None:
    found = measure(random_llama)
    assert found.bits_per_weight == 16.0
    assert found.bytes_on_disk == (random_llama / "model.safetensors").stat().st_size
    # of a layer: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64
    assert found.quantized_weights == 6 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


def test_w4_and_d8_of_groups_of_32(finished_checkpoint: Path) -> None:
    config = json.loads((finished_checkpoint / "config.json").read_text())
    modules = config["srd_config"]["modules"]
    weights = 6 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    shapes = 8 * 16 * len(modules) / weights  # two int64 for each module
    plain, corrected = measure(finished_checkpoint, corrected=[]), measure(finished_checkpoint)
    assert plain.bits_per_weight == pytest.approx(4 + 16 / 32 + shapes)
    assert corrected.bits_per_weight == pytest.approx(4 + 16 / 32 + 8 + 16 / 32 + shapes)
    assert plain.bits_per_weight == 8 * base_bytes(finished_checkpoint, modules) / weights
    assert corrected.quantized_weights == plain.quantized_weights == weights
    residual = residual_bytes(finished_checkpoint, modules) + residual_headers(finished_checkpoint)
    assert corrected.bytes_on_disk - plain.bytes_on_disk == residual
    assert plain.bytes_on_disk == (finished_checkpoint / "model.safetensors").stat().st_size


@pytest.mark.parametrize("layers", [{0}, {1, 4}, {0, 1, 2, 3, 4, 5}], ids=str)
def test_a_subset_of_the_corrected_modules(finished_checkpoint: Path, layers: set[int]) -> None:
    modules = json.loads((finished_checkpoint / "config.json").read_text())["srd_config"]["modules"]
    used = [module for module in modules if int(module.split(".")[2]) in layers]
    plain = measure(finished_checkpoint, corrected=[])
    found = measure(finished_checkpoint, corrected=used)
    assert found.bits_per_weight - plain.bits_per_weight == pytest.approx(8.5 * len(layers) / 6)


# --- others' formats -------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    def make(**tensors: torch.Tensor) -> Path:
        save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    return make


def test_a_dense_model_of_mixed_dtypes(dense: Callable[..., Path]) -> None:
    found = measure(
        dense(
            model__layers__0__a__weight=torch.zeros(4, 6),
            model__layers__0__b__weight=torch.zeros(8, 5).half(),
            model__layers__0__norm__weight=torch.zeros(6),
            model__embed__weight=torch.zeros(100, 6),
        )
    )
    assert found.quantized_weights == 24 + 40
    assert found.bits_per_weight == (24 * 32 + 40 * 16) / 64


def test_a_dense_model_with_a_dtype_that_is_not_ours(dense: Callable[..., Path]) -> None:
    """Its header says how large it is; its values are not needed."""
    found = measure(
        dense(
            model__layers__0__a__weight=torch.zeros(4, 6).to(torch.float8_e4m3fn),
            model__layers__0__b__weight=torch.zeros(4, 6, dtype=torch.uint16),
        )
    )
    assert found.bits_per_weight == (24 * 8 + 24 * 16) / 48


def test_a_model_without_matrices_has_no_bits_per_weight(dense: Callable[..., Path]) -> None:
    found = measure(dense(model__embed__weight=torch.zeros(3, 3)))
    assert found.quantized_weights == 0
    assert math.isnan(found.bits_per_weight)
