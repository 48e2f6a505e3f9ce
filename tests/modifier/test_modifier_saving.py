import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file

from srd_modifier import SRDModifier
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, SRDError


@pytest.mark.parametrize("kind", ["itself", "round-to-nearest", "gptq"])
def test_saving_twice_writes_the_same_bytes(kind, quantize, quantized_model, make_recipe, directory_bytes, tmp_path):
    model = quantized_model(make_recipe(kind))
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(str(tmp_path / "deeper" / "second"))
    first = directory_bytes(tmp_path / "first")
    assert directory_bytes(tmp_path / "deeper" / "second") == first
    # and `oneshot(output_dir=...)` does no more than that, but for the tokenizer
    expected = directory_bytes(quantize(make_recipe(kind), tmp_path / "oneshot", data=True))
    assert {name: data for name, data in expected.items() if not name.startswith("tokenizer")} == first
    Sidecar.open(tmp_path / "first").verify()


@pytest.mark.parametrize("kind", ["itself", "gptq"])
def test_saving_uncompressed_writes_no_sidecar(kind, quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe(kind))
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    assert not (tmp_path / "dense" / "srd").exists()
    assert "srd_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    # upstream does not pack such a model any more; a sidecar beside dense weights would be of no base
    with pytest.raises(SRDError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_oneshot_with_save_compressed_off_writes_no_sidecar(quantize, make_recipe, tmp_path):
    output = quantize(make_recipe("itself"), tmp_path / "dense", save_compressed=False)
    assert not (output / "srd").exists()
    assert "srd_config" not in json.loads((output / "config.json").read_text())


def test_a_sharded_base(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("itself"), data=False)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    whole, sharded = Sidecar.open(tmp_path / "whole"), Sidecar.open(tmp_path / "sharded")
    sharded.verify()
    assert sharded.config == whole.config  # the digest does not depend on the sharding
    for module in whole.entries:
        assert torch.equal(sharded.correct(module, 1.0), whole.correct(module, 1.0))


def test_an_existing_directory_keeps_its_other_files(quantized_model, make_recipe, directory_bytes, tmp_path):
    old = quantized_model(make_recipe("itself"), data=False)
    old.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    (tmp_path / "model" / "README.md").write_text("mine")
    (tmp_path / "model" / "srd" / "left-over.txt").write_text("old")
    new = quantized_model(make_recipe("gptq", residual_bits=4))
    new.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "fresh")
    found = directory_bytes(tmp_path / "model")
    assert found.pop("README.md") == b"mine"
    assert found == directory_bytes(tmp_path / "fresh")


def test_two_models_are_saved_in_either_order(quantized_model, make_recipe, directory_bytes, tmp_path):
    models = {name: quantized_model(make_recipe(name)) for name in ("gptq", "itself")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        quantized_model(make_recipe(name)).save_pretrained(tmp_path / f"{name}-expected")
        found, expected = (directory_bytes(tmp_path / directory) for directory in (name, f"{name}-expected"))
        for files in (found, expected):
            files.pop("recipe.yaml")  # upstream's, of whatever recipe came last
        assert found == expected


def test_a_relative_directory(quantized_model, make_recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quantized_model(make_recipe("itself"), data=False).save_pretrained("model")
    Sidecar.open(tmp_path / "model").verify()


def test_push_to_hub_is_refused(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("itself"), data=False)
    with pytest.raises(SRDError, match="would upload the model without its sidecar; save to a directory, then"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("itself"), data=False)
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path / 'model'))} is a file, expected a directory"):
        model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "elsewhere")
    Sidecar.open(tmp_path / "elsewhere").verify()


@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_a_save_that_fails_leaves_the_directory_as_it_was(
    existing, quantized_model, make_recipe, directory_bytes, tmp_path
):
    model = quantized_model(make_recipe("gptq"))
    target = tmp_path / "model"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"of another model")
    before = directory_bytes(tmp_path)
    weight = model.get_submodule("model.layers.3.mlp.down_proj").weight
    original = weight.detach().clone()
    weight.data.zero_()
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight_packed was saved with other bytes"):
        model.save_pretrained(target)
    assert {name: data for name, data in directory_bytes(tmp_path).items() if ".srd-residual-" not in name} == before
    assert not list(tmp_path.glob("*.partial"))
    assert original.any()


