import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pack_quantized import w4
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import (
    BIG,
    FIRST,
    INDEX,
    SHAPES,
    SPARSE_MODULE,
    UNCORRECTED,
    base_tensors,
    digests,
    edit_json,
    edit_tensors,
    flip_bit,
)
from torch import Tensor

from srd_modifier.checkpoint.config import read_srd_config
from srd_modifier.checkpoint.merge import export_dense
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.transformers import load_corrected

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def residuals(directory: Path) -> dict[str, Tensor]:
    """Every residual in float64, of a sidecar of dense 8-bit residuals rounded to nearest."""
    tensors = {
        name: tensor
        for path in (directory / "srd").glob("res*.safetensors")
        for name, tensor in load_file(path).items()
    }
    modules = [name.removesuffix(".weight_d8") for name in tensors if name.endswith(".weight_d8")]
    return {
        module: tensors[f"{module}.weight_d8"]
        * tensors[f"{module}.weight_d8_scale"].double().repeat_interleave(32, dim=1)
        for module in modules
    }


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """`found` is `exact` rounded once to its dtype, from a value that float32 arithmetic may have moved a little."""
    tolerance = torch.finfo(found.dtype).eps / 2 + 2**-22
    assert bool(((found.double() - exact).abs() <= tolerance * exact.abs() + 1e-9).all())


# the weights


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_what_the_definition_says(finished_checkpoint, tmp_path, alpha, dtype):
    export_dense(finished_checkpoint, tmp_path / "dense", alpha=alpha, dtype=dtype)
    dense, base = (
        load_file(tmp_path / "dense" / "model.safetensors"),
        load_file(finished_checkpoint / "model.safetensors"),
    )
    for module, residual in residuals(finished_checkpoint).items():
        weight = dense.pop(f"{module}.weight")
        assert weight.dtype == dtype
        assert_rounded(weight, w4(base, module) + alpha * residual)
    rest = {name: tensor for name, tensor in base.items() if ".weight_" not in name}
    assert dense.keys() == rest.keys()
    assert all(torch.equal(tensor, rest[name]) and tensor.dtype == rest[name].dtype for name, tensor in dense.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dial",
    [{}, {"alpha": 0.25}, {"chunks": ["reasoning"]}, {"layer_alphas": {"re:.*down_proj": 0.5}}],
    ids=["whole", "alpha", "chunks", "layer-alphas"],
)
def test_weights_are_those_that_transformers_loads(finished_checkpoint, tmp_path, dial, dtype):
    export_dense(finished_checkpoint, tmp_path / "dense", dtype=dtype, **dial)
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    loaded = load_corrected(finished_checkpoint, dtype=dtype, **dial).state_dict()
    assert exported.keys() == loaded.keys()
    assert [name for name, tensor in loaded.items() if not torch.equal(exported[name].to(dtype), tensor)] == []


def test_the_checkpoints_own_dial_counts(checkpoint, tmp_path):
    def turn(config: dict[str, Any]) -> None:
        config["srd_config"] |= {"alpha": 0.5, "layer_alphas": {"re:.*q_proj": 0.0}}

    edit_json(checkpoint / "config.json", turn)
    export_dense(checkpoint, tmp_path / "own")
    export_dense(checkpoint, tmp_path / "given", alpha=0.5, layer_alphas={"re:.*q_proj": 0.0})
    export_dense(checkpoint, tmp_path / "other", alpha=0.5)
    own, given, other = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "given", "other"))
    assert all(torch.equal(own[name], given[name]) for name in given)
    differing = {name.split(".")[-2] for name in other if not torch.equal(own[name], other[name])}
    assert differing == {"q_proj"}, "an alpha that is given replaces the layer alphas too"


