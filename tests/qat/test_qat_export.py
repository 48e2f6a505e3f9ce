"""Exports of a model that was trained: read back by the libraries that will read them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pack_quantized import all_w4
from random_models import make_llama, save_model
from safetensors.torch import load_file
from small_models import numbered_vocabulary, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf import plan
from srd_modifier.gguf.ggml import GGMLType, quantize
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.qat.exports.dense import export_dense
from srd_modifier.qat.exports.gguf import export_converted_gguf, export_trained_gguf
from srd_modifier.qat.exports.srd import export_srd
from srd_modifier.qat.exports.w4a16 import export_w4a16
from srd_modifier.qat.gguf_start import calibrated_gguf
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.linear import fake_quantize, finish
from srd_modifier.qat.start import nearest_w4
from srd_modifier.residual import ResidualFormat
from srd_modifier.transformers import load_corrected

GROUP = 32
Q_PROJ = "model.layers.0.self_attn.q_proj"
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def load(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


@torch.no_grad()
def train(model):
    """What training does to a model: everything that is not frozen has moved."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return finish(model)


def start_training(model, start):
    start.apply(model)
    fake_quantize(model, start.grids)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def original(request, tmp_path_factory):
    model = make_llama(tie_word_embeddings=request.param, attention_bias=True)
    return save_model(model, tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="module")
def trained(original):
    """A model, its grids and its tokenizer: for reading only."""
    model = load(original)
    start_training(model, nearest_w4(model, group_size=GROUP))
    return model, train(model), AutoTokenizer.from_pretrained(original)


@pytest.fixture(scope="module")
def small_start(tmp_path_factory):
    """The start of a model that K-quants divide, from a file that ggml made."""
    folder = tmp_path_factory.mktemp("gguf")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_bias": True}
    directory = save_model(make_llama(**sizes), folder / "wide")
    return directory, calibrated_gguf(str(directory), None, FileType.Q4_K_M, folder)


@pytest.fixture
def trained_gguf(small_start):
    """A model that was trained on the blocks of its start."""
    directory, start = small_start
    model = start_training(load(directory), start)
    train(model)
    return model, start


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def gguf_tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# a Transformers directory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dense_model_loads_as_any_other(original, trained, tmp_path, dtype):
    model, _, tokenizer = trained
    export_dense(model, tokenizer, tmp_path / "dense", dtype=dtype)
    assert names(tmp_path) == ["dense"]
    assert names(tmp_path / "dense") == FILES
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert stored.keys() == load_file(original / "model.safetensors").keys()
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert loaded.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype))


def test_the_model_stays_as_it_was(trained, tmp_path):
    model, _, tokenizer = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtype = model.config.dtype
    export_dense(model, tokenizer, tmp_path / "dense")
    assert model.config.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_existing_directory_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="already exists"):
        export_dense(model, tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="already exists"):
        export_w4a16(model, grids, tokenizer, tmp_path)
    export_dense(model, tokenizer, tmp_path, overwrite=True)
    assert names(tmp_path) == FILES


def test_a_model_that_is_not_finished_is_refused(original, small_start, tmp_path):
    model = load(original)
    tokenizer = AutoTokenizer.from_pretrained(original)
    start = nearest_w4(model, group_size=GROUP)
    start_training(model, start)
    _, of_file = small_start
    exports = (
        lambda: export_dense(model, tokenizer, tmp_path / "model"),
        lambda: export_w4a16(model, start.grids, tokenizer, tmp_path / "model"),
        lambda: export_srd(model, start.grids, {}, tokenizer, tmp_path / "model"),
        lambda: export_trained_gguf(model, of_file, tmp_path / "model"),
        lambda: export_converted_gguf(model, tokenizer, tmp_path / "model", FileType.Q8_0),
    )
    for export in exports:
        with pytest.raises(SRDError, match=r"q_proj is still fake-quantized; call finish\(model\)"):
            export()
    assert not names(tmp_path)


# W4A16


def test_codes_and_scales_are_the_trained_ones(trained, tmp_path):
    model, grids, tokenizer = trained
    export_w4a16(model, grids, tokenizer, tmp_path / "w4")
    assert names(tmp_path) == ["w4"]
    assert names(tmp_path / "w4") == FILES
    stored = load_file(tmp_path / "w4" / "model.safetensors")
    packed = all_w4(stored)
    assert packed.keys() == grids.keys()
    for name, weight in packed.items():
        assert torch.equal(weight, model.get_submodule(name).weight.double())
        assert torch.equal(stored[f"{name}.weight_scale"], grids[name].scale.bfloat16())
    others = {tensor.dtype for name, tensor in stored.items() if not name.endswith(("_packed", "_shape"))}
    assert others == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not model.config.tie_word_embeddings


