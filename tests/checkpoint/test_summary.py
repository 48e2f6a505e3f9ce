import json
import math
from pathlib import Path

import pytest
from small_checkpoint import (
    BIG,
    CORRECTED,
    DEFAULT,
    DENSE,
    FIRST,
    SECOND,
    SHAPES,
    SPARSE,
    SPARSE_MODULE,
    edit_json,
    edit_tensors,
    flip_bit,
    read_header,
)

from srd_modifier.checkpoint.config import IMPORTANCE
from srd_modifier.checkpoint.summary import ChunkSummary, summarize
from srd_modifier.errors import CheckpointError

WEIGHTS = sum(math.prod(shape) for shape in SHAPES.values())


def tensor_bytes(directory: Path, *files: str) -> dict[str, int]:
    """Bytes of every tensor, from the headers alone."""
    headers = [read_header(directory / file)[0] for file in files]
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__"
    }


def total(sizes: dict[str, int], *modules: str) -> int:
    return sum(size for name, size in sizes.items() if name.rpartition(".")[0] in modules)


def test_numbers_are_those_of_the_headers(small):
    base, residual = tensor_bytes(small, "model.safetensors"), tensor_bytes(small, FIRST, SECOND)
    summary = summarize(small)
    assert summary.directory == str(small)
    assert summary.quantized_modules == len(SHAPES)
    assert summary.corrected_modules == len(CORRECTED)
    assert summary.base_bytes == (small / "model.safetensors").stat().st_size
    assert summary.residual_bytes == sum(residual.values())
    assert summary.bits_per_weight_w4 == 8 * total(base, *SHAPES) / WEIGHTS
    assert summary.bits_per_weight == 8 * (total(base, *SHAPES) + sum(residual.values())) / WEIGHTS
    assert summary.has_importance


def test_chunks_hold_their_own_modules(small):
    """Two layers: the first is early, the second at half the depth."""
    residual = tensor_bytes(small, FIRST, SECOND)
    assert summarize(small).chunks == {
        "early": ChunkSummary(modules=2, of=2, bytes=total(residual, BIG, DENSE)),
        "reasoning": ChunkSummary(modules=1, of=2, bytes=total(residual, SPARSE_MODULE)),
    }


def test_formats_are_counted_by_their_label(small):
    assert summarize(small).formats == {DEFAULT.label: 2, SPARSE.label: 1}
    assert "4-bit, groups of 32, nearest, bfloat16 scales, 50% of the entries" in summarize(small).formats


def test_settings_are_those_of_the_config(small):
    edit_json(small / "config.json", lambda config: config["srd_config"].update(alpha=0.5, layer_alphas={"x": 0.25}))
    stored = json.loads((small / "config.json").read_text())["srd_config"]
    summary = summarize(small)
    assert summary.settings == {
        "alpha": 0.5,
        "layer_alphas": {"x": 0.25},
        "bits": 8,
        "group_size": 32,
        "rounding": "dithered",
        "density": 1.0,
        "scale_dtype": "bfloat16",
        "seed": 3,
    }
    assert summary.base_digest == stored["base_digest"]


def test_an_llm_compressor_checkpoint(finished_checkpoint):
    base = tensor_bytes(finished_checkpoint, "model.safetensors")
    residual = tensor_bytes(finished_checkpoint, "srd/residual-00001-of-00001.safetensors")
    summary = summarize(finished_checkpoint)
    weights = 6 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert (summary.quantized_modules, summary.corrected_modules) == (42, 42)
    assert summary.residual_bytes == sum(residual.values()) == weights + weights // 32 * 2
    assert summary.bits_per_weight - summary.bits_per_weight_w4 == pytest.approx(8 + 16 / 32)
    # 4-bit codes, 16-bit scales of 32 columns, and a shape of two int64 per module
    assert summary.bits_per_weight_w4 == pytest.approx(4 + 16 / 32 + 42 * 128 / weights)
    assert summary.base_bytes > sum(base.values())
    # of six layers two are early, the next starts at a third of the depth
    assert {name: (chunk.modules, chunk.of) for name, chunk in summary.chunks.items()} == {
        "early": (14, 14),
        "factual": (7, 7),
        "reasoning": (14, 14),
        "governance": (7, 7),
    }
    assert sum(chunk.bytes for chunk in summary.chunks.values()) == summary.residual_bytes
    assert not summary.has_importance


def test_modules_outside_the_layers_are_shown_as_such(small):
    def add(tensors):
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            tensors[f"model.extra.{suffix}"] = tensors[f"{DENSE}.{suffix}"].clone()

    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    edit_tensors(small / "model.safetensors", add)
    assert summarize(small).chunks["outside"] == ChunkSummary(modules=0, of=1, bytes=0)


def test_a_plain_w4_checkpoint_has_no_residual(small):
    with_residual = summarize(small)
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    summary = summarize(small)
    assert (summary.settings, summary.base_digest, summary.formats) == ({}, None, {})
    assert (summary.corrected_modules, summary.residual_bytes) == (0, 0)
    assert summary.quantized_modules == len(SHAPES)
    assert summary.base_bytes == with_residual.base_bytes
    assert summary.bits_per_weight == summary.bits_per_weight_w4 == with_residual.bits_per_weight_w4
    assert {name: (chunk.modules, chunk.bytes) for name, chunk in summary.chunks.items()} == {
        "early": (0, 0),
        "reasoning": (0, 0),
    }


def test_importance_is_noticed(small):
    (small / IMPORTANCE).unlink()
    assert not summarize(small).has_importance


def test_json_has_every_attribute_in_plain_values(small):
    values = json.loads(json.dumps(summarize(small).as_json(), allow_nan=False))
    assert values["chunks"]["early"] == {"modules": 2, "of": 2, "bytes": values["chunks"]["early"]["bytes"]}
    assert list(values) == [
        "directory",
        "settings",
        "base_digest",
        "quantized_modules",
        "corrected_modules",
        "formats",
        "chunks",
        "base_bytes",
        "residual_bytes",
        "bits_per_weight_w4",
        "bits_per_weight",
        "has_importance",
        "predicted_kld_w4",
        "predicted_kld",
    ]


def test_bytes_are_not_read(small):
    """What the headers say is enough; `srd inspect --verify` reads on."""
    flip_bit(small / FIRST, f"{BIG}.weight_d8", 0.5)
    assert summarize(small).corrected_modules == len(CORRECTED)


def test_a_damaged_sidecar_is_an_error(small):
    (small / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"residual-00002-of-00002\.safetensors"):
        summarize(small)


def test_a_directory_without_a_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        summarize(tmp_path)


def test_a_directory_without_weights_is_an_error(small):
    (small / "model.safetensors").unlink()
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        summarize(small)


def test_a_dense_model_has_no_bits_per_weight(tiny_llama):
    """And its JSON is JSON, which has no NaN."""
    summary = summarize(tiny_llama)
    assert (summary.quantized_modules, summary.corrected_modules, summary.chunks) == (0, 0, {})
    assert summary.base_bytes == (tiny_llama / "model.safetensors").stat().st_size
    assert (summary.bits_per_weight_w4, summary.bits_per_weight) == (None, None)
    json.dumps(summary.as_json(), allow_nan=False)
