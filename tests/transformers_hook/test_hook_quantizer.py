import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import srd_modifier
from srd_modifier import SRDModifier, load_corrected, release, set_alpha
from srd_modifier.errors import CheckpointError, ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(params=["finished", "partial"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def directory(kind, finished_checkpoint, partial_checkpoint) -> Path:
    return {"finished": finished_checkpoint, "partial": partial_checkpoint}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_pretrained_gives_the_corrected_weights(dtype, kind, directory, partial_alphas, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    weights = by_hand(directory)
    assert len(weights.base) == (42 if kind == "finished" else 43)
    assert len(weights.residual) == (42 if kind == "finished" else 22)
    assert_weights(model, weights.weights(1.0 if kind == "finished" else partial_alphas))


def test_the_dtype_is_the_checkpoints_own_by_default(finished_checkpoint):
    assert AutoModelForCausalLM.from_pretrained(finished_checkpoint).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["finished", "partial", "subnormal", "float32"])
def test_alpha_zero_is_the_plain_model_bit_for_bit(name, dtype, request, plain, logits):
    directory = request.getfixturevalue(f"{name}_checkpoint")
    model = load_corrected(directory, alpha=0, dtype=DTYPES[dtype])
    expected = plain.tensors[name, dtype]
    different = [parameter for parameter, tensor in model.state_dict().items() if tensor.dtype != DTYPES[dtype]]
    assert not different
    different = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert not different
    assert torch.equal(logits(model), expected["logits"])
    set_alpha(model, 1)
    release(model)
    assert torch.equal(logits(model), expected["logits"])


def test_biases_and_a_float32_original(float32_checkpoint, by_hand, assert_weights):
    original = AutoModelForCausalLM.from_pretrained(float32_checkpoint.with_name("original"))
    model = AutoModelForCausalLM.from_pretrained(float32_checkpoint)
    assert model.dtype == torch.float32
    assert_weights(model, by_hand(float32_checkpoint).weights())
    for name, parameter in model.named_parameters():
        expected = original.get_parameter(name)
        if name.endswith("bias") or "_proj" not in name:
            assert torch.equal(parameter, expected), name
        else:
            assert 0 < (parameter - expected).abs().max() < 1e-4, name


def test_what_is_not_corrected_is_plain_w4_at_any_alpha(partial_checkpoint, partial_alphas, plain):
    state = AutoModelForCausalLM.from_pretrained(partial_checkpoint).state_dict()
    corrected = {f"{name}.weight" for name, alpha in partial_alphas.items() if alpha}
    assert len(corrected) == 21
    expected = plain.tensors["partial", "bfloat16"]
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]) is (name not in corrected), name


def test_the_correction_is_towards_the_original(finished_checkpoint, random_llama, plain, logits):
    original = logits(AutoModelForCausalLM.from_pretrained(random_llama)).float()
    corrected = logits(AutoModelForCausalLM.from_pretrained(finished_checkpoint)).float()
    w4 = plain.tensors["finished", "bfloat16"]["logits"].float()
    assert (corrected - original).norm() < 0.1 * (w4 - original).norm()


def test_without_the_plugin_nothing_mentions_our_files(plain):
    assert plain.stdout == "[]\n"  # none of our modules was imported
    assert not re.search("srd|weight_d8|sidecar|UNEXPECTED|MISSING|newly initialized", plain.stderr), plain.stderr


# --- an ordinary dense model


def test_nothing_quantized_is_left(finished_checkpoint, random_llama):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    dense = AutoModelForCausalLM.from_pretrained(random_llama)
    assert type(model) is type(dense)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(dense.named_buffers()).keys()
    for name, module in model.named_modules():
        other = dense.get_submodule(name)
        assert type(module._parameters) is dict, name  # nothing is offloaded or wrapped
        assert vars(module).keys() - {"is_quantized"} == vars(other).keys() - {"is_quantized"}, name
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert all(hook.__module__ == "srd_modifier.transformers.locking" for hook in hooks), name
    assert getattr(model, "hf_quantizer", None) is None
    assert not model.is_quantized
    assert not hasattr(model.config, "srd_config")
    assert not hasattr(model.config, "quantization_config")
    assert model.training is dense.training is False
    found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert found == {name: parameter.requires_grad for name, parameter in dense.named_parameters()}


def test_a_copy_is_the_same_model(finished_checkpoint, logits):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    set_alpha(model, 0)  # the original's dial is the original's
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)