def test_transformers_computes_with_the_trained_weights(trained, tmp_path):
    model, grids, tokenizer = trained
    export_w4a16(model, grids, tokenizer, tmp_path / "w4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "w4")
    export_dense(model, tokenizer, tmp_path / "dense")
    dense = load(tmp_path / "dense", torch.bfloat16)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        found = loaded(ids).logits  # what is packed is unpacked by the first forward pass
        expected = dense(ids).logits
    assert loaded.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    assert torch.equal(found, expected)


def test_the_configuration_is_llm_compressors(original, trained, tmp_path, quantize, group_scheme):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, grids, tokenizer = trained
    export_w4a16(model, grids, tokenizer, tmp_path / "ours")
    recipe = QuantizationModifier(config_groups=group_scheme(GROUP), ignore=["lm_head"])
    theirs = quantize(recipe, tmp_path / "theirs", model=original)
    ours, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", theirs))
    for config in (ours, expected):
        # which observer found the scales is no matter of the format
        config["quantization_config"]["config_groups"]["group_0"]["weights"].pop("observer")
    assert ours == expected
    shapes = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (tmp_path / "ours", theirs)
    ]
    assert shapes[0] == shapes[1]


def test_a_grid_with_mins_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    scale = grids[Q_PROJ].scale
    with pytest.raises(ConfigError, match=r"q_proj was trained on a grid of levels 0 to 15 with mins, .* as GGUF"):
        export_w4a16(model, {**grids, Q_PROJ: Grid(scale, 0, 15, scale)}, tokenizer, tmp_path / "w4")


def test_scales_that_would_be_rounded_are_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    grid = Grid(grids[Q_PROJ].scale * 1.001, -8, 7)
    with pytest.raises(ConfigError, match="q_proj was trained with scales that are no bfloat16 numbers"):
        export_w4a16(model, {**grids, Q_PROJ: grid}, tokenizer, tmp_path / "w4")


def test_mixed_group_sizes_are_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    grid = Grid(grids[Q_PROJ].scale[:, :1], -8, 7)
    with pytest.raises(ConfigError, match=r"needs one group size for all modules, got 64 \(.*q_proj\), 32 \("):
        export_w4a16(model, {**grids, Q_PROJ: grid}, tokenizer, tmp_path / "w4")
    with pytest.raises(ConfigError, match="got no grid"):
        export_w4a16(model, {}, tokenizer, tmp_path / "w4")


def test_a_weight_off_its_grid_is_refused(original, trained, tmp_path):
    _, grids, tokenizer = trained
    with pytest.raises(SRDError, match=r"q_proj\.weight is not on the grid that it is exported to"):
        export_w4a16(load(original), grids, tokenizer, tmp_path / "w4")
    assert not names(tmp_path)


def test_a_grid_of_no_module_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    with pytest.raises(SRDError, match=r"the model has no module model\.nothing with a weight"):
        export_w4a16(model, {**grids, "model.nothing": grids[Q_PROJ]}, tokenizer, tmp_path / "w4")


# SRD


@pytest.fixture(scope="module")
def srd(original, trained, tmp_path_factory):
    model, grids, tokenizer = trained
    weights = load_file(original / "model.safetensors")
    output = tmp_path_factory.mktemp("srd") / "checkpoint"
    export_srd(model, grids, lambda name: weights[f"{name}.weight"], tokenizer, output)
    assert names(output.parent) == ["checkpoint"]
    return output


def test_alpha_0_is_the_trained_model(trained, srd):
    model, grids, _ = trained
    loaded = load_corrected(srd, alpha=0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    assert all_w4(load_file(srd / "model.safetensors")).keys() == grids.keys()


def test_alpha_1_is_the_original_model(original, trained, srd):
    model, grids, _ = trained
    loaded, before = load_corrected(srd, dtype=torch.float32), load(original)
    for name in grids:
        weight, wanted, w4 = (m.get_submodule(name).weight.detach() for m in (loaded, before, model))
        residual = (wanted - w4).view(len(w4), -1, 64)
        # half a step of the largest entry's 127th part, its scale in bfloat16
        step = residual.abs().amax(-1, keepdim=True) / 127 * 1.01
        assert bool(((weight - wanted).view_as(residual).abs() <= 0.51 * step + 1e-3 * residual.abs() + 1e-7).all())
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight.bfloat16().float())


