import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from srd_modifier import hydrate, load_corrected
from srd_modifier.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def weights(partial_checkpoint, by_hand):
    return by_hand(partial_checkpoint)


def test_by_default_it_is_from_pretrained(partial_checkpoint, partial_alphas, weights, assert_weights):
    model = load_corrected(partial_checkpoint)
    assert_weights(model, weights.weights(partial_alphas))
    same = AutoModelForCausalLM.from_pretrained(str(partial_checkpoint))
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in same.named_parameters())


@pytest.mark.parametrize("alpha", [0, 0.5, 0.75, 1])
def test_alpha_replaces_the_checkpoints_alpha_and_its_layer_alphas(alpha, partial_checkpoint, weights, assert_weights):
    # 0.5 is the checkpoint's own, which makes no difference
    assert_weights(load_corrected(partial_checkpoint, alpha=alpha), weights.weights(alpha))


def test_layer_alphas_replace_the_checkpoints(partial_checkpoint, weights, assert_weights):
    model = load_corrected(partial_checkpoint, layer_alphas={"re:.*down_proj": 1.0})
    alphas = {name: 1.0 if name.endswith("down_proj") else 0.5 for name in weights.residual}
    assert_weights(model, weights.weights(alphas))


def test_no_layer_alphas_at_all(partial_checkpoint, weights, assert_weights):
    assert_weights(load_corrected(partial_checkpoint, layer_alphas={}), weights.weights(0.5))


def test_the_checkpoints_own_layer_alphas_given_again(partial_checkpoint, weights, assert_weights):
    own = json.loads((partial_checkpoint / "config.json").read_text())["srd_config"]["layer_alphas"]
    model = load_corrected(partial_checkpoint, alpha=1, layer_alphas=own)
    alphas = {name: 0.25 if name.endswith("up_proj") else 1.0 for name in weights.residual}
    assert_weights(model, weights.weights(alphas | {"model.layers.5.mlp.down_proj": 0.0}))


def test_alpha_and_layer_alphas(partial_checkpoint, weights, assert_weights):
    model = load_corrected(partial_checkpoint, alpha=0, layer_alphas={"model.layers.2.mlp.gate_proj": 1})
    assert_weights(model, weights.weights({"model.layers.2.mlp.gate_proj": 1.0}))


@pytest.mark.parametrize(
    ("chunks", "layers"), [(["reasoning"], "34"), (("early", "early"), "01"), ("factual", "2"), ([], "")], ids=str
)
def test_chunks(chunks, layers, partial_checkpoint, partial_alphas, weights, assert_weights):
    model = load_corrected(partial_checkpoint, chunks=chunks)
    assert_weights(
        model,
        weights.weights({n: a for n, a in partial_alphas.items() if re.findall(r"layers\.(\d)", n)[0] in layers}),
    )
    hydrate(model)
    assert_weights(model, weights.weights(partial_alphas))


def test_other_arguments_are_those_of_from_pretrained(partial_checkpoint):
    model = load_corrected(
        partial_checkpoint, dtype=torch.float16, device_map="cpu", attn_implementation="eager", local_files_only=True
    )
    assert model.dtype == torch.float16
    assert model.config._attn_implementation == "eager"


def test_a_directory_without_a_residual(random_llama):
    with pytest.raises(CheckpointError, match=r"config.json has no srd_config, this is not an SRD checkpoint") as error:
        load_corrected(random_llama)
    assert str(random_llama) in str(error.value)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_corrected(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"alpha": "half"}, "alpha is 'half', expected a number"),
        ({"layer_alphas": {"re:.*": 2}}, r"layer_alphas\['re:\.\*'\] is 2, expected"),
        ({"layer_alphas": {"re:(": 1}}, "is not a regular expression"),
        ({"chunks": ["late"]}, "chunk 'late' is unknown, expected some of"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message, partial_checkpoint):
    with pytest.raises(ConfigError, match=message):
        load_corrected(partial_checkpoint, **settings)


def test_config_json_on_disk_is_not_touched(partial_checkpoint):
    before = (partial_checkpoint / "config.json").read_bytes()
    load_corrected(partial_checkpoint, alpha=0.1, chunks=["early"])
    assert (partial_checkpoint / "config.json").read_bytes() == before


def test_a_relative_directory(partial_checkpoint, partial_alphas, weights, assert_weights, monkeypatch, tmp_path):
    Path(shutil.copytree(partial_checkpoint, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    assert_weights(load_corrected("model"), weights.weights(partial_alphas))
