"""What is not streamed, and why; `test_streaming_run` has those that then go through `oneshot`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_gemma4_mixture, make_llama, make_mixtral, save_model
from safetensors.torch import load_file, save_file
from streamed import scheme, srd, write_recipe
from torch import Tensor

from srd_modifier.errors import SRDError
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import read_source
from srd_modifier.quantizing import load_recipe, quantize
from srd_modifier.streaming.originals import Originals
from srd_modifier.streaming.run import StreamedModel
from srd_modifier.streaming.suitable import why_model_unsuitable, why_recipe_unsuitable

OTHER_TENSORS = "QuantizationModifier saves other tensors than packed integers and their scales"


def preset(name: str, **settings: Any) -> dict[str, Any]:
    return {"scheme": name, "targets": ["Linear"], "ignore": ["lm_head"], **settings}


RECIPES: dict[str, tuple[tuple[tuple[str, dict[str, Any]], ...], str | None]] = {
    "SRD": ((("SRDModifier", srd()),), None),
    "SRD by a preset": ((("SRDModifier", preset("W4A16")),), None),
    "asymmetric": ((("SRDModifier", preset("W4A16_ASYM")),), None),
    "two": ((("SRDModifier", srd()), ("SRDModifier", srd())), None),
    "W4": ((("QuantizationModifier", preset("W4A16")),), None),
    "W8": ((("QuantizationModifier", preset("W8A16")),), None),
    "SRD of a quantizer": ((("SRDModifier", {}), ("QuantizationModifier", scheme())), None),
    "GPTQ": ((("GPTQModifier", scheme()),), "GPTQModifier is no round-to-nearest"),
    "SRD of GPTQ": ((("SRDModifier", {}), ("GPTQModifier", scheme())), "GPTQModifier is no round-to-nearest"),
    "SmoothQuant": (
        (("SmoothQuantModifier", {"mappings": []}), ("SRDModifier", srd())),
        "SmoothQuantModifier is no round-to-nearest",
    ),
    "feedback": ((("SRDModifier", srd(rounding="feedback")),), "SRDModifier needs calibration data"),
    "feedback base": ((("SRDModifier", srd(base_rounding="feedback")),), "SRDModifier needs calibration data"),
    "feedback of a quantizer": (
        (("SRDModifier", {"rounding": "feedback"}), ("QuantizationModifier", scheme())),
        "SRDModifier needs calibration data",
    ),
    "budget": (
        (("SRDModifier", scheme() | {"correct": {"budget": "5 bpw"}}),),
        "SRDModifier needs calibration data",
    ),
    "GGUF": ((("SRDModifier", srd(gguf="Q4_K_M")),), "a GGUF file is calibrated on data"),
    "static activations": ((("QuantizationModifier", preset("FP8")),), "QuantizationModifier needs calibration data"),
    "FP8": ((("QuantizationModifier", preset("FP8_DYNAMIC")),), OTHER_TENSORS),
    "FP8 blocks": ((("QuantizationModifier", preset("FP8_BLOCK")),), OTHER_TENSORS),
    "INT8": ((("QuantizationModifier", preset("INT8")),), OTHER_TENSORS),
    "W4A8": ((("QuantizationModifier", preset("W4A8")),), OTHER_TENSORS),
    "NVFP4": ((("QuantizationModifier", preset("NVFP4A16")),), OTHER_TENSORS),
    "MXFP4": ((("QuantizationModifier", preset("MXFP4A16")),), OTHER_TENSORS),
    "three bits": ((("QuantizationModifier", scheme(num_bits=3)),), OTHER_TENSORS),
    "one scale": ((("QuantizationModifier", scheme(num_bits=8, strategy="tensor", group_size=None)),), OTHER_TENSORS),
    "second of two": (
        (("SRDModifier", srd()), ("QuantizationModifier", preset("FP8_DYNAMIC"))),
        OTHER_TENSORS,
    ),
}


@pytest.mark.parametrize(("modifiers", "reason"), RECIPES.values(), ids=RECIPES)
def test_recipes(tmp_path: Path, modifiers: tuple[tuple[str, dict[str, Any]], ...], reason: str | None) -> None:
    assert why_recipe_unsuitable(load_recipe(write_recipe(tmp_path / "recipe.yaml", *modifiers))) == reason


def test_a_recipe_that_is_not_streamed_opens_no_file(tmp_path: Path, llama: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", ("GPTQModifier", scheme())))
    source = read_source(str(llama))
    for file in source.directory.iterdir():
        assert file.exists()
    object.__setattr__(source, "directory", tmp_path / "nowhere")
    assert StreamedModel(source, recipe).unsuitable == "GPTQModifier is no round-to-nearest"


def reason_of(directory: Path, change: Callable[[Any], None] = lambda model: None) -> str | None:
    source = read_source(str(directory))
    model = build_skeleton(source)
    change(model)
    from srd_modifier.checkpoint.base import BaseCheckpoint

    return why_model_unsuitable(model, Originals(BaseCheckpoint(directory), model))


def with_tensors(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(model, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_plain_model_is_streamed(llama: Path) -> None:
    assert reason_of(llama) is None


def test_a_tied_model_is_streamed(tmp_path: Path) -> None:
    assert reason_of(save_model(make_llama(tie_word_embeddings=True), tmp_path / "model")) is None


def test_a_missing_tensor(tmp_path: Path, llama: Path) -> None:
    model = with_tensors(llama, tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight"))
    assert reason_of(model) == "its files have no model.norm.weight"


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    gemma = save_model(make_gemma4_mixture(), tmp_path / "gemma")
    assert reason_of(gemma) == "its files have no model.layers.0.experts.0.up_proj.weight"
    mixtral = save_model(make_mixtral(), tmp_path / "mixtral")
    assert reason_of(mixtral) == "its files have no model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize("name", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_modules_that_stay_in_float32(llama: Path, name: str) -> None:
    reason = reason_of(llama, lambda model: setattr(model, name, {"norm"}))
    assert reason == "some of its modules stay in float32"


@pytest.mark.parametrize("name", ["num_mtp_layers", "mtp_num_hidden_layers"])
def test_multi_token_prediction(llama: Path, name: str) -> None:
    reason = reason_of(llama, lambda model: setattr(model.config, name, 1))
    assert reason == "its layers for multi-token prediction are copied after saving"


def test_a_head_that_equals_the_embedding(tmp_path: Path, llama: Path) -> None:
    equal = "its output head equals its embedding, and is tied to it when it is saved"
    model = with_tensors(
        llama, tmp_path / "equal", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert reason_of(model) == equal

    def nearly(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    assert reason_of(with_tensors(llama, tmp_path / "nearly", nearly)) is None


def test_heads_that_are_equal_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    """llm-compressor compares what was loaded, not what is stored."""
    model = save_model(make_llama(), tmp_path / "whole", torch.float32)
    changed = with_tensors(
        model,
        tmp_path / "rounded",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16().float()}),
    )
    assert reason_of(changed) is None
    path = changed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert reason_of(changed) == "its output head equals its embedding, and is tied to it when it is saved"


def test_tensors_that_the_config_ties_and_the_files_do_not(tmp_path: Path, llama: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert reason_of(model) == (
        "its files have both model.embed_tokens.weight and lm_head.weight, with other values, which its config ties"
    )
    same = with_tensors(
        model, tmp_path / "same", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert reason_of(same) is None


# what `resume` says of them


@pytest.mark.parametrize(
    ("modifiers", "options", "reason"),
    [
        ((("QuantizationModifier", preset("FP8_DYNAMIC")),), {}, OTHER_TENSORS),
        ((("SRDModifier", srd()),), {"pipeline": "sequential"}, "the pipeline is sequential"),
        (
            (("SRDModifier", {}), ("AutoRoundModifier", scheme())),
            {"dataset": "self"},
            "AutoRoundModifier keeps no layer as it was finished",
        ),
    ],
)
def test_resume_is_refused_where_nothing_is_kept(
    tmp_path: Path,
    llama: Path,
    modifiers: tuple[tuple[str, dict[str, Any]], ...],
    options: dict[str, Any],
    reason: str,
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", *modifiers)
    with pytest.raises(SRDError, match=rf"cannot be resumed, so leave --resume out: {reason}$"):
        quantize(str(llama), recipe, tmp_path / "out" / "checkpoint", resume=True, **options)
    assert not (tmp_path / "out").exists()
