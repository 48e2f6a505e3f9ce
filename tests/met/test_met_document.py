import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from rtn import write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import flip_bit

from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.met import Policy, build_met, encode_met, read_met

SIZES = {"F32": 4, "BF16": 2, "I64": 8, "I32": 4, "I8": 1}
SPLIT = ["early"] * 2 + ["factual"] * 2 + ["reasoning"] * 3 + ["governance"]  # of eight layers


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor of a file, by the safetensors library."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a dict
            tensor = file.get_slice(name)
            found[name] = SIZES[tensor.get_dtype()] * math.prod(tensor.get_shape())
    return found


def header_bytes(path: Path) -> int:
    (length,) = struct.unpack("<Q", path.open("rb").read(8))
    return 8 + length


def by_chunk(tensors: dict[str, int]) -> dict[str, int]:
    """Bytes by chunk of a model of eight layers; `pinned` is outside."""
    total = dict.fromkeys([*SPLIT, "pinned"], 0)
    for name, size in tensors.items():
        parts = name.split(".")
        total[SPLIT[int(parts[2])] if parts[1] == "layers" else "pinned"] += size
    return total


def figures(met: dict[str, Any], part: str, pinned: str) -> dict[str, int]:
    return {name: chunk[part] for name, chunk in met["chunks"].items()} | {"pinned": met["pinned"][pinned]}


def test_a_dense_model_is_measured(tiny_llama):
    met = build_met(tiny_llama)
    weights = tiny_llama / "model.safetensors"
    assert list(met)[:3] == ["format", "version", "measured"]
    assert (met["format"], met["version"], met["measured"]) == ("srd-met", 1, True)
    assert met["source"] == {
        "kind": "checkpoint",
        "files": {"model.safetensors": weights.stat().st_size},
        "assumed": None,
    }
    assert met["model"] == {"architecture": "LlamaForCausalLM", "layers": 8, "experts": None}
    assert met["layers"] == SPLIT
    assert {name: (chunk["layers"], chunk["depth"]) for name, chunk in met["chunks"].items()} == {
        "early": ([0, 1], [0.0, 0.2]),
        "factual": ([2, 3], [0.2, 0.4]),
        "reasoning": ([4, 5, 6], [0.4, 0.77]),
        "governance": ([7], [0.77, 1.0]),
    }
    assert figures(met, "base_bytes", "bytes") == by_chunk(tensor_bytes(weights))
    assert set(figures(met, "residual_bytes", "residual_bytes").values()) == {0}
    assert met["pinned"]["tensors"] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert met["files"]["header_bytes"] == header_bytes(weights)
    assert met["files"]["total_bytes"] == weights.stat().st_size


def test_a_checkpoint_is_measured_with_its_residual(dense_checkpoint):
    met = build_met(dense_checkpoint)
    base = dense_checkpoint / "model.safetensors"
    index = dense_checkpoint / "srd" / "residual.safetensors.index.json"
    (shard,) = (dense_checkpoint / "srd").glob("residual-*.safetensors")
    assert met["source"]["files"] == {
        "model.safetensors": base.stat().st_size,
        f"srd/{shard.name}": shard.stat().st_size,
        f"srd/{index.name}": index.stat().st_size,
    }
    assert figures(met, "base_bytes", "bytes") == by_chunk(tensor_bytes(base))
    assert figures(met, "residual_bytes", "residual_bytes") == by_chunk(tensor_bytes(shard))
    files = met["files"]
    assert files["header_bytes"] == header_bytes(base) + header_bytes(shard) + index.stat().st_size
    assert files["base_bytes"] == sum(tensor_bytes(base).values())
    assert files["residual_bytes"] == sum(tensor_bytes(shard).values()) > 0
    on_disk = sum(path.stat().st_size for path in (base, shard, index))
    assert files["base_bytes"] + files["residual_bytes"] + files["header_bytes"] == files["total_bytes"] == on_disk


