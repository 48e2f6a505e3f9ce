"""Streamed checkpoints are those of llm-compressor's own path, byte for byte, with one decoder layer in memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import (
    TINY_LLAMA,
    make_gemma4_e2b,
    make_gemma4_mixture,
    make_llama,
    make_mixture,
    save_model,
)
from safetensors.torch import load_file, save_file
from small_models import write_model
from streamed import differing, scheme, srd, write_recipe
from torch import Tensor

from srd_modifier.checkpoint import base_writer
from srd_modifier.checkpoint.base_writer import BaseWriter
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.writer import SidecarWriter
from srd_modifier.errors import RecipeError
from srd_modifier.planning.modules import direct_tensors
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import ModelSource
from srd_modifier.quantizing import quantize
from srd_modifier.selection.depth import layer_of

Both = Callable[..., tuple[Path, Path, str | None]]

QUANTIZER = "QuantizationModifier"
SRD = "SRDModifier"
ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\..*_proj$"
CHANNEL = {"strategy": "channel", "group_size": None}
TIED: dict[str, Any] = {"tie_word_embeddings": True}

MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda path: save_model(make_llama(**TIED), path),
    "biases": lambda path: save_model(make_llama(attention_bias=True, mlp_bias=True), path),
    "float32": lambda path: save_model(make_llama(), path, torch.float32),
    "float16": lambda path: save_model(make_llama(), path, torch.float16),
    "float32 by config": lambda path: with_config(save_model(make_llama(), path), dtype="float32"),
    "float16 by config": lambda path: with_config(save_model(make_llama(), path), dtype="float16"),
    "bfloat16 by config": lambda path: with_config(save_model(make_llama(), path, torch.float32), dtype="bfloat16"),
    "no dtype in config": lambda path: with_config(save_model(make_llama(), path), dtype=None),
    "head only": lambda path: with_tensors(
        save_model(make_llama(**TIED), path), lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight"), **t}
    ),
    "tied and twice": lambda path: with_tensors(
        save_model(make_llama(**TIED), path), lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone(), **t}
    ),
    "mixed dtypes": lambda path: with_tensors(
        save_model(make_llama(), path), lambda t: {k: v.float() if "norm" in k else v for k, v in t.items()}
    ),
    "another tensor": lambda path: with_tensors(
        save_model(make_llama(), path), lambda t: {**t, "model.unused": torch.ones(3)}
    ),
    "a layer of zeros": lambda path: with_tensors(
        save_model(make_llama(), path), lambda t: {k: v * 0 if "layers.0" in k else v for k, v in t.items()}
    ),
    "several files": lambda path: with_tokenizer(
        make_llama().to(torch.bfloat16).save_pretrained(path, max_shard_size="200KB") or path
    ),
    "Qwen3-MoE": lambda path: save_model(make_mixture(num_experts=4), path),
    "Gemma 4 E2B": lambda path: save_model(make_gemma4_e2b(), path),
}
SMALL = ("smollm2", "mistral", "qwen2", "qwen3", "qwen3moe", "smollm3", "gemma4", "gemma4-e2b")

RECIPES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "asymmetric": ((SRD, srd(weights={"symmetric": False})),),
    "channels": ((SRD, srd(weights=CHANNEL)),),
    "mean squared error": ((SRD, srd(weights={"observer": "memoryless_mse"})),),
    "no residual": ((QUANTIZER, scheme()),),
    "eight bits": ((QUANTIZER, scheme(num_bits=8)),),
    "head": ((QUANTIZER, {**scheme(), "ignore": []}),),
    "head and residual": ((SRD, {**srd(), "ignore": []}),),
    "embedding": ((QUANTIZER, {**scheme("Linear", "Embedding"), "ignore": []}),),
    "one quantizes, one corrects": ((SRD, {"ignore": ["lm_head"]}), (QUANTIZER, scheme())),
    "different": (
        (SRD, srd(ATTENTION, residual_bits=4, alpha=0.5)),
        (SRD, srd(MLP, weights={"symmetric": False}, density=0.3, layer_alphas={"*down_proj": 0.25})),
    ),
    "one with, one without": ((SRD, srd(MLP)), (QUANTIZER, scheme(ATTENTION))),
    "four bits": ((SRD, srd(residual_bits=4)),),
    "two bits": ((SRD, srd(residual_bits=2)),),
    "five bits": ((SRD, srd(residual_bits=5, residual_group_size=20, scale_dtype="float32")),),
    "sparse": ((SRD, srd(density=0.2)),),
    "stochastic": ((SRD, srd(rounding="stochastic", seed=5)),),
    "dithered": ((SRD, srd(rounding="dithered", seed=5)),),
    "sparse and stochastic": ((SRD, srd(rounding="stochastic", density=0.5)),),
    "depth": ((SRD, srd(correct={"depth": [0.4, 0.77]})),),
    "chunks": ((SRD, srd(correct={"chunks": ["early", "governance"]})),),
}


def with_config(directory: Path, **changes: Any) -> Path:
    """Change config.json; None takes a key away."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return directory