def test_it_can_be_pickled(finished_checkpoint, logits, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


def test_it_can_be_trained(finished_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, dtype=torch.float32)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    weight = model.get_submodule("model.layers.3.mlp.down_proj").weight
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_it_generates(finished_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    assert model.generate(torch.arange(1, 8)[None], max_new_tokens=4, do_sample=False).shape[1] > 7


# --- saved again


def test_a_saved_copy_is_an_honest_dense_checkpoint(finished_checkpoint, resaved, by_hand, assert_weights):
    config = json.loads((resaved / "config.json").read_text())
    assert "srd_config" not in config
    assert "quantization_config" not in config
    assert not (resaved / "srd").exists()
    model = AutoModelForCausalLM.from_pretrained(resaved)
    assert_weights(model, by_hand(finished_checkpoint).weights())
    with pytest.raises(srd_modifier.errors.SRDError, match="this LlamaForCausalLM has no residual"):
        set_alpha(model, 0.5)


def test_a_saved_copy_needs_no_plugin(finished_checkpoint, plain, logits):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    found = plain.tensors["resaved", "bfloat16"]
    assert found.keys() == {*model.state_dict(), "logits"}  # no scales left over
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(found["logits"], logits(model))


def test_a_copy_saved_at_another_alpha_has_that_alpha(finished_checkpoint, by_hand, assert_weights, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    set_alpha(model, 0.25)
    model.save_pretrained(tmp_path / "quarter")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "quarter")
    assert_weights(saved, by_hand(finished_checkpoint).weights(0.25))


# --- ways to load


def test_tied_embeddings_stay_tied(tied_checkpoint, tiny_llama, plain, logits, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_weights(model, by_hand(tied_checkpoint).weights())
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    error = (logits(model) - logits(original)).float().norm()
    assert error < 0.2 * (plain.tensors["tied", "bfloat16"]["logits"] - logits(original)).float().norm()
    set_alpha(model, 0)
    assert torch.equal(logits(model), plain.tensors["tied", "bfloat16"]["logits"])


def test_a_model_without_its_head(kind, directory, partial_alphas, by_hand, assert_weights):
    def headless(weights):
        return {name.removeprefix("model."): weight for name, weight in weights.items() if name != "lm_head"}

    model = AutoModel.from_pretrained(directory)
    assert isinstance(model, LlamaModel)
    weights = by_hand(directory)
    assert_weights(model, headless(weights.weights(1.0 if kind == "finished" else partial_alphas)))
    set_alpha(model, 0.5)
    assert_weights(model, headless(weights.weights(0.5)))
    release(model)
    assert_weights(model, headless(weights.base))


@pytest.mark.parametrize("rounding", ["dithered", "stochastic"])
def test_noise_does_not_depend_on_the_names_in_the_model(rounding, quantize, group_scheme, random_llama, tmp_path):
    # without the head the modules have other names, and the noise is drawn by name
    recipe = SRDModifier(config_groups=group_scheme(32), ignore=["lm_head"], rounding=rounding, seed=3)
    directory = quantize(recipe, tmp_path / "model")
    whole, headless = AutoModelForCausalLM.from_pretrained(directory), AutoModel.from_pretrained(directory)
    original = AutoModel.from_pretrained(random_llama)
    for name, weight in headless.named_parameters():
        assert torch.equal(weight, whole.get_parameter(f"model.{name}"))
        torch.testing.assert_close(weight, original.get_parameter(name), rtol=2**-8, atol=1e-4)


def test_the_models_own_class(finished_checkpoint, by_hand, assert_weights):
    assert_weights(LlamaForCausalLM.from_pretrained(finished_checkpoint), by_hand(finished_checkpoint).weights())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map(device_map, finished_checkpoint, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, device_map=device_map)
    assert {type(module._parameters) for module in model.modules()} == {dict}  # there is nowhere to offload to
    assert_weights(model, by_hand(finished_checkpoint).weights())
    set_alpha(model, 0.5)
    assert_weights(model, by_hand(finished_checkpoint).weights(0.5))


def test_layers_that_live_on_the_disk(finished_checkpoint, logits, tmp_path):
    device_map = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    device_map |= {f"model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(6)}
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, device_map=device_map, offload_folder=tmp_path)
    ordinary = AutoModelForCausalLM.from_pretrained(finished_checkpoint)
    assert torch.equal(logits(model), logits(ordinary))
    set_alpha(model, 0.5)
    set_alpha(ordinary, 0.5)
    assert torch.equal(logits(model), logits(ordinary))


def test_a_quantization_config_that_dequantizes(finished_checkpoint, by_hand, assert_weights):
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        model = AutoModelForCausalLM.from_pretrained(
            finished_checkpoint, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert_weights(model, by_hand(finished_checkpoint).weights())


def test_a_config_object_can_be_used_again(finished_checkpoint, by_hand, assert_weights):
    config = AutoConfig.from_pretrained(finished_checkpoint)
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, config=config)
        assert_weights(model, by_hand(finished_checkpoint).weights())
    assert config.srd_config["version"] == 2


def test_a_checkpoint_without_a_residual_loads_as_ever(finished_checkpoint, plain, logits, tmp_path):
    directory = Path(shutil.copytree(finished_checkpoint, tmp_path / "plain"))
    shutil.rmtree(directory / "srd")
    config = json.loads((directory / "config.json").read_text())
    del config["srd_config"]
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(model), plain.tensors["finished", "bfloat16"]["logits"])
    with pytest.raises(srd_modifier.errors.SRDError, match="has no residual"):
        set_alpha(model, 0.5)


def test_a_sharded_base(finished_checkpoint, by_hand, assert_weights, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(finished_checkpoint, tmp_path / "sharded"))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2, 3):
        part = {name: tensor for position, (name, tensor) in enumerate(tensors.items()) if position % 3 == number - 1}
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert_weights(model, by_hand(finished_checkpoint).weights())


# --- the dial as an argument of from_pretrained


def test_alpha_through_srd_config(finished_checkpoint, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, srd_config={"alpha": 0.5})
    assert_weights(model, by_hand(finished_checkpoint).weights(0.5))


def test_layer_alphas_and_chunks_through_srd_config(finished_checkpoint, by_hand, assert_weights):
    settings = {"layer_alphas": {"re:.*down_proj": 0.5}, "chunks": ["early", "governance"]}
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, srd_config=settings)
    weights = by_hand(finished_checkpoint)
    alphas = {
        name: 0.5 if name.endswith("down_proj") else 1.0
        for name in weights.residual
        if re.match(r"model\.layers\.[015]\.", name)
    }
    assert_weights(model, weights.weights(alphas))