def test_the_checkpoint_verifies(srd):
    sidecar = Sidecar.open(srd)
    sidecar.verify()
    assert sidecar.config.format == ResidualFormat(bits=8, group_size=64)


def test_the_residual_can_be_of_another_format(original, trained, tmp_path):
    model, grids, tokenizer = trained
    weights = load_file(original / "model.safetensors")
    originals = {name: weights[f"{name}.weight"] for name in grids}
    export_srd(model, grids, originals, tokenizer, tmp_path / "srd", fmt=ResidualFormat(bits=4), alpha=0.5)
    sidecar = Sidecar.open(tmp_path / "srd")
    sidecar.verify()
    assert (sidecar.config.format.bits, sidecar.config.alpha) == (4, 0.5)


def test_a_missing_original_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    with pytest.raises(ConfigError, match=r"there is no original weight of .*q_proj, to which"):
        export_srd(model, grids, {}, tokenizer, tmp_path / "srd")
    assert not names(tmp_path)


def test_an_original_of_another_shape_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    with pytest.raises(ConfigError, match=r"original weight of .*q_proj is \[2, 2\], expected \[64, 64\]"):
        export_srd(model, grids, lambda name: torch.zeros(2, 2), tokenizer, tmp_path / "srd")


def test_an_original_that_is_not_finite_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    with pytest.raises(ConfigError, match=r"q_proj: .*finite"):
        export_srd(model, grids, lambda name: weight_like(model, name) / 0, tokenizer, tmp_path / "srd")


def test_feedback_is_refused(trained, tmp_path):
    model, grids, tokenizer = trained
    fmt = ResidualFormat(bits=4, rounding="feedback")
    with pytest.raises(ConfigError, match="q_proj: rounding 'feedback' needs the Hessian"):
        export_srd(model, grids, lambda name: weight_like(model, name), tokenizer, tmp_path / "srd", fmt=fmt)


def weight_like(model, name):
    return torch.ones_like(model.get_submodule(name).weight)


# GGUF


def test_a_file_has_the_trained_weights(trained_gguf, tmp_path):
    model, start = trained_gguf
    summary = export_trained_gguf(model, start, tmp_path / "trained.gguf")
    assert names(tmp_path) == ["trained.gguf"]
    read = dict(build_model(GGUFFile(tmp_path / "trained.gguf"), torch.float32).named_parameters())
    before = dict(build_model(GGUFFile(start.path), torch.float32).named_parameters())
    assert read.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(read[name], parameter)
        assert torch.equal(read[name], before[name]) is (name in start.values)
    assert summary.bytes == start.path.stat().st_size


def test_untrained_tensors_and_scales_keep_their_bytes(trained_gguf, tmp_path):
    model, start = trained_gguf
    export_trained_gguf(model, start, tmp_path / "trained.gguf")
    old, new = gguf_tensors(start.path), gguf_tensors(tmp_path / "trained.gguf")
    assert [(name, t.tensor_type, list(t.shape)) for name, t in old.items()] == [
        (name, t.tensor_type, list(t.shape)) for name, t in new.items()
    ]
    for name in ("token_embd.weight", "output.weight"):
        assert np.array_equal(old[name].data, new[name].data)
    blocks = [tensors["blk.0.attn_q.weight"].data.reshape(-1, 144) for tensors in (old, new)]
    assert np.array_equal(blocks[0][:, :16], blocks[1][:, :16])  # of Q4_K: scales first, then the levels
    assert not np.array_equal(blocks[0][:, 16:], blocks[1][:, 16:])


def test_the_file_says_that_it_was_trained(trained_gguf, tmp_path):
    model, start = trained_gguf
    summary = export_trained_gguf(model, start, tmp_path / "trained.gguf")
    old, new = GGUFFile(start.path).metadata, GGUFFile(tmp_path / "trained.gguf").metadata
    assert new["srd.method"] == summary.method.value == "training"
    assert {key for key in old if old[key] != new[key]} == {"srd.method", "srd.padding"}


