"""What a user can set when serving, and what is said about everything else."""

import json
import re
from pathlib import Path

import pytest
from rtn import write_checkpoint

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import ConfigError
from srd_modifier.vllm.settings import COMPUTES, Settings

FIRST, LAST = "model.layers.0.mlp.down_proj", "model.layers.5.mlp.down_proj"
REASONING = "model.layers.3.mlp.up_proj"  # of six layers


@pytest.fixture(scope="module")
def sidecar(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    directory = tmp_path_factory.mktemp("settings") / "checkpoint"
    settings = {"alpha": 0.75, "layer_alphas": {LAST: 0.125}}
    return Sidecar.open(write_checkpoint(random_llama, directory, group_size=32, **settings))


@pytest.fixture(scope="module")
def stored(sidecar: Sidecar) -> dict:
    """What vLLM has as srd_config when the user sets nothing: config.json's."""
    return json.loads((sidecar.directory / "config.json").read_text())["srd_config"]


def test_the_checkpoints_own_settings_are_the_default(sidecar, stored):
    settings = Settings.read(sidecar, stored)
    assert settings.alphas.keys() == set(sidecar.config.modules)
    assert {settings.alphas[FIRST], settings.alphas[REASONING]} == {0.75}
    assert settings.alphas[LAST] == 0.125
    assert settings.compute == "auto"
    assert Settings.read(sidecar, {}) == settings


def test_overrides_replace_the_checkpoints(sidecar, stored):
    """VLLM puts `--hf-overrides` in the place of srd_config; a function may change single fields of it instead."""
    replaced = Settings.read(sidecar, {"alpha": 0.5, "compute": "merge"})
    assert Settings.read(sidecar, {**stored, "alpha": 0.5, "compute": "merge"}) == replaced
    assert set(replaced.alphas.values()) == {0.5}  # an alpha of one's own is for all modules
    assert replaced.compute == "merge"


def test_layer_alphas_replace_the_checkpoints(sidecar):
    settings = Settings.read(sidecar, {"alpha": 1, "layer_alphas": {"re:.*down_proj$": 0, FIRST: 0.5}})
    assert settings.alphas[FIRST] == settings.alphas[LAST] == 0  # the first match counts
    assert settings.alphas[REASONING] == 1
    only = Settings.read(sidecar, {"layer_alphas": {FIRST: 0.5}})
    assert (only.alphas[FIRST], only.alphas[LAST], only.alphas[REASONING]) == (0.5, 0.75, 0.75)


@pytest.mark.parametrize("chunks", [["reasoning"], ("reasoning",), "reasoning"], ids=["list", "tuple", "text"])
def test_chunks_choose_modules_by_depth(sidecar, chunks):
    settings = Settings.read(sidecar, {"alpha": 1, "chunks": chunks})
    layers = {name.split(".")[2] for name, alpha in settings.alphas.items() if alpha}
    assert layers == {"3", "4"}  # depths 0.5 and 0.67 of 0.40 to 0.77
    assert Settings.read(sidecar, {"chunks": []}).alphas == dict.fromkeys(settings.alphas, 0.0)


@pytest.mark.parametrize("compute", COMPUTES)
def test_every_compute_can_be_chosen(sidecar, compute):
    assert Settings.read(sidecar, {"compute": compute}).compute == compute


@pytest.mark.parametrize("given", [{"alpha": None}, {"chunks": None}, {"layer_alphas": None}])
def test_null_is_as_if_it_were_not_given(sidecar, given):
    expected = Settings.read(sidecar, {})
    assert Settings.read(sidecar, given) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        pytest.param({"alpha": "1"}, "alpha is '1', expected a number from 0 to 1", id="alpha-text"),
        pytest.param({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1", id="alpha-above"),
        pytest.param({"alpha": -0.1}, "alpha is -0.1, expected a number from 0 to 1", id="alpha-below"),
        pytest.param({"alpha": True}, "alpha is True, expected a number from 0 to 1", id="alpha-truth"),
        pytest.param({"alpha": float("nan")}, "alpha is nan, expected a number from 0 to 1", id="alpha-nan"),
        pytest.param(
            {"layer_alphas": {"re:.*": 2}},
            "layer_alphas['re:.*'] is 2, expected a number from 0 to 1",
            id="layer-alpha-above",
        ),
        pytest.param(
            {"layer_alphas": {"re:(": 0.5}},
            "the pattern 're:(' is not a regular expression: missing ), unterminated subpattern at position 0",
            id="layer-alpha-pattern",
        ),
        pytest.param(
            {"layer_alphas": [0.5]},
            "srd_config.layer_alphas is [0.5], expected an object of alphas by module name",
            id="layer-alphas-list",
        ),
        pytest.param(
            {"chunks": ["reasonning"]},
            "chunk 'reasonning' is unknown, expected some of ['early', 'factual', 'reasoning', 'governance']",
            id="chunk-unknown",
        ),
        pytest.param({"chunks": 3}, "srd_config.chunks is 3, expected a list of names", id="chunks-number"),
        pytest.param(
            {"compute": "fast"},
            "srd_config.compute is 'fast', expected one of auto, merge, int8, split",
            id="compute-unknown",
        ),
        pytest.param(
            {"compute": None},
            "srd_config.compute is None, expected one of auto, merge, int8, split",
            id="compute-null",
        ),
        pytest.param(
            {"aplha": 1},
            "srd_config.aplha cannot be set when loading, only alpha, layer_alphas, chunks, compute",
            id="unknown",
        ),
        pytest.param(
            {"modules": []},
            "srd_config.modules cannot be set when loading, only alpha, layer_alphas, chunks, compute",
            id="the-checkpoints-own",
        ),
        pytest.param(
            0.5, "srd_config is 0.5, expected an object with alpha, layer_alphas, chunks, compute", id="no-object"
        ),
    ],
)
def test_everything_else_is_refused_in_one_sentence(sidecar, given, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        Settings.read(sidecar, given)


def test_fields_of_the_checkpoint_cannot_be_changed(sidecar, stored):
    with pytest.raises(ConfigError, match=r"^srd_config\.bits cannot be set when loading, only alpha, "):
        Settings.read(sidecar, {**stored, "bits": 4})