def test_the_residual_is_linked_and_not_copied(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("itself"), data=False)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    shard = "srd/residual-00001-of-00001.safetensors"
    assert (tmp_path / "first" / shard).stat().st_ino == (tmp_path / "second" / shard).stat().st_ino


def test_config_json_has_srd_config_at_the_top_and_nothing_else_new(quantize, make_recipe, tmp_path):
    config = json.loads((quantize(make_recipe("itself"), tmp_path / "srd") / "config.json").read_text())
    alone = json.loads((quantize(make_recipe("itself", alone=True), tmp_path / "alone") / "config.json").read_text())
    assert config["quantization_config"] == alone["quantization_config"]
    assert (config["quantization_config"]["quant_method"], config["quantization_config"]["format"]) == (
        "compressed-tensors",
        "pack-quantized",
    )
    assert set(config) - set(alone) == {"srd_config"}
    assert set(config["srd_config"]) == {
        *("version", "alpha", "layer_alphas", "modules", "sidecar", "base_digest", "base_fingerprint"),
        *("bits", "group_size", "rounding", "density", "scale_dtype", "seed"),
    }


RECIPES: dict[str, Any] = {
    "itself": lambda scheme: SRDModifier(
        config_groups=scheme,
        ignore=["lm_head"],
        correct={"depth": [0.4, 0.77]},
        layer_alphas={"re:.*q_proj": 0.5},
        residual_bits=4,
        rounding="stochastic",
        seed=5,
    ),
    # upstream writes the config_groups of GPTQModifier in a way that YAML does not read back; a scheme it can
    "gptq": lambda _: [
        SRDModifier(ignore=["lm_head"], correct={"chunks": ["early", "governance"]}, alpha=0.5),
        GPTQModifier(scheme="W4A16", targets=["re:.*down_proj"], ignore=["lm_head"]),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_yaml_can_be_run_again(name, quantize, group_scheme, directory_bytes, tmp_path):
    first = quantize(RECIPES[name](group_scheme(32)), tmp_path / "first", data=True)
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    ((_, group),) = recipe.items()
    ((_, modifiers),) = group.items()
    assert next(iter(modifiers)) == "SRDModifier"
    second = quantize(str(first / "recipe.yaml"), tmp_path / "second", data=True)
    assert directory_bytes(second) == directory_bytes(first)


SCRIPT = """
import sys
import srd_modifier
from llmcompressor import oneshot

model, recipe, output = sys.argv[1:]
oneshot(model=model, recipe=recipe, output_dir=output)
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_and_leaves_nothing_behind(
    random_llama, quantize, group_scheme, directory_bytes, tmp_path
):
    here = quantize(RECIPES["itself"](group_scheme(32)), tmp_path / "here" / "model")
    there = tmp_path / "there" / "model"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, random_llama, here / "recipe.yaml", there],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert directory_bytes(there) == directory_bytes(here)
    assert [path.name for path in there.parent.iterdir()] == ["model"]


def test_a_residual_on_another_file_system_is_copied(quantized_model, make_recipe, monkeypatch, tmp_path):
    def refuse(*_: Any) -> None:
        raise OSError("links are not possible here")

    model = quantized_model(make_recipe("gptq"))
    monkeypatch.setattr(os, "link", refuse)
    model.save_pretrained(tmp_path / "model")
    Sidecar.open(tmp_path / "model").verify()


def test_save_pretrained_still_looks_like_upstreams(quantized_model, make_recipe):
    # upstream marks its replacement, so that it does not stand around it a second time
    model = quantized_model(make_recipe("itself"), data=False)
    alone = quantized_model(make_recipe("itself", alone=True), data=False)
    assert model.save_pretrained._overridden is True
    assert model.save_pretrained.__name__ == alone.save_pretrained.__name__


def test_paths_of_every_kind(quantized_model, make_recipe, tmp_path):
    model = quantized_model(make_recipe("itself"), data=False)
    model.save_pretrained(f"{tmp_path}/trailing/")
    assert sorted(path.name for path in Path(tmp_path / "trailing" / "srd").iterdir()) == [
        "residual-00001-of-00001.safetensors",
        "residual.safetensors.index.json",
    ]