def test_a_calibrated_start_keeps_its_text_and_its_size(tmp_path):
    directory = save_model(make_llama(), tmp_path / "model")
    ids = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    start = calibrated_gguf(str(directory), ids, FileType.Q4_K_M, tmp_path, source="four samples")
    model = start_training(load(directory), start)
    train(model)
    summary = export_trained_gguf(model, start, tmp_path / "trained.gguf")
    assert summary.bytes == start.path.stat().st_size
    assert GGUFFile(summary.path).metadata["srd.calibration.text"] == "four samples"
    read = dict(build_model(GGUFFile(summary.path), torch.float32).named_parameters())
    assert all(torch.equal(read[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", ["qwen3", "smollm2", "smollm3", "gemma3", "gemma4-e2b"])
def test_every_family_is_trained_in_its_own_order(tmp_path, monkeypatch, family):
    monkeypatch.setattr(plan, "read_vocabulary", lambda directory, config, *, rows: numbered_vocabulary(rows))
    directory = write_model(family, tmp_path / "model")
    start = calibrated_gguf(str(directory), None, FileType.Q4_K_M, tmp_path)
    model = start_training(load(directory), start)
    train(model)
    export_trained_gguf(model, start, tmp_path / "trained.gguf")
    read = dict(build_model(GGUFFile(tmp_path / "trained.gguf"), torch.float32).named_parameters())
    assert read.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in start.grids or name in start.values:
            assert torch.equal(read[name], parameter)
        else:  # F32, but for what the file type keeps in BF16, and Gemma's norms are stored as sums with 1
            torch.testing.assert_close(read[name], parameter, rtol=2**-8, atol=1e-6)


def test_a_weight_off_its_blocks_is_refused(trained_gguf, tmp_path):
    model, start = trained_gguf
    model.get_submodule(Q_PROJ).weight.data[3, 5] += 1e-4
    with pytest.raises(SRDError, match=r"q_proj\.weight is not on the grid that it is exported to"):
        export_trained_gguf(model, start, tmp_path / "trained.gguf")
    assert not names(tmp_path)


def test_an_embedding_that_was_trained_after_all_is_refused(trained_gguf, tmp_path):
    model, start = trained_gguf
    model.model.embed_tokens.weight.data += 1e-3
    with pytest.raises(SRDError, match=r"model\.embed_tokens\.weight is not what .*start\.gguf stores"):
        export_trained_gguf(model, start, tmp_path / "trained.gguf")


def test_a_start_whose_file_is_gone_is_refused(trained_gguf, tmp_path):
    from dataclasses import replace

    model, start = trained_gguf
    with pytest.raises(CheckpointError, match=r"gone\.gguf: there is no such file"):
        export_trained_gguf(model, replace(start, path=tmp_path / "gone.gguf"), tmp_path / "trained.gguf")


def test_a_model_without_a_tensor_of_the_file_is_refused(trained_gguf, tmp_path):
    model, start = trained_gguf
    del model.model.norm.weight
    with pytest.raises(SRDError, match=r"the trained model has no model\.norm\.weight"):
        export_trained_gguf(model, start, tmp_path / "trained.gguf")


def test_an_existing_file_is_refused(trained_gguf, trained, tmp_path):
    model, start = trained_gguf
    path = tmp_path / "trained.gguf"
    path.write_bytes(b"something")
    with pytest.raises(SRDError, match="already exists"):
        export_trained_gguf(model, start, path)
    with pytest.raises(SRDError, match="already exists"):
        export_converted_gguf(trained[0], trained[2], path, FileType.Q8_0)
    export_trained_gguf(model, start, path, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_any_other_type_is_rounded_by_ggml(trained, tmp_path):
    model, _, tokenizer = trained
    export_converted_gguf(model, tokenizer, tmp_path / "Trained-Model.gguf", FileType.Q8_0)
    assert names(tmp_path) == ["Trained-Model.gguf"]
    found = gguf_tensors(tmp_path / "Trained-Model.gguf")["blk.1.ffn_down.weight"]
    expected = quantize(model.model.layers[1].mlp.down_proj.weight, GGMLType.Q8_0)
    assert np.array_equal(found.data, expected)
    metadata = GGUFFile(tmp_path / "Trained-Model.gguf").metadata
    assert (metadata["srd.method"], metadata["general.name"]) == ("weight-error", "Trained Model")