def test_an_empty_srd_config_overrides_nothing(finished_checkpoint, by_hand, assert_weights):
    model = AutoModelForCausalLM.from_pretrained(finished_checkpoint, srd_config={})
    assert_weights(model, by_hand(finished_checkpoint).weights())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4}, "srd_config.bits cannot be set when loading, only alpha, layer_alphas, chunks"),
        ({"group_size": 128}, "srd_config.group_size cannot be set when loading"),
        ({"base_digest": "sha256:0"}, "srd_config.base_digest cannot be set when loading"),
        ({"sidecar": "../elsewhere.json"}, "srd_config.sidecar cannot be set when loading"),
        ({"speed": 11}, "srd_config.speed cannot be set when loading"),
        ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"alpha": True}, "alpha is True, expected a number from 0 to 1"),
        ({"layer_alphas": {"re:.*": -1}}, r"layer_alphas\['re:\.\*'\] is -1, expected a number from 0 to 1"),
        ({"chunks": ["late"]}, "chunk 'late' is unknown"),
    ],
    ids=str,
)
def test_what_cannot_be_set_is_refused(settings, message, finished_checkpoint):
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(finished_checkpoint, srd_config=settings)


# --- never plain W4 quietly


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, **values: object) -> None:
    config = json.loads(path.read_text())
    config["srd_config"] |= values
    path.write_text(json.dumps(config))


SHARD = "srd/residual-00001-of-00001.safetensors"
INDEX = "srd/residual.safetensors.index.json"
DAMAGE = {
    "bit-flip-in-the-codes": (lambda d, _: flip(d / SHARD, -1), r"residual-00001.* does not match its digest"),
    "bit-flip-in-the-base": (lambda d, _: flip(d / "model.safetensors", -1), "belongs to another base"),
    "missing-shard": (lambda d, _: (d / SHARD).unlink(), "residual-00001-of-00001.safetensors is missing"),
    "missing-index": (lambda d, _: (d / INDEX).unlink(), "residual.safetensors.index.json is missing"),
    "missing-sidecar": (lambda d, _: shutil.rmtree(d / "srd"), "residual.safetensors.index.json is missing"),
    "truncated-shard": (lambda d, _: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-8]), "is truncated"),
    "other-base": (
        lambda d, other: shutil.copy(other / "model.safetensors", d / "model.safetensors"),
        "belongs to another base",
    ),
    "other-sidecar": (
        lambda d, other: shutil.copytree(other / "srd", d / "srd", dirs_exist_ok=True),
        "srd_config promises it|belongs to another base|residual.safetensors.index.json",
    ),
    "newer-version": (lambda d, _: edit(d / "config.json", version=3), "version is 3, .* reads 2; upgrade"),
    "older-version": (lambda d, _: edit(d / "config.json", version=1), "version is 1, .* reads 2; quantize again"),
    "unknown-setting": (lambda d, _: edit(d / "config.json", colour="red"), "unknown residual setting 'colour'"),
    "module-promised-in-vain": (
        lambda d, _: edit(d / "config.json", modules=["model.layers.9.mlp.up_proj"]),
        r"model\.layers\.9\.mlp\.up_proj\.weight_d8 is missing, srd_config promises it",
    ),
}


LOADERS = {
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "load_corrected": load_corrected,
    "alpha-0": lambda directory: load_corrected(directory, alpha=0),
}


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damage, how, checkpoint, partial_checkpoint):
    change, message = DAMAGE[damage]
    change(checkpoint, partial_checkpoint)
    if damage == "bit-flip-in-the-codes" and how == "alpha-0":
        LOADERS[how](checkpoint)  # the codes are not read, and not needed
        return
    with pytest.raises(CheckpointError, match=message):
        LOADERS[how](checkpoint)


def test_a_residual_for_a_module_that_the_model_does_not_have(checkpoint):
    from transformers import LlamaConfig

    config = AutoConfig.from_pretrained(checkpoint)
    assert isinstance(config, LlamaConfig)
    config.num_hidden_layers = 5
    with pytest.raises(CheckpointError, match=r"layers\.5\..*, which LlamaForCausalLM does not have"):
        AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
