"""Where training starts, held against what other code makes of the same files."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from pack_quantized import all_w4
from random_models import make_llama, make_mixture, save_model
from rtn import write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from srd_modifier.errors import CheckpointError, ConfigError, MissingExtraError, SRDError
from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.qat.gguf_start import calibrated_gguf, gguf_file, stored_type
from srd_modifier.qat.start import Start, calibrated_w4, nearest_w4, w4_checkpoint

# rows of whole K-quant blocks, heads that RoPE reorders, biases that it reorders too
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_bias": True, "uneven_norms": True}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(make_llama(), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_model(make_llama(**WIDE), tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def wide_gguf(wide):
    """The wide model as ggml rounds it, in Q4_K and Q6_K."""
    path = wide.with_name("wide.gguf")
    export_gguf(wide, path, file_type=FileType.Q4_K_M)
    return path


def load(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def samples(count=8, length=32):
    return torch.randint(4096, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


def values(start):
    return {name: grid.values(start.levels[name]) for name, grid in start.grids.items()}


# rounding to nearest


def test_nearest_takes_every_linear_module_but_the_head(small):
    start = nearest_w4(load(small), group_size=32)
    assert len(start.grids) == len(start.levels) == 14
    assert "lm_head" not in start.grids
    assert not start.values
    for name, weight in values(start).items():
        original = load_file(small / "model.safetensors")[f"{name}.weight"].float()
        scale = start.grids[name].scale
        assert start.levels[name].dtype == torch.int8
        assert scale.shape == (len(original), original.shape[1] // 32)
        assert torch.equal(scale, scale.bfloat16().float())
        # within half a step, or clipped at the end of the range
        step = scale.abs().repeat_interleave(32, 1)
        clipped = (start.levels[name] == 7) | (start.levels[name] == -8)
        assert bool((((weight - original).abs() <= 0.5001 * step) | clipped).all())


def test_nearest_loses_less_than_scales_by_the_largest_entry(small):
    model = load(small)
    ours = values(nearest_w4(model, group_size=32))
    for name, weight in ours.items():
        original = model.get_submodule(name).weight.detach()
        grouped = original.view(len(original), -1, 32)
        scale = grouped.abs().amax(-1, keepdim=True) / 7.5
        plain = ((grouped / scale).round().clamp(-8, 7) * scale).flatten(1)
        assert (weight - original).square().sum() < 0.95 * (plain - original).square().sum()


def test_nearest_ignores_what_it_is_told_to(small):
    start = nearest_w4(load(small), group_size=32, ignore=[Q_PROJ, r"re:.*down_proj"])
    assert len(start.grids) == 11
    assert not [name for name in start.grids if name == Q_PROJ or "down_proj" in name]


def test_a_group_size_that_does_not_divide_is_refused(small):
    with pytest.raises(
        ConfigError, match=r"groups of 48 do not divide the 64 columns of .*q_proj \(14 modules in all\)"
    ):
        nearest_w4(load(small), group_size=48)


def test_a_group_size_of_nothing_is_refused(small):
    with pytest.raises(ConfigError, match="group size is 0, expected at least 1"):
        nearest_w4(load(small), group_size=0)


def test_a_model_with_nothing_left_is_refused(small):
    with pytest.raises(ConfigError, match="no Linear module is left to quantize"):
        nearest_w4(load(small), ignore=["re:.*"])


def test_a_mixture_of_stacked_experts_is_refused():
    with pytest.raises(ConfigError, match=r"mlp\.experts\.\w+ holds the experts of a mixture in one tensor"):
        nearest_w4(make_mixture(num_experts=4), group_size=32)


def test_a_weight_that_is_not_finite_is_refused(small):
    model = load(small)
    model.get_submodule(Q_PROJ).weight.data[1, 2] = torch.inf
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has NaN or infinite entries"):
        nearest_w4(model, group_size=32)


# putting it into a model


def test_apply_keeps_levels_and_moves_no_weight_that_has_its_own(small):
    start = nearest_w4(load(small), group_size=32)
    moved = start.levels[Q_PROJ].clone()
    moved[0, 0] += 1 if moved[0, 0] < 7 else -1
    start.levels[Q_PROJ] = moved
    model, original = load(small), load(small)
    start.apply(model)
    for name, grid in start.grids.items():
        weight, before = (m.get_submodule(name).weight.detach() for m in (model, original))
        steps = weight.view(len(weight), -1, 32) / torch.where(grid.scale == 0, torch.inf, grid.scale).unsqueeze(-1)
        assert torch.equal(steps.round().clamp(-8, 7).flatten(1), start.levels[name].float())
        assert (weight == before).float().mean() > 0.9
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert model.get_submodule(Q_PROJ).weight.requires_grad


def test_apply_puts_values_in_and_freezes_them(small):
    model = load(small)
    embedding = torch.randn(model.model.embed_tokens.weight.shape)
    Start({}, {}, {"model.embed_tokens.weight": embedding}).apply(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.model.embed_tokens.weight.requires_grad


def test_apply_refuses_a_narrow_model(small):
    with pytest.raises(ConfigError, match=r"is torch\.bfloat16; load the model with dtype=torch\.float32"):
        nearest_w4(load(small), group_size=32).apply(load(small, torch.bfloat16))


def test_apply_refuses_another_shape(small):
    start = nearest_w4(load(small), group_size=32)
    with pytest.raises(ConfigError, match=r"gate_proj\.weight is \[96, 64\] in the model and \[128, 64\] in the start"):
        start.apply(make_llama(intermediate_size=96))


def test_apply_refuses_a_model_without_the_module(small):
    start = nearest_w4(load(small), group_size=32)
    with pytest.raises(ConfigError, match=r"the model has no model\.layers\.1\..*weight, the start is one of another"):
        start.apply(make_llama(num_hidden_layers=1))


# from W4A16 checkpoints


def test_a_checkpoint_gives_its_codes_and_scales(small, tmp_path):
    directory = write_checkpoint(small, tmp_path / "w4", group_size=32, negative=True)
    expected = all_w4(load_file(directory / "model.safetensors"))
    start = w4_checkpoint(directory)
    assert start.grids.keys() == expected.keys()
    assert bool((start.grids[Q_PROJ].scale < 0).any())
    for name, weight in values(start).items():
        assert start.levels[name].dtype == torch.int8
        assert torch.equal(weight.double(), expected[name])


def test_an_asymmetric_checkpoint_is_refused(small, tmp_path):
    directory = write_checkpoint(small, tmp_path / "w4", group_size=32, symmetric=False)
    with pytest.raises(CheckpointError, match="has zero points, and only symmetric W4 can be trained"):
        w4_checkpoint(directory)


def test_a_checkpoint_without_codes_is_refused(small):
    with pytest.raises(CheckpointError, match="has no 4-bit weights"):
        w4_checkpoint(small)


def test_calibrated_w4_is_what_the_recipe_makes(small, tmp_path):
    from datasets import Dataset
    from llmcompressor import oneshot

    from srd_modifier import SRDModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    ignore = ["lm_head", r"re:.*layers\.1\.mlp.*"]
    recipe = SRDModifier(config_groups=groups, ignore=ignore, base_rounding="feedback", balance=0.25)
    ids = samples()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(sample) for sample in ids]})
    options = {"num_calibration_samples": 8, "max_seq_length": 32, "shuffle_calibration_samples": False}
    oneshot(model=str(small), recipe=recipe, dataset=data, output_dir=str(tmp_path / "w4"), **options)
    expected = all_w4(load_file(tmp_path / "w4" / "model.safetensors"))

    folder = tmp_path / "scratch"
    folder.mkdir()
    start = calibrated_w4(str(small), ids, group_size=32, ignore=ignore[1:], folder=folder)
    assert len(expected) == 11
    assert start.grids.keys() == expected.keys()
    assert all(torch.equal(weight.double(), expected[name]) for name, weight in values(start).items())
    assert not list(folder.iterdir())
    nearest = nearest_w4(load(small), group_size=32)
    assert any(not torch.equal(levels, nearest.levels[name]) for name, levels in start.levels.items())


def test_calibrated_w4_needs_text(small):
    with pytest.raises(SRDError, match="there is no text to calibrate on"):
        calibrated_w4(str(small), [], group_size=32)


def test_calibrated_w4_refuses_a_group_size_before_it_loads_anything(small):
    with pytest.raises(ConfigError, match="groups of 48 do not divide"):
        calibrated_w4(str(small), samples(), group_size=48)


def test_calibrated_w4_says_which_extra_is_missing(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"srd-modifier\[quantize\]"):
        calibrated_w4(str(small), samples(), group_size=32)


# from GGUF files


@pytest.mark.parametrize("file_type", [FileType.Q4_K_M, FileType.Q5_K_M, FileType.Q8_0])
def test_a_file_gives_its_own_values_in_the_models_order(wide, wide_gguf, tmp_path, file_type):
    path = wide_gguf if file_type is FileType.Q4_K_M else tmp_path / "model.gguf"
    if path != wide_gguf:
        export_gguf(wide, path, file_type=file_type)
    reference = dict(build_model(GGUFFile(path), torch.float32).named_parameters())
    start = gguf_file(path, str(wide))
    assert len(start.grids) == 14
    assert start.values.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    for name, weight in {**{f"{n}.weight": w for n, w in values(start).items()}, **start.values}.items():
        assert torch.equal(weight, reference[name])


def test_the_grids_are_those_of_the_types(wide, wide_gguf):
    grids = gguf_file(wide_gguf, str(wide)).grids
    four, six = grids[Q_PROJ], grids["model.layers.1.mlp.down_proj"]
    assert (four.low, four.high, four.scale.shape[1]) == (0, 15, 256 // 32)
    assert four.minimum is not None
    assert (six.low, six.high, six.minimum, six.scale.shape[1]) == (-32, 31, None, 512 // 16)


def test_rows_that_no_k_quant_divides_fall_back(small, tmp_path):
    start = calibrated_gguf(str(small), None, FileType.Q4_K_M, tmp_path)
    reference = build_model(GGUFFile(tmp_path / "start.gguf"), torch.float32)
    assert {grid.bits for grid in start.grids.values()} == {5, 8}  # Q5_0 and Q8_0
    assert all(torch.equal(w, reference.get_submodule(name).weight) for name, w in values(start).items())


def test_a_calibrated_file_is_another_start(small, tmp_path):
    start = calibrated_gguf(str(small), samples(), FileType.Q4_0, tmp_path, source="eight samples")
    file = GGUFFile(start.path)
    assert file.metadata["srd.method"] == "output-error"
    assert file.metadata["srd.calibration.text"] == "eight samples"
    (tmp_path / "plain").mkdir()
    plain = calibrated_gguf(str(small), None, FileType.Q4_0, tmp_path / "plain")
    assert not torch.equal(start.levels[Q_PROJ], plain.levels[Q_PROJ])


def test_ignored_modules_keep_the_files_values(wide, wide_gguf):
    start = gguf_file(wide_gguf, str(wide), ignore=[Q_PROJ])
    assert Q_PROJ not in start.grids
    reference = build_model(GGUFFile(wide_gguf), torch.float32).get_submodule(Q_PROJ).weight
    assert torch.equal(start.values[f"{Q_PROJ}.weight"], reference)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 1}, r"only the file has blk\.1\."),
        ({"intermediate_size": 256}, r"blk\.0\.ffn_gate\.weight is \[512, 256\], expected \[256, 256\]"),
        ({"seed": 1}, r"output_norm\.weight has other values"),
    ],
    ids=["layers", "shape", "weights"],
)
def test_a_file_of_another_model_is_refused(wide_gguf, tmp_path, changes, reason):
    other = save_model(make_llama(**{**WIDE, **changes}), tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"was not made of .*other: {reason}"):
        gguf_file(wide_gguf, str(other))


def test_a_file_of_another_architecture_is_refused(wide, wide_gguf, tmp_path):
    data = wide_gguf.read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(
        data.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0qwen3",
            1,
        )
    )
    with pytest.raises(CheckpointError, match="its architecture is qwen3, expected llama"):
        gguf_file(path, str(wide))


def test_a_file_type_that_cannot_be_written_is_refused(wide, wide_gguf, tmp_path):
    key = b"general.file_type\x04\0\0\0"
    data = wide_gguf.read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(data.replace(key + b"\x0f", key + b"\x0a", 1))  # Q2_K
    with pytest.raises(CheckpointError, match=r"is of file type Q2_K, only F32, .*Q4_K_M.* can be written again"):
        gguf_file(path, str(wide))


def test_a_type_that_cannot_be_packed_is_refused():
    tensor = SimpleNamespace(tensor_type=gguf.GGMLQuantizationType.IQ4_NL)
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0 is of type IQ4_NL, .* only those of Q4_0"):
        stored_type(SimpleNamespace(tensors={"blk.0": tensor}, path=Path("m.gguf")), "blk.0")


def test_a_file_that_is_not_there_is_refused(wide, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        gguf_file(tmp_path / "none.gguf", str(wide))


def test_a_file_that_is_not_quantized_is_refused(small, tmp_path):
    export_gguf(small, tmp_path / "model.gguf", file_type=FileType.F16)
    with pytest.raises(ConfigError, match="none of the Linear modules is quantized"):
        gguf_file(tmp_path / "model.gguf", str(small))
    with pytest.raises(ConfigError, match="BF16 is not quantized, so there is no grid"):
        calibrated_gguf(str(small), None, FileType.BF16, tmp_path)


def test_a_mixture_is_refused_before_its_file_is_made(tmp_path):
    model = save_model(make_mixture(num_experts=4), tmp_path / "mixture")
    with pytest.raises(ConfigError, match="holds the experts of a mixture"):
        calibrated_gguf(str(model), None, FileType.Q4_K_M, tmp_path)
    assert not (tmp_path / "start.gguf").exists()


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(SRDError, match="cannot load"):
        calibrated_gguf(str(tmp_path), None, FileType.Q4_K_M, tmp_path)
