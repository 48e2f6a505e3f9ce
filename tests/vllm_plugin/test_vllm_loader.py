"""The one patch of vLLM, and the ways to load weights that it does not reach."""

import inspect
import re
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import nn
from vllm.config import LoadConfig
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, LoadFormats
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.vllm import loader, stream

WEIGHTS = [("a.weight", torch.zeros(1)), ("b.weight", torch.ones(1))]
READS_CHECKPOINTS = ("auto", "hf", "safetensors", "fastsafetensors", "mistral", "npcache", "pt", "instanttensor")
REFUSED = ("tensorizer", "runai_streamer", "runai_streamer_sharded", "sharded_state", "ipc_cache", "modelexpress")


class Model:
    """What the loader asks of a model's config."""

    def __init__(self, quantization: str | None) -> None:
        self.quantization = quantization


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not been patched, with a loader of known tensors."""

    class Known(DefaultModelLoader):
        def get_all_weights(self, model_config, model):
            yield from WEIGHTS

    monkeypatch.setattr(loader, "DefaultModelLoader", Known)
    monkeypatch.setattr(loader, "_installed", False)
    return monkeypatch


def read(quantization: str | None) -> list:
    return list(loader.DefaultModelLoader(LoadConfig()).get_all_weights(Model(quantization), nn.Module()))


@pytest.mark.parametrize("quantization", [None, "compressed-tensors", "fp8"])
def test_other_models_pass_untouched(fresh, quantization):
    fresh.setattr(stream, "corrected_weights", lambda *_: pytest.fail("an SRD checkpoint was seen"))
    loader.install()
    assert read(quantization) == WEIGHTS


def test_an_srd_checkpoint_gets_the_corrected_tensors(fresh):
    fresh.setattr(stream, "corrected_weights", lambda weights, *_: ((f"{name}!", tensor) for name, tensor in weights))
    loader.install()
    assert [name for name, _ in read("srd")] == ["a.weight!", "b.weight!"]


def test_it_is_installed_once(fresh):
    fresh.setattr(stream, "corrected_weights", lambda weights, *_: ((f"{name}!", tensor) for name, tensor in weights))
    loader.install()
    first = loader.DefaultModelLoader.get_all_weights
    loader.install()
    assert loader.DefaultModelLoader.get_all_weights is first
    assert list(inspect.signature(first).parameters) == loader._PARAMETERS
    assert [name for name, _ in read("srd")] == ["a.weight!", "b.weight!"]  # not twice


def test_the_installed_vllm_has_the_method_that_is_relied_on():
    assert list(inspect.signature(DefaultModelLoader.get_all_weights).parameters) == loader._PARAMETERS


class Renamed:
    pass


class Changed:
    def get_all_weights(self, model_config, model, device):
        pass


@pytest.mark.parametrize(
    ("other", "what"),
    [pytest.param(Renamed, "is gone", id="gone"), pytest.param(Changed, "takes (self, model_config, model, device)")],
)
def test_another_vllm_is_refused_in_one_sentence(fresh, other, what):
    fresh.setattr(loader, "DefaultModelLoader", other)
    sentence = (
        f"DefaultModelLoader.get_all_weights of this vLLM {what}, srd-modifier relies on one that takes "
        "(self, model_config, model): install a vLLM that it is tested with, or serve plain W4 with "
        "`--quantization compressed-tensors`"
    )
    with pytest.raises(SRDError, match=f"^{re.escape(sentence)}$"):
        loader.install()
    assert other is Renamed or other.get_all_weights.__qualname__.startswith("Changed")


def test_every_load_format_of_vllm_is_known_here():
    assert {*READS_CHECKPOINTS, *REFUSED, "dummy"} == set(get_args(LoadFormats))


@pytest.mark.parametrize("load_format", [*READS_CHECKPOINTS, "dummy"])
def test_loaders_that_read_the_checkpoint_are_taken(load_format):
    loader.install()
    loader.check_loader(LoadConfig(load_format=load_format))


@pytest.mark.parametrize("load_format", REFUSED)
def test_loaders_that_bypass_the_sidecar_are_refused(load_format):
    sentence = (
        f"--load-format {load_format} does not read the residual of an SRD checkpoint; leave it at 'auto', or serve "
        "plain W4 with `--quantization compressed-tensors`"
    )
    loader.install()
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        loader.check_loader(LoadConfig(load_format=load_format))


@pytest.mark.parametrize(("overrides", "taken"), [(False, True), (True, False)], ids=["inherits", "overrides"])
def test_loaders_of_other_plugins_are_taken_if_they_read_what_vllm_reads(monkeypatch, overrides, taken):
    methods = {"get_all_weights": lambda self, model_config, model: iter(())} if overrides else {}
    loader.install()
    monkeypatch.setitem(_LOAD_FORMAT_TO_MODEL_LOADER, "other", type("Other", (DefaultModelLoader,), methods))
    with nullcontext() if taken else pytest.raises(ConfigError, match=r"^--load-format other does not read"):
        loader.check_loader(LoadConfig(load_format="other"))