def with_tensors(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Save the model's tensors anew, changed."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})
    return directory


def with_tokenizer(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory


def other_tensors(first: Path, second: Path) -> list[str]:
    """Names of the tensors that differ between two checkpoints of one file."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# the same bytes


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, work: Path, both: Both) -> None:
    streamed, whole, reason = both(MODELS[name](work / "model"), (SRD, srd()))
    assert reason is None
    assert differing(streamed, whole) == []
    Sidecar.open(streamed).verify()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, llama: Path, both: Both) -> None:
    streamed, whole, reason = both(llama, *RECIPES[name])
    assert reason is None
    assert differing(streamed, whole) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SMALL)
def test_families(name: str, dtype: str, work: Path, both: Both) -> None:
    model = with_tokenizer(write_model(name, work / "model", dtype=dtype))
    streamed, whole, reason = both(model, (SRD, srd(weights={"group_size": 8})))
    assert reason is None
    assert differing(streamed, whole) == []


@pytest.mark.parametrize("name", ["gemma3", "gemma3-pattern"])
def test_norms_with_an_offset_stay_as_they_are(name: str, work: Path, both: Both) -> None:
    """llm-compressor adds 1 to them and takes it away again, which rounds them; streaming leaves them alone."""
    model = with_tokenizer(write_model(name, work / "model", dtype="bfloat16"))
    original = load_file(model / "model.safetensors")
    streamed, whole, reason = both(model, (SRD, srd(weights={"group_size": 8})))
    assert reason is None
    rounded = other_tensors(streamed, whole)
    assert rounded
    assert all(tensor.endswith("norm.weight") for tensor in rounded)
    kept = load_file(streamed / "model.safetensors")
    assert all(torch.equal(kept[tensor], original[tensor].to(torch.bfloat16)) for tensor in rounded)
    # the digest of the base is all else that differs
    assert differing(streamed, whole) == ["config.json", "model.safetensors", "srd/residual.safetensors.index.json"]
    Sidecar.open(streamed).verify()


@pytest.mark.parametrize("model", ["biases", "tied", "Qwen3-MoE", "Gemma 4 E2B"])
@pytest.mark.parametrize("recipe", ["different", "head"])
def test_an_output_of_several_files(
    model: str, recipe: str, work: Path, both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their limit is 20 GB; here llm-compressor is told another one too, and the residual's is lower as well."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(base_writer, "MAX_FILE", "200KB")
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, folder, **options: save(self, folder, **options | {"max_shard_size": "200KB"}),
    )
    monkeypatch.setitem(SidecarWriter.__init__.__kwdefaults__, "max_shard_bytes", 20_000)
    streamed, whole, reason = both(MODELS[model](work / "model"), *RECIPES[recipe])
    assert reason is None
    assert differing(streamed, whole) == []
    assert len(list(streamed.glob("model-*.safetensors"))) > 1
    assert recipe == "head" or len(list((streamed / "srd").glob("residual-*.safetensors"))) > 1


def test_settings_of_generation_are_kept(work: Path, llama: Path, both: Both) -> None:
    model = Path(shutil.copytree(llama, work / "model"))
    path = model / "generation_config.json"
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5]}
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    streamed, whole, _ = both(model, (SRD, srd()))
    assert json.loads((streamed / "generation_config.json").read_text()).items() >= wanted.items()
    assert differing(streamed, whole) == []


def test_a_model_without_settings_of_generation(work: Path, llama: Path, both: Both) -> None:
    model = Path(shutil.copytree(llama, work / "model", ignore=shutil.ignore_patterns("generation_config.json")))
    streamed, whole, _ = both(model, (SRD, srd()))
    assert differing(streamed, whole) == []


def test_a_recipe_in_the_model_directory_is_kept(work: Path, llama: Path, both: Both) -> None:
    model = Path(shutil.copytree(llama, work / "model"))
    write_recipe(model / "recipe.yaml", (QUANTIZER, scheme("re:.*unknown")))
    streamed, whole, _ = both(model, (SRD, srd()))
    assert differing(streamed, whole) == []


# what is not streamed


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "W8A8", "NVFP4A16", "MXFP4A16"])
def test_other_formats_go_through_oneshot(name: str, work: Path, both: Both) -> None:
    model = save_model(make_llama(hidden_size=128, intermediate_size=256), work / "model")
    settings = {"targets": ["Linear"], "scheme": name, "ignore": ["lm_head"]}
    streamed, whole, reason = both(model, (QUANTIZER, settings))
    assert reason == "QuantizationModifier saves other tensors than packed integers and their scales"
    assert differing(streamed, whole) == []


def test_an_equal_head_is_tied_by_oneshot(work: Path, both: Both) -> None:
    model = with_tensors(
        save_model(make_llama(), work / "model"),
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()},
    )
    streamed, whole, reason = both(model, (SRD, srd()))
    assert reason == "its output head equals its embedding, and is tied to it when it is saved"
    assert differing(streamed, whole) == []
    assert "lm_head.weight" not in load_file(streamed / "model.safetensors")
    assert json.loads((streamed / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_that_the_config_ties_wrongly_is_kept_by_oneshot(work: Path, llama: Path, both: Both) -> None:
    """Transformers ties no two tensors of the files that differ, whatever config.json says."""
    model = with_config(Path(shutil.copytree(llama, work / "model")), tie_word_embeddings=True)
    streamed, whole, reason = both(model, (SRD, srd()))
    assert reason is not None
    assert reason.startswith("its files have both model.embed_tokens.weight and lm_head.weight, with other values")
    assert differing(streamed, whole) == []
    original = load_file(llama / "model.safetensors")
    assert torch.equal(load_file(streamed / "model.safetensors")["lm_head.weight"], original["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_stored_together_go_through_oneshot(dtype: torch.dtype, work: Path, both: Both) -> None:
    model = save_model(make_gemma4_mixture(), work / "model", dtype)
    streamed, whole, reason = both(model, (SRD, srd()))
    assert reason == "its files have no model.layers.0.experts.0.up_proj.weight"
    assert differing(streamed, whole) == []


# memory


@pytest.mark.parametrize("mixture", [False, True])
def test_one_decoder_layer_is_in_memory(
    mixture: bool, work: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, seen = [], []

    def build(source: ModelSource) -> Any:
        models.append(build_skeleton(source))
        return models[-1]

    def look() -> None:
        present = {
            name
            for name, module in models[0].named_modules()
            if any(tensor.device.type != "meta" for tensor in direct_tensors(module).values())
        }
        seen.append({layer_of(name) for name in present})

    monkeypatch.setattr("srd_modifier.streaming.run.build_skeleton", build)
    for writer in (BaseWriter, SidecarWriter):
        for call in ("write", "flush"):
            watch(monkeypatch, writer, call, look)
    model = save_model(make_mixture(num_experts=4), work / "model") if mixture else llama
    quantize(str(model), write_recipe(work / "recipe.yaml", (SRD, srd())), work / "out")
    assert max(map(len, seen)) == 1, "modules of two layers, or of none, are in memory together"
    assert {layer for layers in seen for layer in layers} == set(range(2 if mixture else 4))
    assert seen[-1] == set()


def watch(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, look: Callable[[], None]) -> None:
    """Look whenever a method is called."""
    method = getattr(owner, name)

    def watched(*args: Any) -> Any:
        look()
        return method(*args)

    monkeypatch.setattr(owner, name, watched)


# faults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_not_finite(value: float, symmetric: bool, work: Path, llama: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][3, 4] = value
        return tensors

    model = with_tensors(Path(shutil.copytree(llama, work / "model")), spoil)
    recipe = write_recipe(work / "recipe.yaml", (SRD, srd(weights={"symmetric": symmetric})))
    with pytest.raises(RecipeError, match=rf"^{name} has NaN or infinite entries; the model cannot be quantized$"):
        quantize(str(model), recipe, work / "out" / "checkpoint")
    assert list((work / "out").iterdir()) == []


def test_weights_that_are_on_the_grid_already(work: Path, llama: Path) -> None:
    """Codes times a power of two, which asymmetric groups hold exactly, with both ends of the range in each."""
    generator = torch.Generator().manual_seed(0)

    def snap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if "_proj" in name:
                codes = torch.randint(-8, 8, tensor.shape, generator=generator)
                codes[:, ::32], codes[:, 1::32] = -8, 7
                tensor.copy_(codes / 128)
        return tensors

    model = with_tensors(Path(shutil.copytree(llama, work / "model")), snap)
    recipe = write_recipe(work / "recipe.yaml", (SRD, srd(weights={"symmetric": False})))
    with pytest.raises(RecipeError, match="round-to-nearest lost nothing, its weights were on the 4-bit grid before"):
        quantize(str(model), recipe, work / "out" / "checkpoint")
    assert list((work / "out").iterdir()) == []


def test_what_llm_compressor_refuses_is_one_sentence(work: Path, llama: Path) -> None:
    recipe = write_recipe(work / "recipe.yaml", (QUANTIZER, scheme(group_size=48)))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: llm-compressor refuses it: .*not divisible") as caught:
        quantize(str(llama), recipe, work / "out" / "checkpoint")
    assert "\n" not in str(caught.value)
    assert list((work / "out").iterdir()) == []