def test_every_format_and_modules_without_a_residual_are_written(small, tmp_path):
    """Dithered, sparse, with zero points, uncorrected: against the sidecar and the base themselves."""
    export_dense(small, tmp_path / "dense", dtype=torch.float32)
    dense, sidecar = load_file(tmp_path / "dense" / "model.safetensors"), Sidecar.open(small)
    assert sorted(dense) == sorted(
        [*(f"{module}.weight" for module in SHAPES), "model.embed_tokens.weight", "model.norm.weight"]
    )
    for module, shape in SHAPES.items():
        weight, base = dense[f"{module}.weight"], w4(base_tensors(), module)
        assert weight.shape == shape
        if module == UNCORRECTED:
            assert_rounded(weight, base)
        else:
            assert torch.equal(weight, sidecar.correct(module, 1.0))
            assert 1e-4 < (weight - base).abs().mean() < 1e-2


def test_chunks_that_are_not_asked_for_are_plain_w4(small, tmp_path):
    export_dense(small, tmp_path / "dense", dtype=torch.float32, chunks=["early"])
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert_rounded(dense[f"{SPARSE_MODULE}.weight"], w4(base_tensors(), SPARSE_MODULE))
    assert torch.equal(dense[f"{BIG}.weight"], Sidecar.open(small).correct(BIG, 1.0))


# the directory


def test_the_directory_is_an_ordinary_model(finished_checkpoint, tmp_path):
    export_dense(finished_checkpoint, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.joinpath("dense").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (finished_checkpoint, tmp_path / "dense")
    )
    assert set(before) - set(after) == {"srd_config", "quantization_config"}
    assert all(before[key] == value for key, value in after.items())
    assert read_srd_config(tmp_path / "dense") is None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (finished_checkpoint / name).read_bytes()
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_small_files_of_any_name_are_copied(small, tmp_path):
    (small / "chat_template.jinja").write_text("{{ messages }}")
    (small / "recipe.yaml").write_text("quant_stage: {}\n")
    export_dense(small, tmp_path / "dense")
    assert (tmp_path / "dense" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "dense" / "recipe.yaml").exists(), "the recipe is of the quantized model"


def test_the_card_stays_behind(small, tmp_path):
    """Its figures are those of the checkpoint."""
    (small / "README.md").write_text("perplexity 12.3")
    export_dense(small, tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_config_names_the_dtype(small, tmp_path, dtype, key):
    edit_json(small / "config.json", lambda config: config.update({key: "bfloat16"}))
    export_dense(small, tmp_path / "dense", dtype=dtype)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config[key] == str(dtype).removeprefix("torch.")
    assert len({"dtype", "torch_dtype"} & config.keys()) == 1


LOAD_PLAINLY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(1, 33)[None]).logits, sys.argv[2])
assert not {"srd_modifier", "compressed_tensors"} & set(sys.modules)
"""


def test_it_loads_in_transformers_without_the_plugin(finished_checkpoint, tmp_path):
    export_dense(finished_checkpoint, tmp_path / "dense")
    command = [sys.executable, "-c", LOAD_PLAINLY, tmp_path / "dense", tmp_path / "logits"]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        corrected = load_corrected(finished_checkpoint)(torch.arange(1, 33)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), corrected)


def test_tied_embeddings_stay_tied(tiny_llama, tmp_path):
    from srd_modifier.quantizing import quantize

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quant_stage: {quant_modifiers: {SRDModifier: {scheme: W4A16, ignore: [lm_head]}}}\n")
    quantize(str(tiny_llama), recipe, tmp_path / "srd")
    export_dense(tmp_path / "srd", tmp_path / "dense")
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    assert exported.keys() == load_file(tiny_llama / "model.safetensors").keys()
    assert "lm_head.weight" not in exported
    loaded = load_corrected(tmp_path / "srd").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in exported.items())
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"] is True


# shards


@pytest.mark.parametrize("limit", [1, 20_000, 150_000])
def test_shards_are_indexed_and_hold_the_same_tensors(finished_checkpoint, tmp_path, limit):
    export_dense(finished_checkpoint, tmp_path / "one")
    export_dense(finished_checkpoint, tmp_path / "many", max_shard_bytes=limit)
    whole, index = load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "many" / "model.safetensors.index.json"
    weight_map, metadata = (json.loads(index.read_text())[key] for key in ("weight_map", "metadata"))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert set(weight_map.values()) == set(files)
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    found = {}
    for file in files:
        shard = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit or len(shard) == 1
        assert {weight_map[name] for name in shard} == {file}
        found |= shard
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_shards_load_in_transformers(finished_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    export_dense(finished_checkpoint, tmp_path / "dense", max_shard_bytes=100_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    corrected = load_corrected(finished_checkpoint).state_dict()
    assert all(torch.equal(tensor, corrected[name]) for name, tensor in loaded.items())


def test_a_base_in_shards_is_read_across_files(small, tmp_path):
    """A module's codes and scales may lie in different files."""
    export_dense(small, tmp_path / "one", dtype=torch.float32)
    tensors = load_file(small / "model.safetensors")
    (small / "model.safetensors").unlink()
    halves = {
        "model-00001-of-00002.safetensors": sorted(tensors)[::2],
        "model-00002-of-00002.safetensors": sorted(tensors)[1::2],
    }
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, small / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    export_dense(small, tmp_path / "two", dtype=torch.float32)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert not (tmp_path / "two" / "model.safetensors.index.json").exists()
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