def test_the_budgets_are_what_an_intent_takes(dense_checkpoint):
    met = build_met(dense_checkpoint, storage_speed=500e6)
    residual = by_chunk(tensor_bytes(next((dense_checkpoint / "srd").glob("residual-*.safetensors"))))
    base = sum(tensor_bytes(dense_checkpoint / "model.safetensors").values())
    assert met["storage"] == {"bytes_per_second": 500_000_000}
    for intent, chunks in Policy.default().intents.items():
        loaded = sum(residual[chunk] for chunk in chunks)
        budget = met["budgets"][intent]
        assert met["hydration"][intent] == list(chunks)
        assert budget["residual_bytes"] == loaded
        assert budget["memory_bytes"] == budget["active_bytes_per_token"] == base + loaded
        assert budget["load_seconds"] == pytest.approx((base + loaded) / 500e6, abs=1e-6)
        assert budget["hydrate_seconds"] == pytest.approx(loaded / 500e6, abs=1e-6)
    assert met["budgets"]["INFORM"]["residual_bytes"] < met["budgets"]["REFUSE"]["residual_bytes"]
    assert met["budgets"]["HARM"]["memory_bytes"] == met["files"]["base_bytes"] + met["files"]["residual_bytes"]


def test_only_files_with_weights_count(dense_checkpoint, tmp_path):
    copy = Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))
    expected = encode_met(build_met(copy))
    (copy / "met.json").write_bytes(expected)
    (copy / "README.md").write_text("words")
    save_file({}, copy / "srd" / "importance.safetensors")
    assert encode_met(build_met(copy)) == expected == encode_met(build_met(dense_checkpoint))


def test_a_base_in_two_files_is_counted_with_its_index(tiny_llama, tmp_path):
    tensors = load_file(tiny_llama / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tiny_llama / "config.json", tmp_path)
    met, single = build_met(tmp_path), build_met(tiny_llama)
    assert met["chunks"] == single["chunks"]
    assert set(met["source"]["files"]) == {*files, "model.safetensors.index.json"}
    assert met["files"]["total_bytes"] == sum(
        path.stat().st_size for path in tmp_path.iterdir() if path.name != "config.json"
    )


def test_a_residual_outside_the_layers_belongs_to_no_intent(random_llama, tmp_path):
    checkpoint = write_checkpoint(random_llama, tmp_path / "srd", quantized=r"_proj$|^lm_head$")
    met = build_met(checkpoint)
    head = 4096 * 64 + 4096 * 2  # codes, and a scale of bfloat16 for each row of 64 columns
    assert met["pinned"]["residual_bytes"] == head
    assert {"lm_head.weight_packed", "lm_head.weight_scale", "lm_head.weight_shape"} < set(met["pinned"]["tensors"])
    assert met["budgets"]["HARM"]["residual_bytes"] == met["files"]["residual_bytes"] - head


def test_a_custom_policy(dense_checkpoint):
    met = build_met(dense_checkpoint, policy=Policy({"AUDIT": ("reasoning",), "PLAIN": ()}))
    assert met["hydration"] == {"AUDIT": ["reasoning"], "PLAIN": []}
    assert met["budgets"]["AUDIT"]["residual_bytes"] == met["chunks"]["reasoning"]["residual_bytes"] > 0
    assert met["budgets"]["PLAIN"]["residual_bytes"] == met["budgets"]["PLAIN"]["hydrate_seconds"] == 0
    assert met["budgets"]["PLAIN"]["memory_bytes"] == met["files"]["base_bytes"]


def test_what_is_written_is_read_again(dense_checkpoint, tmp_path):
    met = build_met(dense_checkpoint)
    path = tmp_path / "met.json"
    path.write_bytes(encode_met(met))
    assert read_met(path) == met
    assert str(dense_checkpoint) not in path.read_text()
    met["pinned"]["bytes"] += 1
    path.write_bytes(encode_met(met))
    with pytest.raises(CheckpointError, match=r"met\.json: files\.base_bytes is \d+, expected \d+ from the other"):
        read_met(path)


def test_a_policy_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"met\.json is missing"):
        read_met(tmp_path / "met.json")


@pytest.mark.parametrize("speed", [0, 0.5, -1, math.inf, math.nan, 2**63])
def test_a_speed_out_of_range_is_refused(speed, tiny_llama):
    with pytest.raises(ConfigError, match=r"storage speed is .*, expected a byte per second or more"):
        build_met(tiny_llama, storage_speed=speed)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="none: there is no such directory or GGUF file"):
        build_met(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        build_met(tmp_path)


def test_a_model_without_layers_has_no_chunks(tiny_llama, tmp_path):
    tensors = load_file(tiny_llama / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers" not in name}, tmp_path / "model.safetensors"
    )
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no decoder layers that its tensors' names tell"):
        build_met(tmp_path)


def test_a_residual_of_another_base_is_refused(dense_checkpoint, tmp_path):
    copy = Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))
    flip_bit(copy / "model.safetensors", "model.layers.0.self_attn.k_proj.weight_scale")
    with pytest.raises(CheckpointError, match="belongs to another base"):
        build_met(copy)
