"""What vLLM processes load of this package, and which checkpoints it takes over."""

import copy
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.vllm.register import METHOD, register

COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WITH_RESIDUAL = SimpleNamespace(srd_config={"version": 2})

LATER = ("config", "layers", "stream", "loader", "checkpoint", "int8", "settings", "dial")


def fresh(code: str, plugins: str = "srd") -> dict:
    """The JSON that `code` prints last in an interpreter of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "VLLM_PLUGINS": plugins}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_entry_point_is_what_vllm_looks_for():
    ours = [point for point in entry_points(group="vllm.general_plugins") if point.name == "srd"]
    assert [point.value for point in ours] == ["srd_modifier.vllm:register"]
    assert ours[0].load() is register


@pytest.mark.slow
def test_a_process_without_an_srd_checkpoint_loads_next_to_nothing():
    """What the parser of vLLM's arguments has imported is there in every vLLM process before plugins are."""
    found = fresh(
        """
import json, sys
import vllm.engine.arg_utils

before = set(sys.modules)
from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

print(json.dumps({"new": sorted(set(sys.modules) - before), "methods": QUANTIZATION_METHODS}))
"""
    )
    assert "srd" in found["methods"]
    packages = {name.partition(".")[0] for name in found["new"]}
    assert packages - sys.stdlib_module_names <= {"srd_modifier", "wrapt"}  # nothing more of vLLM, nothing heavier
    assert not {f"srd_modifier.vllm.{name}" for name in LATER} & set(found["new"])
    assert not [name for name in found["new"] if name.startswith("srd_modifier.modifier")]


@pytest.mark.slow
def test_without_the_plugin_vllm_does_not_know_the_method():
    code = """
import json
from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

print(json.dumps({"methods": QUANTIZATION_METHODS}))
"""
    assert "srd" not in fresh(code, "")["methods"]


@pytest.mark.slow
def test_importing_the_package_does_not_import_vllm():
    code = """
import json, sys
import srd_modifier

print(json.dumps({"heavy": sorted({"vllm", "torch", "transformers", "compressed_tensors"} & set(sys.modules))}))
"""
    assert fresh(code)["heavy"] == []


def test_registering_again_changes_nothing():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    first = get_quantization_config(METHOD)
    register()
    assert get_quantization_config(METHOD) is first
    assert QUANTIZATION_METHODS.count(METHOD) == 1


@pytest.mark.parametrize(
    ("quantization", "asked", "model", "answer"),
    [
        pytest.param(COMPRESSED, None, WITH_RESIDUAL, "srd", id="no-flags"),
        pytest.param(COMPRESSED, "srd", WITH_RESIDUAL, "srd", id="asked-for"),
        pytest.param(COMPRESSED, "compressed-tensors", WITH_RESIDUAL, None, id="plain-w4"),
        pytest.param(COMPRESSED, "humming", WITH_RESIDUAL, None, id="another-method"),
        pytest.param(COMPRESSED, None, SimpleNamespace(srd_config={}), "srd", id="overridden-with-nothing"),
        pytest.param(COMPRESSED, None, SimpleNamespace(), None, id="no-residual"),
        pytest.param(COMPRESSED, None, SimpleNamespace(srd_config=None), None, id="null"),
        pytest.param(COMPRESSED, None, None, None, id="no-config"),
        pytest.param({"quant_method": "gptq"}, None, WITH_RESIDUAL, None, id="another-base"),
    ],
)
def test_which_checkpoints_are_taken_over(quantization, asked, model, answer):
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    detection = get_quantization_config(METHOD)
    assert detection.override_quantization_method(quantization, asked, hf_config=model) == answer


def test_a_model_that_is_not_quantized_is_no_srd_checkpoint():
    """`--quantization srd` is not checked against such a model; vLLM then makes a config without values."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    with pytest.raises(
        ConfigError, match=r"^--quantization srd is for SRD checkpoints, and this model is not quantized$"
    ):
        get_quantization_config(METHOD)()


@pytest.fixture
def config() -> Any:
    """As vLLM makes it from config.json, more than once."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {**COMPRESSED, "config_groups": groups, "ignore": ["lm_head"]}
    detection = get_quantization_config(METHOD)
    detection.from_config(quantization)
    return detection.from_config(quantization)


def test_the_config_is_one_of_compressed_tensors(config):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    assert isinstance(config, CompressedTensorsConfig)
    assert config.get_name() == "compressed-tensors"  # what models compare it with


def test_the_config_travels_to_other_processes(config):
    """VLLM pickles it for its workers, and copies it; an open checkpoint stays where it is."""
    values = vars(config)
    values["checkpoint"], values["compute"], values["names"] = (lambda: None), "merge", {"model.a": "a"}
    for received in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert type(received) is type(config)
        assert not {"checkpoint", "compute"} & vars(received).keys()
        assert received.names == {"model.a": "a"}
        assert received.ignore == ["lm_head"]


def test_names_that_a_model_changes_are_changed_here(config):
    """Models that see images or hear put their language model somewhere else than the checkpoint."""
    from vllm.model_executor.models.utils import WeightsMapper

    modules = ("lm_head", "model.layers.0.mlp.up_proj", "visual.proj", "mtp.layers.0.up_proj")
    vars(config)["names"] = {name: name for name in modules}
    prefixes = {"lm_head.": "language_model.lm_head.", "model.": "language_model.model.", "mtp.": None}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    expected = {
        "language_model.lm_head": "lm_head",
        "language_model.model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj",
        "visual.proj": "visual.proj",
    }
    assert config.names == expected
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={".absent.": ".other."}))  # the inner model's
    assert config.names == expected