# refusals


def test_an_existing_output_is_refused_untouched(small, tmp_path):
    existing = shutil.copytree(small, tmp_path / "existing")
    before = digests(existing)
    with pytest.raises(CheckpointError, match="existing already exists; choose another directory or pass --overwrite"):
        export_dense(small, existing)
    assert digests(existing) == before


def test_an_existing_model_is_replaced_if_asked(small, tmp_path):
    existing = shutil.copytree(small, tmp_path / "existing")
    export_dense(small, existing, overwrite=True)
    assert sorted(path.name for path in existing.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_directory_that_is_no_model_is_not_replaced(small, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a model directory and is not overwritten"):
        export_dense(small, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_checkpoint_without_residual_is_refused(small, tmp_path):
    edit_json(small / "config.json", lambda config: config.pop("srd_config"))
    with pytest.raises(CheckpointError, match=r"config\.json has no srd_config: this is not an SRD checkpoint"):
        export_dense(small, tmp_path / "dense")


@pytest.mark.parametrize(
    ("dial", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1\.5, expected a number from 0 to 1"),
        ({"layer_alphas": {"x": -1}}, r"layer_alphas\['x'\] is -1, expected"),
        ({"chunks": ["middle"]}, "chunk 'middle' is unknown"),
    ],
    ids=["alpha", "layer-alphas", "chunks"],
)
def test_a_dial_out_of_range_is_refused(small, tmp_path, dial, message):
    with pytest.raises(ConfigError, match=message):
        export_dense(small, tmp_path / "dense", **dial)
    assert not (tmp_path / "dense").exists()


def damage_residual(directory: Path) -> None:
    flip_bit(directory / FIRST, f"{BIG}.weight_d8", 0.5)


def damage_scale(directory: Path) -> None:
    flip_bit(directory / FIRST, f"{BIG}.weight_d8_scale", 0.5)


def remove_residual(directory: Path) -> None:
    (directory / FIRST).unlink()


def remove_index(directory: Path) -> None:
    (directory / INDEX).unlink()


def change_base(directory: Path) -> None:
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))


FAULTS = {
    damage_residual: rf"{BIG}\.weight_d8 does not match its digest; the file is damaged",
    damage_scale: rf"{BIG}\.weight_d8_scale does not match its digest",
    remove_residual: r"residual-00001-of-00002\.safetensors",
    remove_index: r"residual\.safetensors\.index\.json is missing",
    change_base: "belongs to another base",
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.items())
def test_a_damaged_checkpoint_gives_no_output(small, tmp_path, damage, message):
    damage(small)
    with pytest.raises(CheckpointError, match=message):
        export_dense(small, tmp_path / "dense", max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_residual_that_is_not_used_is_not_read(small, tmp_path):
    damage_residual(small)
    export_dense(small, tmp_path / "dense", chunks=["reasoning"])
    assert (tmp_path / "dense" / "model.safetensors").is_file()
