import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SmoothQuantModifier
from safetensors.torch import load_file, save_file

from srd_modifier import SRDModifier

PIPELINES = ["independent", "sequential", "basic", "datafree"]
RUNS = [
    (kind, pipeline)
    for kind in ("itself", "round-to-nearest", "gptq")
    for pipeline in PIPELINES
    if (kind, pipeline) != ("gptq", "datafree")  # it needs inputs
]


def assert_same_base(directory: Path, alone: Path, read: Any) -> None:
    """Tensor for tensor what the quantizer saves without us, and the same config.json but for srd_config."""
    found, expected = read(directory), read(alone)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("srd_config")["version"] == 2
    assert config == json.loads((alone / "config.json").read_text())


@pytest.fixture(scope="module")
def alone(quantize, make_recipe, tmp_path_factory):
    """What a quantizer saves without SRDModifier, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, pipeline: str, scheme: dict[str, Any] | None = None, *, key: Any = None) -> Path:
        # a recipe with SRDModifier's own rounding has QuantizationModifier as its reference
        name = (kind.replace("itself", "round-to-nearest"), pipeline, key)
        if name not in made:
            recipe = make_recipe(kind, scheme, alone=True)
            output = tmp_path_factory.mktemp("alone") / "model"
            made[name] = quantize(recipe, output, data=pipeline != "datafree", pipeline=pipeline)
        return made[name]

    return make


@pytest.mark.parametrize(("kind", "pipeline"), RUNS)
def test_every_pipeline_saves_the_quantizers_own_base_and_what_it_lost(
    kind, pipeline, quantize, make_recipe, alone, original, read, assert_within_half_a_step, tmp_path
):
    output = quantize(make_recipe(kind), tmp_path / "srd", data=pipeline != "datafree", pipeline=pipeline)
    assert_same_base(output, alone(kind, pipeline), read)
    assert_within_half_a_step(output, original)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, -1], ids=["group-32", "group-64", "channel"])
@pytest.mark.parametrize("kind", ["itself", pytest.param("gptq", marks=pytest.mark.slow)])
def test_every_w4_format_is_corrected(
    kind,
    group_size,
    symmetric,
    quantize,
    make_recipe,
    group_scheme,
    alone,
    original,
    read,
    assert_within_half_a_step,
    tmp_path,
):
    scheme = group_scheme(group_size, symmetric=symmetric)
    output = quantize(make_recipe(kind, scheme), tmp_path / "srd", data=True)
    assert any(name.endswith("weight_zero_point") for name in read(output)) is not symmetric
    assert_same_base(output, alone(kind, "independent", scheme, key=(group_size, symmetric)), read)
    assert_within_half_a_step(output, original)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["itself", "gptq"])
def test_groups_of_128(
    kind, symmetric, quantize, make_recipe, group_scheme, original, assert_within_half_a_step, tmp_path
):
    scheme = group_scheme(128, symmetric=symmetric)
    scheme["group_0"]["targets"] = ["re:.*down_proj"]  # the only modules that are as wide
    output = quantize(make_recipe(kind, scheme), tmp_path / "srd", data=True)
    assert_within_half_a_step(output, original, modules=6)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_preset_schemes(scheme, quantize, original, assert_within_half_a_step, tmp_path):
    recipe = SRDModifier(
        scheme=scheme, targets=["re:.*down_proj"], ignore=["lm_head"], residual_group_size=32, weight_observer="mse"
    )
    output = quantize(recipe, tmp_path / "srd")
    assert_within_half_a_step(output, original, modules=6)


@pytest.mark.slow
@pytest.mark.parametrize("actorder", ["static", "weight", None])
def test_gptq_in_every_column_order_that_it_saves(
    actorder, quantize, group_scheme, original, assert_within_half_a_step, tmp_path
):
    gptq = GPTQModifier(config_groups=group_scheme(32), ignore=["lm_head"], actorder=actorder)
    output = quantize([SRDModifier(ignore=["lm_head"], residual_group_size=32), gptq], tmp_path / "srd", data=True)
    assert_within_half_a_step(output, original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["itself", "gptq"])
def test_originals_of_other_dtypes(
    kind, dtype, random_llama, quantize, make_recipe, read, assert_within_half_a_step, tmp_path
):
    original = Path(shutil.copytree(random_llama, tmp_path / "original"))
    tensors = {name: tensor.to(dtype) for name, tensor in read(random_llama).items()}
    for name, tensor in tensors.items():
        if "_proj" in name:  # digits that bfloat16 does not have
            tensor.mul_(1 + 2**-10)
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    output = quantize(make_recipe(kind), tmp_path / "srd", model=original, data=True)
    assert read(output)["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    assert_within_half_a_step(output, tensors)


YAML_QUANTIZER = {
    "itself": "",
    "round-to-nearest": "    QuantizationModifier: {config_groups: *groups, ignore: [lm_head]}\n",
    "gptq": "    GPTQModifier: {config_groups: *groups, ignore: [lm_head]}\n",
}


@pytest.mark.parametrize("as_file", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["file", "text"])
@pytest.mark.parametrize("kind", YAML_QUANTIZER)
def test_a_yaml_recipe_does_what_the_python_recipe_does(
    kind, as_file, quantize, make_recipe, group_scheme, directory_bytes, tmp_path
):
    own_scheme = ", config_groups: *groups" if kind == "itself" else ""
    text = (
        f"groups: &groups {json.dumps(group_scheme(32))}\n"
        "quant_stage:\n"
        "  quant_modifiers:\n"
        f"    SRDModifier: {{ignore: [lm_head], residual_group_size: 32{own_scheme}}}\n"
    ) + YAML_QUANTIZER[kind]
    recipe = text
    if as_file:
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = str(tmp_path / "recipe.yaml")
    found = directory_bytes(quantize(recipe, tmp_path / "yaml", data=True))
    expected = directory_bytes(quantize(make_recipe(kind), tmp_path / "python", data=True))
    assert b"quant_stage:\n  quant_modifiers:\n    SRDModifier:\n" in found.pop("recipe.yaml")
    assert b"SRDModifier:\n" in expected.pop("recipe.yaml")
    assert found == expected


@pytest.mark.parametrize("position", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_the_residual_is_taken_from_the_transformed_weights(
    position, quantize, group_scheme, read, assert_within_half_a_step, tmp_path
):
    # smoothing rewrites the weights before they are quantized: what is lost is lost of the smoothed model
    smoothed = read(quantize([SmoothQuantModifier()], tmp_path / "smoothed", data=True))
    gptq = {"config_groups": group_scheme(32), "ignore": ["lm_head"]}
    alone = quantize([SmoothQuantModifier(), GPTQModifier(**gptq)], tmp_path / "alone", data=True)
    srd, smooth = SRDModifier(ignore=["lm_head"], residual_group_size=32), SmoothQuantModifier()
    before = [srd, smooth] if position == "after" else [smooth, srd]
    output = quantize([*before, GPTQModifier(**gptq)], tmp_path / "srd", data=True)
    assert_same_base(output, alone, read)
    assert_within_half_a_step(output, smoothed)


def test_a_quantizer_with_an_importance_observer(quantize, group_scheme, original, assert_within_half_a_step, tmp_path):
    # it calibrates, unlike the other observers, and so does SRDModifier around it
    scheme = group_scheme(32)
    scheme["group_0"]["weights"]["observer"] = "imatrix_mse"
    recipe = SRDModifier(config_groups=scheme, ignore=["lm_head"], residual_group_size=32)
    assert recipe.requires_calibration_data
    output = quantize(recipe, tmp_path / "srd", data=True)
    assert_within_half_a_step(output, original)
    assert (output / "srd" / "importance.safetensors").is_file()


def test_a_model_object_is_quantized_as_its_directory_is(random_llama, make_recipe, directory_bytes, tmp_path):
    from transformers import AutoModelForCausalLM

    for name, model in (("object", AutoModelForCausalLM.from_pretrained(random_llama)), ("path", str(random_llama))):
        from llmcompressor import oneshot

        oneshot(model=model, recipe=make_recipe("itself"), output_dir=str(tmp_path / name), tokenizer=str(random_llama))
    assert directory_bytes(tmp_path / "object") == directory_bytes(tmp_path / "path")


def test_one_process_runs_one_recipe_after_another(quantize, make_recipe, directory_bytes, tmp_path):
    first = quantize(make_recipe("gptq"), tmp_path / "first", data=True)
    without = quantize(make_recipe("gptq", alone=True), tmp_path / "without", data=True)
    other = quantize(make_recipe("itself", correct={"chunks": ["early"]}, residual_bits=4), tmp_path / "other")
    again = quantize(make_recipe("gptq"), tmp_path / "again", data=True)
    assert not (without / "srd").exists()
    assert "srd_config" not in json.loads((without / "config.json").read_text())
    config = json.loads((other / "config.json").read_text())["srd_config"]
    assert (config["bits"], len(config["modules"])) == (4, 14)
    assert directory_bytes(again) == directory_bytes(first)


def test_a_recipe_that_was_refused_does_not_spoil_the_next(quantize, make_recipe, directory_bytes, tmp_path):
    expected = quantize(make_recipe("gptq"), tmp_path / "expected", data=True)
    with pytest.raises(Exception, match="no quantizer stands after it"):
        quantize(make_recipe("gptq")[:1], tmp_path / "refused", data=True)
    found = quantize(make_recipe("gptq"), tmp_path / "found", data=True)
    assert directory_bytes(found) == directory_bytes(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "gptq"},
        {"kind": "itself", "rounding": "stochastic", "seed": 3},
        {"kind": "itself", "rounding": "dithered"},
        {"kind": "gptq", "density": 0.25, "residual_bits": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_runs_write_the_same_bytes(settings, quantize, make_recipe, directory_bytes, tmp_path):
    first, second = (
        directory_bytes(quantize(make_recipe(**settings), tmp_path / name, data=True)) for name in ("first", "second")
    )
    assert "srd/residual-00001-of-00001.safetensors" in first
    assert first == second


def test_the_seed_is_part_of_the_noise(quantize, make_recipe, tmp_path):
    codes = [
        load_file(
            quantize(make_recipe("itself", rounding="stochastic", seed=seed), tmp_path / str(seed))
            / "srd/residual-00001-of-00001.safetensors"
        )["model.layers.0.mlp.up_proj.weight_d8"]
        for seed in (0, 1)
    ]
    assert not torch.equal(*codes)


@pytest.mark.slow
class TestAutoRound:
    """Signed gradient descent on the rounding: it overwrites the weights, and runs forwards of its own meanwhile."""

    @pytest.fixture(scope="class")
    def recipe(self, group_scheme):
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        def make(*, alone: bool = False, symmetric: bool = True) -> list[Any]:
            scheme = group_scheme(32, symmetric=symmetric)
            autoround = AutoRoundModifier(
                config_groups=scheme, ignore=["lm_head"], iters=3, enable_torch_compile=False, batch_size=4
            )
            return [autoround] if alone else [SRDModifier(ignore=["lm_head"], residual_group_size=32), autoround]

        return make

    @pytest.fixture(scope="class", params=["independent", "sequential"])
    def pair(self, request, recipe, quantize, tmp_path_factory):
        """With SRDModifier, and AutoRound alone."""
        directory = tmp_path_factory.mktemp("autoround")
        outputs = []
        for name, modifiers in (("srd", recipe()), ("alone", recipe(alone=True))):
            torch.manual_seed(0)
            outputs.append(quantize(modifiers, directory / name, data=True, pipeline=request.param))
        return outputs

    def test_every_pipeline_saves_the_quantizers_own_base_and_what_it_lost(
        self, pair, original, read, assert_within_half_a_step
    ):
        output, alone = pair
        assert_same_base(output, alone, read)
        assert_within_half_a_step(output, original)

    def test_its_own_forwards_are_not_counted_as_calibration(self, pair, first_layer_importance):
        output, _ = pair
        found = load_file(output / "srd" / "importance.safetensors")
        for name, expected in first_layer_importance.items():
            torch.testing.assert_close(found[f"{name}.importance"], expected, rtol=1e-4, atol=0)

    def test_asymmetric(self, recipe, quantize, original, assert_within_half_a_step, tmp_path):
        output = quantize(recipe(symmetric=False), tmp_path / "srd", data=True)
        assert_within_half_a_step(output, original)

    def test_a_yaml_recipe(self, recipe, quantize, group_scheme, directory_bytes, tmp_path):
        text = yaml.safe_dump(
            {
                "quant_stage": {
                    "quant_modifiers": {
                        "SRDModifier": {"ignore": ["lm_head"], "residual_group_size": 32},
                        "AutoRoundModifier": {
                            "config_groups": group_scheme(32),
                            "ignore": ["lm_head"],
                            "iters": 3,
                            "enable_torch_compile": False,
                            "batch_size": 4,
                        },
                    }
                }
            },
            sort_keys=False,
        )
        outputs = []
        for name, modifiers in (("yaml", text), ("python", recipe())):
            torch.manual_seed(0)
            outputs.append(directory_bytes(quantize(modifiers, tmp_path / name, data=True)))
            outputs[-1].pop("recipe.yaml")
        assert outputs[0] == outputs[1]


def test_the_modifier_is_a_quantization_modifier():
    # so that upstream treats it as a quantizer wherever it asks
    assert issubclass(SRDModifier, QuantizationModifier)
