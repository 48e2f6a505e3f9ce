import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from srd_modifier.checkpoint.config import IMPORTANCE, read_srd_config
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.gguf.weights import ModelWeights

QUANTIZED_SUFFIXES = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}


def as_w4a16(checkpoint: Path) -> Path:
    """The same base without its residual."""
    shutil.rmtree(checkpoint / "srd")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["srd_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def test_a_plain_model_is_as_it_is_stored(random_llama: Path) -> None:
    weights = ModelWeights.open(random_llama)
    expected = load_file(random_llama / "model.safetensors")
    assert set(weights.names) == expected.keys()
    for name, tensor in expected.items():
        found = weights.tensor(name)
        assert found.dtype is tensor.dtype
        assert torch.equal(found, tensor)
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.path_of(name) == random_llama / "model.safetensors"
    assert weights.config == json.loads((random_llama / "config.json").read_text())
    assert weights.importance() == {}
    assert weights.srd_config is None
    assert "model.norm.weight" in weights
    assert "model.norm.bias" not in weights


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"alpha": 0.0}, {"chunks": ["early"]}])
def test_a_checkpoint_with_a_residual_is_what_transformers_loads(
    finished_checkpoint: Path, options: dict[str, Any]
) -> None:
    from srd_modifier.transformers import load_corrected

    expected = state_of(load_corrected(finished_checkpoint, dtype=torch.float32, **options))
    weights = ModelWeights.open(finished_checkpoint, **options)
    assert set(weights.names) == expected.keys()
    for name, tensor in expected.items():
        assert weights.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(weights.tensor(name).float(), tensor, atol=1e-7, rtol=0, msg=name)


def test_alphas_by_layer_are_passed_on(finished_checkpoint: Path) -> None:
    weights = ModelWeights.open(finished_checkpoint, alpha=0.25, layer_alphas={"re:.*layers.1.*": 0.75})
    assert weights.alphas["model.layers.0.mlp.up_proj"] == 0.25
    assert weights.alphas["model.layers.1.mlp.up_proj"] == 0.75


def test_a_quantized_checkpoint_is_dequantized(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    directory = as_w4a16(checkpoint)
    dense = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=dense)
    expected = {name: tensor for name, tensor in state_of(model).items() if not name.endswith(QUANTIZED_SUFFIXES)}
    weights = ModelWeights.open(directory)
    assert set(weights.names) == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights.tensor(name).float(), tensor, atol=1e-7, rtol=0, msg=name)


def test_importance_is_by_module(finished_checkpoint: Path, checkpoint: Path) -> None:
    stored = {"model.layers.0.mlp.up_proj.importance": torch.rand(64)}
    save_file(stored, checkpoint / IMPORTANCE)
    importance = ModelWeights.open(checkpoint).importance()
    assert importance.keys() == {"model.layers.0.mlp.up_proj"}
    assert torch.equal(importance["model.layers.0.mlp.up_proj"], stored["model.layers.0.mlp.up_proj.importance"])
    assert ModelWeights.open(finished_checkpoint).importance() == {}


def test_tensors_stay_valid_after_their_pages_are_given_back(random_llama: Path) -> None:
    weights = ModelWeights.open(random_llama)
    tensor = weights.tensor("lm_head.weight")
    before = tensor.clone()
    weights.release()
    assert torch.equal(tensor, before)


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssFile")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_release_gives_the_files_pages_back(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"big.weight": torch.ones(1 << 25, dtype=torch.bfloat16)}, directory / "model.safetensors")
    weights = ModelWeights.open(directory)
    weights.tensor("big.weight").sum()
    held = resident_bytes()
    weights.release()
    assert resident_bytes() < held - (60 << 20)


def test_a_hub_id_is_found_in_the_local_cache(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(random_llama, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    weights = ModelWeights.open("somebody/model")
    assert weights.directory.name == "abc"
    assert "lm_head.weight" in weights


def test_a_residual_that_covers_a_part_is_fine(finished_checkpoint: Path) -> None:
    config = read_srd_config(finished_checkpoint)
    assert config is not None
    assert "lm_head" not in config.modules
    assert ModelWeights.open(finished_checkpoint).tensor("lm_head.weight").dtype is torch.bfloat16


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"layer_alphas": {}}, {"chunks": ["early"]}])
def test_a_dial_for_a_model_without_a_residual_is_refused(random_llama: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SRDError, match=f"has no residual .* so {next(iter(options))} cannot be applied"):
        ModelWeights.open(random_llama, **options)


def test_an_alpha_out_of_range_is_refused(finished_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="alpha is 2, expected a number from 0 to 1"):
        ModelWeights.open(finished_checkpoint, alpha=2)


def test_an_unknown_chunk_is_refused(finished_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="middle"):
        ModelWeights.open(finished_checkpoint, chunks=["middle"])


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SRDError, match="there is no such directory"):
        ModelWeights.open(tmp_path / "nowhere")


def test_another_quantization_is_refused(copy_of: Callable[[Path], Path], random_llama: Path) -> None:
    directory = copy_of(random_llama)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: the weights are quantized by 'gptq'"):
        ModelWeights.open(directory)


def test_a_truncated_file_is_refused(copy_of: Callable[[Path], Path], random_llama: Path) -> None:
    directory = copy_of(random_llama)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        ModelWeights.open(directory)


def test_whole_numbers_are_refused(copy_of: Callable[[Path], Path], random_llama: Path) -> None:
    directory = copy_of(random_llama)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int32, expected floating point"):
        ModelWeights.open(directory).tensor("model.norm.weight")


def test_an_unknown_tensor_is_refused(random_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        ModelWeights.open(random_llama).tensor("nothing")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))
