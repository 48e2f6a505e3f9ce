"""The tensors that a model is given to load, without an engine."""

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rtn import write_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.vllm import stream
from srd_modifier.vllm.checkpoint import ServedCheckpoint
from srd_modifier.vllm.config import CorrectedConfig
from srd_modifier.vllm.layers import MergedLinearMethod
from srd_modifier.vllm.settings import Settings

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(6)]


@pytest.fixture(scope="module")
def directory(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which the down projections have a residual."""
    directory = tmp_path_factory.mktemp("stream") / "checkpoint"
    return write_checkpoint(random_llama, directory, group_size=32, corrected=lambda name: name in DOWN)


@pytest.fixture
def config(directory: Path) -> CorrectedConfig:
    config = CorrectedConfig.from_config(json.loads((directory / "config.json").read_text())["quantization_config"])
    sidecar = Sidecar.open(directory)
    config.model = str(directory)
    vars(config)["checkpoint"] = ServedCheckpoint(sidecar, Settings.read(sidecar, {}))
    return config


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "get_tensor_model_parallel_rank", lambda: 0)
    with set_current_vllm_config(VllmConfig()):
        yield


def make_model(config: CorrectedConfig | None, *parts: tuple[str, ...]) -> nn.Module:
    """A model of this rank, with a corrected layer for each of the parts."""
    model = nn.ModuleList(nn.Module() for _ in parts)
    model.quant_config = config
    for layer, modules in zip(model, parts, strict=True):
        layer.quant_method = MergedLinearMethod(modules)
    return model


def model_config(directory: Path, runner: str = "generate", **settings: Any) -> Any:
    given = SimpleNamespace(srd_config=settings)
    return SimpleNamespace(model=str(directory), hf_config=given, dtype=torch.bfloat16, runner_type=runner)


def stored(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_corrected_tensors_stand_in_the_place_of_w4(directory, config, alpha):
    model = make_model(config, *((module,) for module in DOWN))
    tensors = stored(directory)
    found = list(stream.corrected_weights(tensors.items(), model_config(directory, alpha=alpha), model))
    replaced = {f"{module}.{suffix}" for module in DOWN for suffix in ("weight_packed", "weight_scale", "weight_shape")}
    assert replaced <= tensors.keys()
    names = [name for name, _ in found]
    assert len(names) == len(set(names))
    assert set(names) == tensors.keys() - replaced | {f"{module}.weight" for module in DOWN}
    sidecar = config.checkpoint.sidecar
    for name, tensor in found:
        module = name.removesuffix(".weight")
        expected = sidecar.correct(module, alpha, torch.bfloat16) if module in DOWN else tensors[name]
        assert torch.equal(tensor, expected), name


def test_parts_of_a_fused_layer_without_a_residual_are_dense_too(directory, config):
    """VLLM fuses the rows of gate and up into one weight."""
    fused = ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj")
    model = make_model(config, fused, *((module,) for module in DOWN))
    found = dict(stream.corrected_weights(stored(directory).items(), model_config(directory), model))
    for module in fused:
        assert torch.equal(found[f"{module}.weight"], config.checkpoint.sidecar.correct(module, 0, torch.bfloat16))
        assert f"{module}.weight_packed" not in found


def test_weights_are_decoded_one_at_a_time(directory, config, monkeypatch):
    decoded = []
    merged = ServedCheckpoint.merged
    monkeypatch.setattr(
        ServedCheckpoint, "merged", lambda self, name, *to: decoded.append(name) or merged(self, name, *to)
    )
    model = make_model(config, *((module,) for module in DOWN))
    tensors = stream.corrected_weights(stored(directory).items(), model_config(directory), model)
    assert decoded == []
    for name, _ in tensors:
        if name.endswith("down_proj.weight"):
            assert f"{decoded[-1]}.weight" == name
            if len(decoded) == 2:
                break
    assert len(decoded) == 2  # and a stream that is left alone decodes no more
    tensors.close()


def test_settings_of_now_are_used(directory, config):
    """They may be others than the engine was configured with."""
    model = make_model(config, *((module,) for module in DOWN))
    changed = model_config(directory, alpha=1, layer_alphas={DOWN[0]: 0.25})
    found = dict(stream.corrected_weights(stored(directory).items(), changed, model))
    assert torch.equal(found[f"{DOWN[0]}.weight"], config.checkpoint.sidecar.correct(DOWN[0], 0.25, torch.bfloat16))


def refuse(sentence: str, kind: type[Exception], *arguments: Any) -> None:
    """It is said before the first tensor is asked for."""
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$"):
        stream.corrected_weights((), *arguments)


def test_a_model_that_lacks_a_corrected_layer_is_refused(directory, config):
    model = make_model(config, *((module,) for module in DOWN[:-1]))
    sentence = (
        f"{DOWN[-1]} has a residual, but ModuleList of vLLM has no such layer; serve plain W4 with `--quantization "
        "compressed-tensors`"
    )
    refuse(sentence, CheckpointError, model_config(directory), model)
    stream.corrected_weights((), model_config(directory, layer_alphas={DOWN[-1]: 0}), model)  # nothing to be added
    stream.corrected_weights((), model_config(directory, runner="draft"), model)  # one layer of it, to look ahead


def test_a_layer_that_was_started_as_w4_is_refused(directory, config):
    sidecar = config.checkpoint.sidecar
    vars(config)["checkpoint"] = ServedCheckpoint(sidecar, Settings.read(sidecar, {"layer_alphas": {DOWN[0]: 0}}))
    model = make_model(config, *((module,) for module in DOWN[1:]))
    sentence = (
        f"{DOWN[0]}: the engine was started with alpha 0 for it, and computes it as W4; start it with "
        "srd_config.compute 'merge' to turn the dial later"
    )
    refuse(sentence, ConfigError, model_config(directory), model)


def test_a_model_of_another_quantization_is_refused(directory):
    sentence = (
        f"{directory}: ModuleList of vLLM does not say how its layers are quantized, so no residual can be added; "
        "serve plain W4 with `--quantization compressed-tensors`"
    )
    refuse(sentence, CheckpointError, model_config(directory), make_model(None))


def test_weights_of_another_model_are_refused(directory, config):
    """VLLM can reload from another path; the sidecar would still be that of the first."""
    sentence = (
        f"elsewhere: the weights of another model cannot be loaded into an engine of the SRD checkpoint {directory}; "
        "start another engine"
    )
    refuse(sentence, ConfigError, model_config(Path("elsewhere")), make_model(config, *((name,) for name in DOWN)))


def test_settings_are_checked(directory, config):
    model = make_model(config, *((module,) for module in DOWN))
    refuse("alpha is 2, expected a number from 0 to 1", ConfigError, model_config(directory, alpha=2), model)


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_compiled_on_a_cpu_is_not_reloaded(directory, config, mode, loaded):
    """The packed weights are constants of what was compiled."""
    model = make_model(config, *((module,) for module in DOWN))
    for layer in model:
        layer.quant_method.loaded = loaded
    compiled = VllmConfig(compilation_config=CompilationConfig(mode=mode))
    sentence = r"^weights cannot be exchanged in a compiled model on a CPU; start it with --enforce-eager$"
    refused = loaded and mode != CompilationMode.NONE
    with set_current_vllm_config(compiled), pytest.raises(ConfigError, match=sentence) if refused else nullcontext():
        stream.corrected_weights((), model_config(directory), model)


@pytest.mark.parametrize(
    ("of_rank", "balanced", "local"),
    [
        (None, False, {0, 1, 2, 3}),  # every rank has all experts
        ([-1, 0, -1, 1], False, {1, 3}),  # their place on this rank
        ([-1, 0, -1, 1], True, {0, 1, 2, 3}),  # vLLM moves them between ranks
    ],
)
def test_experts_of_other_ranks_are_not_decoded(of_rank, balanced, local):
    parallel = SimpleNamespace(enable_eplb=balanced)
    layer: Any = SimpleNamespace(
        expert_map=None if of_rank is None else torch.tensor(of_rank),
        moe_config=SimpleNamespace(moe_parallel_config=parallel),
    )
    assert {number for number in range(4) if stream._is_local(layer, f"{number}.up_proj")} == local
