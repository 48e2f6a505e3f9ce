"""Every way for a checkpoint to be wrong: each is refused, by file and module, and none gives other weights."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint import (
    BIG,
    CORRECTED,
    DEFAULT,
    DENSE,
    FIRST,
    INDEX,
    SECOND,
    SPARSE_MODULE,
    UNCORRECTED,
    base_tensors,
    edit_header,
    edit_json,
    edit_records,
    edit_tensors,
    flip_bit,
    named_in_the_error,
    read_header,
    residuals,
    safetensors_bytes,
)
from torch import Tensor

from srd_modifier.checkpoint.config import IMPORTANCE
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError

OTHER = "OTHER"  # where the checkpoint of another model is put


@dataclass(frozen=True)
class Fault:
    """Something done to a checkpoint, and what is said about it."""

    name: str
    apply: Callable[[Path], Any]
    message: str


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda values: values["srd_config"].update(changes))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / INDEX, change)


def records(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_records(directory / file, change)


def tensors(file: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory / file, change)


def header(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_header(directory / file, change)


def cut(file: str, length: int) -> Callable[[Path], None]:
    """All but the last `-length` bytes, or the first `length`."""

    def apply(directory: Path) -> None:
        (directory / file).write_bytes((directory / file).read_bytes()[:length])

    return apply


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for change in changes:
            change(directory)

    return apply


def transposed(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[name] = found[name].reshape(found[name].shape[::-1])

    return change


def recast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    """Other dtype, the same bytes and shape."""

    def change(found: dict[str, Tensor]) -> None:
        found[name] = found[name].view(dtype)

    return change


def other_sidecar(directory: Path) -> None:
    shutil.rmtree(directory / "srd")
    shutil.copytree(directory.parent / OTHER / "srd", directory / "srd")


def other_shards(directory: Path) -> None:
    for file in (FIRST, SECOND):
        shutil.copy(directory.parent / OTHER / file, directory / file)


def other_base(directory: Path) -> None:
    shutil.copy(directory.parent / OTHER / "model.safetensors", directory / "model.safetensors")


def other_config(directory: Path) -> None:
    shutil.copy(directory.parent / OTHER / "config.json", directory / "config.json")


def left_over(directory: Path) -> None:
    shutil.copy(directory / FIRST, directory / "srd" / "residual-00001-of-00001.safetensors")


def swapped_files(directory: Path) -> None:
    first = (directory / FIRST).read_bytes()
    shutil.move(directory / SECOND, directory / FIRST)
    (directory / SECOND).write_bytes(first)


def in_config_only(directory: Path) -> None:
    """Config, index and shard agree on a module that the base does not have."""
    renamed = {DENSE: "model.layers.7.mlp.up_proj"}

    def rename(text: str) -> str:
        return text.replace(DENSE, renamed[DENSE])

    for file in ("config.json", INDEX):
        (directory / file).write_text(rename((directory / file).read_text()))
    shard_header, data = read_header(directory / SECOND)
    (directory / SECOND).write_bytes(safetensors_bytes(rename(json.dumps(shard_header)).encode(), data))


def base_is_dense(directory: Path) -> None:
    def change(found: dict[str, Tensor]) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            del found[f"{DENSE}.{suffix}"]
        found[f"{DENSE}.weight"] = torch.zeros(64, 96)

    edit_tensors(directory / "model.safetensors", change)


D8, SCALE, MASK = f"{DENSE}.weight_d8", f"{DENSE}.weight_d8_scale", f"{SPARSE_MODULE}.weight_d8_mask"
SHARD_1, SHARD_2, INDEX_FILE = (Path(file).name for file in (FIRST, SECOND, INDEX))

FAULTS = [
    # the files
    Fault("shard_truncated", cut(FIRST, -1), f"{SHARD_1} is truncated"),
    Fault("shard_truncated_in_its_header", cut(SECOND, 100), f"{SHARD_2} is truncated"),
    Fault("shard_empty", cut(SECOND, 0), f"{SHARD_2} is truncated"),
    Fault("shard_missing", lambda directory: (directory / SECOND).unlink(), f"{SHARD_2} is missing"),
    Fault("shards_swapped", swapped_files, rf"{SHARD_1}: {re.escape(DENSE)}\S* is a duplicate, the index .* {SHARD_2}"),
    Fault("shard_left_over", left_over, "residual-00001-of-00001.safetensors is not in the index"),
    Fault("index_missing", lambda directory: (directory / INDEX).unlink(), f"{INDEX_FILE} is missing"),
    Fault("index_truncated", cut(INDEX, 100), f"cannot read .*{INDEX_FILE}"),
    Fault("folder_missing", lambda directory: shutil.rmtree(directory / "srd"), f"{INDEX_FILE} is missing"),
    Fault("config_missing", lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
    Fault(
        "base_missing", lambda directory: (directory / "model.safetensors").unlink(), "has neither model.safetensors"
    ),
    Fault("base_truncated", cut("model.safetensors", -1), "model.safetensors is truncated"),
    # the tensors
    Fault(
        "shape_transposed",
        tensors(SECOND, transposed(D8)),
        rf"{SHARD_2}: {D8} is I8 \[96, 64\], expected I8 \[64, 96\]",
    ),
    Fault(
        "scale_transposed",
        tensors(SECOND, transposed(SCALE)),
        rf"{SHARD_2}: {SCALE} is BF16 \[3, 64\], expected BF16 \[64, 3\]",
    ),
    Fault(
        "mask_transposed",
        tensors(SECOND, transposed(MASK)),
        rf"{SHARD_2}: {MASK} is U8 \[8, 40\], expected U8 \[40, 8\]",
    ),
    Fault(
        "dtype_of_codes",
        tensors(SECOND, recast(D8, torch.uint8)),
        rf"{SHARD_2}: {D8} is U8 \[64, 96\], expected I8 \[64, 96\]",
    ),
    Fault(
        "dtype_of_scale",
        tensors(SECOND, recast(SCALE, torch.float16)),
        rf"{SHARD_2}: {SCALE} is F16 \[64, 3\], expected BF16 \[64, 3\]",
    ),
    Fault("tensor_missing_in_shard", tensors(SECOND, lambda found: found.pop(D8)), f"{SHARD_2}: {D8} is missing"),
    Fault("mask_missing_in_shard", tensors(SECOND, lambda found: found.pop(MASK)), f"{SHARD_2}: {MASK} is missing"),
    Fault(
        "tensor_missing_in_index", index(lambda values: values["weight_map"].pop(D8)), f"{INDEX_FILE}: {D8} is missing"
    ),
    Fault(
        "scale_missing_in_index",
        index(lambda values: values["weight_map"].pop(SCALE)),
        f"{INDEX_FILE}: {SCALE} is missing",
    ),
    Fault("mask_missing_in_index", index(lambda values: values["weight_map"].pop(MASK)), f"{SHARD_2}: {MASK} is extra"),
    Fault(
        "mask_missing_everywhere",
        both(tensors(SECOND, lambda found: found.pop(MASK)), index(lambda values: values["weight_map"].pop(MASK))),
        f"{SHARD_2}: {MASK} is missing",
    ),
    Fault(
        "tensor_extra_in_shard",
        tensors(SECOND, lambda found: found.update({f"{UNCORRECTED}.weight_d8": torch.zeros(2, dtype=torch.int8)})),
        f"{SHARD_2}: {re.escape(UNCORRECTED)}.weight_d8 is extra",
    ),
    Fault(
        "tensor_extra_in_index",
        index(lambda values: values["weight_map"].update({f"{UNCORRECTED}.weight_d8": SHARD_2})),
        f"{SHARD_2}: {re.escape(UNCORRECTED)}.weight_d8 is missing, the index promises it",
    ),
    Fault(
        "tensor_extra_in_both",
        both(
            index(lambda values: values["weight_map"].update({f"{UNCORRECTED}.weight_d8": SHARD_2})),
            tensors(SECOND, lambda found: found.update({f"{UNCORRECTED}.weight_d8": torch.zeros(2, dtype=torch.int8)})),
        ),
        f"{INDEX_FILE}: {re.escape(UNCORRECTED)}.weight_d8 is extra, srd_config does not cover it",
    ),
    Fault(
        "mask_of_a_dense_module",
        both(
            index(lambda values: values["weight_map"].update({f"{DENSE}.weight_d8_mask": SHARD_2})),
            tensors(SECOND, lambda found: found.update({f"{DENSE}.weight_d8_mask": torch.zeros(64, 12).byte()})),
        ),
        f"{INDEX_FILE}: {re.escape(DENSE)}.weight_d8_mask is extra",
    ),
    Fault(
        "tensor_in_two_shards",
        tensors(FIRST, lambda found: found.update({D8: residuals()[DENSE].codes})),
        f"{SHARD_1}: {D8} is a duplicate, the index has it in {SHARD_2}",
    ),
    Fault(
        "index_points_to_the_other_shard",
        index(lambda values: values["weight_map"].update({D8: SHARD_1})),
        f"{SHARD_2}: {D8} is a duplicate, the index has it in {SHARD_1}|{SHARD_1}: {D8} is missing",
    ),
    # another base
    Fault(
        "sidecar_of_another_base", both(other_sidecar, other_config), "belongs to another base .fingerprint differs."
    ),
    Fault("base_of_another_sidecar", other_base, "model.safetensors: the sidecar in .*srd belongs to another base"),
    Fault("config_of_another_base", other_config, "model.safetensors: the sidecar in .*srd belongs to another base"),
    Fault(
        "base_changed_where_it_is_sampled",
        lambda directory: flip_bit(directory / "model.safetensors", f"{BIG}.weight_packed"),
        "model.safetensors: the sidecar in .*srd belongs to another base",
    ),
    Fault(
        "base_scale_changed",
        lambda directory: flip_bit(directory / "model.safetensors", f"{UNCORRECTED}.weight_scale", 0.5),
        "model.safetensors: the sidecar in .*srd belongs to another base",
    ),
    Fault(
        "base_embedding_changed",
        lambda directory: flip_bit(directory / "model.safetensors", "model.embed_tokens.weight", 0.5),
        "model.safetensors: the sidecar in .*srd belongs to another base",
    ),
    Fault("base_of_other_shapes", base_is_dense, f"{re.escape(DENSE)} has a residual but no weight_packed in the base"),
    Fault(
        "base_shape_changed",
        tensors(
            "model.safetensors",
            lambda found: found.update(
                {
                    f"{DENSE}.weight_packed": torch.zeros(96, 8).int(),
                    f"{DENSE}.weight_shape": torch.tensor([96, 64]),
                    f"{DENSE}.weight_scale": torch.ones(96, 2).bfloat16(),
                }
            ),
        ),
        rf"model.safetensors: {re.escape(DENSE)} is \[96, 64\], its residual is for \[64, 96\]",
    ),
    Fault("module_not_in_the_base", in_config_only, "model.layers.7.mlp.up_proj has a residual but no weight_packed"),
    # config.json
    Fault("version_in_config", config(version=3), "config.json: srd_config.version is 3, this srd-modifier reads 2"),
    Fault("alpha_out_of_range", config(alpha=1.5), "config.json: alpha is 1.5, expected a number from 0 to 1"),
    Fault("layer_alpha_out_of_range", config(layer_alphas={DENSE: 2}), f"config.json: layer_alphas.'{DENSE}'. is 2"),
    Fault("unknown_field_in_config", config(colour="blue"), "config.json: unknown residual setting 'colour'"),
    Fault("sidecar_outside", config(sidecar="../OTHER/" + INDEX), "config.json: srd_config.sidecar is '../OTHER/"),
    Fault(
        "module_in_config_only",
        config(modules=[*CORRECTED, UNCORRECTED]),
        f"{INDEX_FILE}: {re.escape(UNCORRECTED)}.weight_d8 is missing, srd_config promises it",
    ),
    Fault("module_not_in_config", config(modules=[BIG, SPARSE_MODULE]), f"{INDEX_FILE}: {D8} is extra"),
    Fault("module_twice_in_config", config(modules=[*CORRECTED, DENSE]), f"config.json: .*{re.escape(DENSE)}"),
    Fault("seed_changed", config(seed=4), rf"{INDEX_FILE}: {re.escape(BIG)} is ResidualFormat\(.*seed=3\).*seed=4"),
    Fault("rounding_changed", config(rounding="nearest"), rf"{INDEX_FILE}: {re.escape(BIG)} is .*rounding='dithered'"),
    Fault("bits_changed", config(bits=4), rf"{INDEX_FILE}: {re.escape(BIG)} is ResidualFormat\(bits=8.*bits=4"),
    Fault("group_size_changed", config(group_size=64), rf"{INDEX_FILE}: {re.escape(BIG)} is .*group_size=32"),
    Fault("scale_dtype_changed", config(scale_dtype="float32"), rf"{INDEX_FILE}: {re.escape(BIG)} is .*bfloat16"),
    # the index
    Fault(
        "version_in_index", index(lambda values: values["metadata"].update(version=3)), f"{INDEX_FILE}: version is 3"
    ),
    Fault(
        "index_without_weight_map", index(lambda values: values.pop("weight_map")), f"{INDEX_FILE} has no weight_map"
    ),
    Fault(
        "index_without_metadata", index(lambda values: values.pop("metadata")), f"{INDEX_FILE} has no weight_map or no"
    ),
    Fault(
        "index_leads_out_of_the_folder",
        index(lambda values: values["weight_map"].update({D8: f"../../{OTHER}/{SECOND}"})),
        f"{INDEX_FILE}: {D8} points to '../../OTHER/srd/{SHARD_2}', expected a file name in the same folder",
    ),
    Fault(
        "index_points_to_a_number",
        index(lambda values: values["weight_map"].update({D8: 5})),
        f"{INDEX_FILE}: {D8} points to 5, expected a file name",
    ),
    Fault(
        "index_points_to_a_folder",
        index(lambda values: values["weight_map"].update({D8: ".."})),
        f"{INDEX_FILE}: {D8} points to '..'|cannot read .*[.][.]",
    ),
    Fault(
        "format_in_index_only",
        index(lambda values: values["metadata"]["formats"].update({DENSE: residual_format(bits=4)})),
        f"{INDEX_FILE}: {re.escape(DENSE)} is ResidualFormat.bits=8.*expected ResidualFormat.bits=4",
    ),
    Fault(
        "format_missing_in_index",
        index(lambda values: values["metadata"]["formats"].clear()),
        f"{INDEX_FILE}: {re.escape(SPARSE_MODULE)} is ResidualFormat.bits=4.*expected ResidualFormat.bits=8",
    ),
    Fault(
        "format_malformed_in_index",
        index(lambda values: values["metadata"]["formats"].update({DENSE: {"bits": 7}})),
        f"{INDEX_FILE}: the format of {re.escape(DENSE)} is malformed: bits is 7",
    ),
    Fault(
        "formats_a_list_in_index",
        index(lambda values: values["metadata"].update(formats=[])),
        f"{INDEX_FILE}: the format of {re.escape(BIG)} is malformed",
    ),
    # the metadata of a shard
    Fault("version_in_shard", records(SECOND, lambda srd: srd.update(version=3)), f"{SHARD_2}: version is 3"),
    Fault("no_metadata", header(SECOND, lambda values: values.pop("__metadata__")), f"{SHARD_2} has no srd metadata"),
    Fault(
        "no_srd_in_metadata",
        header(SECOND, lambda values: values["__metadata__"].pop("srd")),
        f"{SHARD_2} has no srd metadata",
    ),
    Fault(
        "metadata_not_json",
        header(SECOND, lambda values: values["__metadata__"].update(srd="{")),
        f"{SHARD_2} has no srd metadata",
    ),
    Fault(
        "metadata_a_list",
        header(SECOND, lambda values: values["__metadata__"].update(srd="[]")),
        f"{SHARD_2} has no srd metadata",
    ),
    Fault(
        "metadata_nested_without_end",
        header(SECOND, lambda values: values["__metadata__"].update(srd="[" * 200_000)),
        f"{SHARD_2} has no srd metadata",
    ),
    *(
        Fault(
            f"modules_{json.dumps(value)}", records(SECOND, lambda srd, value=value: srd.update(modules=value)), SHARD_2
        )
        for value in (None, 5, "text", ["a", "b"], [["a", "b"]])
    ),
    Fault(
        "record_missing",
        records(SECOND, lambda srd: srd["modules"].pop(DENSE)),
        f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed",
    ),
    Fault(
        "record_extra",
        records(SECOND, lambda srd: srd["modules"].update({UNCORRECTED: srd["modules"][DENSE]})),
        f"{SHARD_2}: .*{re.escape(UNCORRECTED)}",
    ),
    Fault(
        "record_in_two_shards",
        lambda directory: edit_records(
            directory / FIRST, lambda srd: srd["modules"].update({DENSE: srd["modules"][BIG]})
        ),
        f"{SHARD_1}: .*{re.escape(DENSE)}",
    ),
    *(
        Fault(
            f"record_{json.dumps(value)}",
            records(SECOND, lambda srd, value=value: srd["modules"].update({DENSE: value})),
            f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed",
        )
        for value in (None, 5, "text", [], {})
    ),
    *(
        Fault(
            f"shape_{json.dumps(value)}",
            records(SECOND, lambda srd, value=value: srd["modules"][DENSE].update(shape=value)),
            f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed",
        )
        for value in (None, 64, [64], [64, 96, 1], ["64", "96"], [64.0, 96], [-64, 96], [0, 96], [64, 0], [64, 1e400])
    ),
    Fault(
        "shape_of_another_module",
        records(SECOND, lambda srd: srd["modules"][DENSE].update(shape=[96, 64])),
        rf"{SHARD_2}: {D8} is I8 \[64, 96\], expected I8 \[96, 64\]",
    ),
    Fault(
        "format_in_shard",
        records(SECOND, lambda srd: srd["modules"][DENSE]["format"].update(seed=4)),
        rf"{INDEX_FILE}: {re.escape(DENSE)} is ResidualFormat\(.*seed=4\) in its shard, expected .*seed=3",
    ),
    Fault(
        "format_field_missing_in_shard",
        records(SECOND, lambda srd: srd["modules"][DENSE]["format"].pop("seed")),
        f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed|seed=0",
    ),
    *(
        Fault(
            f"format_{json.dumps(value)}",
            records(SECOND, lambda srd, value=value: srd["modules"][DENSE].update(format=value)),
            f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed",
        )
        for value in (None, 5, "text", ["bits"], {"bits": 7}, {"colour": "blue"})
    ),
    *(
        Fault(
            f"digests_{json.dumps(value)}",
            records(SECOND, lambda srd, value=value: srd["modules"][DENSE].update(sha256=value)),
            f"{SHARD_2}: the metadata of {re.escape(DENSE)} is malformed",
        )
        for value in (None, 5, "text", [], {}, {"weight_d8": "0"})
    ),
]

HIDDEN = [
    *(
        Fault(
            f"{tensor.rpartition('.')[2]}_of_{module}_{position}",
            lambda directory, file=file, tensor=tensor, position=position: flip_bit(directory / file, tensor, position),
            f"{Path(file).name}: {re.escape(tensor)} does not match its digest; the file is damaged",
        )
        for file, module, tensor in (
            (FIRST, "the_first", f"{BIG}.weight_d8"),
            (FIRST, "the_first", f"{BIG}.weight_d8_scale"),
            (SECOND, "the_dense", D8),
            (SECOND, "the_dense", SCALE),
            (SECOND, "the_sparse", f"{SPARSE_MODULE}.weight_d8"),
            (SECOND, "the_sparse", f"{SPARSE_MODULE}.weight_d8_scale"),
            (SECOND, "the_sparse", MASK),
        )
        for position in (0.0, 0.5, 1.0)
    ),
    Fault(
        "tensors_of_another_model",
        tensors(SECOND, lambda found: found.update({D8: residuals(1)[DENSE].codes})),
        f"{SHARD_2}: {D8} does not match its digest",
    ),
    Fault(
        "sidecar_of_another_base_under_this_config",
        other_sidecar,
        f"{INDEX_FILE}: the sidecar belongs to another base",
    ),
    Fault(
        "shards_of_another_base_under_this_index",
        other_shards,
        f"{INDEX_FILE}: the residual files are not those of this index",
    ),
    Fault(
        "digest_changed",
        records(SECOND, lambda srd: srd["modules"][DENSE]["sha256"].update(weight_d8="0" * 64)),
        f"{SHARD_2}: {D8} does not match its digest|{INDEX_FILE}: the residual files are not those of this index",
    ),
]


def prepared(checkpoint: Path, other: Path) -> Path:
    shutil.copytree(other, checkpoint.parent / OTHER)
    return checkpoint


def residual_format(**changes: Any) -> dict[str, Any]:
    return DEFAULT.to_dict() | changes


# --- refused when the checkpoint is opened ---------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=attrgetter("name"))
def test_a_fault_is_refused_by_name(fault: Fault, small: Path, other_template: Path) -> None:
    fault.apply(prepared(small, other_template))
    with pytest.raises(CheckpointError, match=fault.message) as caught:
        Sidecar.open(small)
    assert str(small) in str(caught.value)


def test_the_names_of_the_faults_are_unique() -> None:
    names = [fault.name for fault in FAULTS + HIDDEN]
    assert len(set(names)) == len(names) > 90


# --- refused when the bytes are read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", HIDDEN, ids=attrgetter("name"))
def test_damage_in_the_bytes_is_found_on_reading(fault: Fault, small: Path, other_template: Path) -> None:
    fault.apply(prepared(small, other_template))
    with pytest.raises(CheckpointError, match=fault.message):
        read_all(small)


@pytest.mark.parametrize("fault", HIDDEN, ids=attrgetter("name"))
def test_damage_in_the_bytes_is_found_by_verify(fault: Fault, small: Path, other_template: Path) -> None:
    fault.apply(prepared(small, other_template))
    with pytest.raises(CheckpointError, match=fault.message):
        Sidecar.open(small).verify()


def read_all(directory: Path) -> dict[str, Tensor]:
    sidecar = Sidecar.open(directory)
    return {module: sidecar.correct(module, 1.0) for module in sidecar.entries}


def test_a_damaged_module_does_not_hide_the_others(small: Path) -> None:
    flip_bit(small / SECOND, D8)
    sidecar = Sidecar.open(small)
    sidecar.correct(BIG, 1.0)
    sidecar.correct(SPARSE_MODULE, 1.0)
    with pytest.raises(CheckpointError, match=f"{SHARD_2}: {D8}"):
        sidecar.correct(DENSE, 1.0)


@pytest.mark.parametrize("position", [0.0, 0.5137, 1.0])
@pytest.mark.parametrize("tensor", sorted(base_tensors()))
def test_verify_notices_one_bit_of_the_base(small: Path, tensor: str, position: float) -> None:
    """What the fingerprint does not sample is noticed only here."""
    flip_bit(small / "model.safetensors", tensor, position)
    message = r"do not match srd_config.base_digest|another base|weight_packed is I32|its residual is for"
    with pytest.raises(CheckpointError, match=message):
        Sidecar.open(small).verify()


def test_verify_notices_a_base_that_the_fingerprint_misses(small: Path) -> None:
    tensor = f"{BIG}.weight_packed"
    for page in range(32):
        position = (page * 4096 + 2048) / (2**17 - 1)
        flip_bit(small / "model.safetensors", tensor, position)
        try:
            sidecar = Sidecar.open(small)
        except CheckpointError:
            flip_bit(small / "model.safetensors", tensor, position)
            continue
        message = r"model.safetensors: the base weights do not match srd_config.base_digest; they were changed after"
        with pytest.raises(CheckpointError, match=message):
            sidecar.verify()
        return
    pytest.fail("the fingerprint samples every page")


def test_verify_compares_the_digest_in_config_json(small: Path) -> None:
    config(base_digest="sha256:" + "0" * 64)(small)
    with pytest.raises(CheckpointError, match=r"do not match srd_config.base_digest|belongs to another base"):
        Sidecar.open(small).verify()


# --- anything at all -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return result


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_is_changed_is_refused_or_changes_nothing(
    small_template: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value of srd_config, the index or a shard's metadata, replaced by any other or removed.

    Nothing but CheckpointError may come out, and what opens must give the weights that were saved; the dial
    and the full digest, which only `verify` compares, are the exceptions.
    """
    file = data.draw(st.sampled_from(["config.json", INDEX, SECOND, "records"]), label="file")
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    directory.mkdir()
    for path in sorted(small_template.rglob("*")):
        if path.is_file():
            (directory / path.relative_to(small_template)).parent.mkdir(exist_ok=True)
            (directory / path.relative_to(small_template)).symlink_to(path)
    real = SECOND if file == "records" else file
    if file in ("config.json", INDEX):
        before, raw = json.loads((small_template / real).read_text()), b""
        part = before["srd_config"] if file == "config.json" else before
    else:
        before, raw = read_header(small_template / real)
        part = json.loads(before["__metadata__"]["srd"]) if file == "records" else before
    place = data.draw(st.sampled_from([place for place in places(part) if place]), label="place")
    remove, new = data.draw(st.booleans(), label="remove"), data.draw(JSON, label="new")
    after = replaced(part, place, new, remove=remove)
    (directory / real).unlink()
    if file == "config.json":
        (directory / real).write_text(json.dumps(before | {"srd_config": after}))
    elif file == INDEX:
        (directory / real).write_text(json.dumps(after))
    elif file == SECOND:
        (directory / real).write_bytes(safetensors_bytes(after, raw))
    else:
        metadata = before["__metadata__"] | {"srd": json.dumps(after)}
        (directory / real).write_bytes(safetensors_bytes(before | {"__metadata__": metadata}, raw))
    found: dict[str, Tensor] | None = None
    with named_in_the_error(directory):
        found = read_all(directory)
    if found is None:
        return
    expected = read_all(small_template)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[module], expected[module]) for module in expected)
    if place[0] != "base_digest":
        Sidecar.open(directory).verify()


def test_importance_is_not_needed_to_load(small: Path) -> None:
    (small / IMPORTANCE).unlink()
    Sidecar.open(small).verify()
