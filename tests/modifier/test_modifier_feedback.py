"""W4 and residuals that are rounded with error feedback, from `oneshot` to the file."""

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from compressed_tensors.quantization import ActivationOrdering
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from torch import Tensor

from srd_modifier import SRDModifier
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import RecipeError
from srd_modifier.modifier import calibrated
from srd_modifier.modifier.capture import ResidualCapture
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.modifier.plan import QuantizedModule, check_feedback_base
from srd_modifier.residual.calibrated import QuantizedBase, quantize_base
from srd_modifier.residual.hessian import Hessian

MODULES = 21  # seven in each of the small Llama's three layers


@pytest.fixture
def feedback(group_scheme) -> Callable[..., SRDModifier]:
    """SRDModifier with a base of its own, rounded with feedback."""

    def make(scheme: dict[str, Any] | None = None, **settings: Any) -> SRDModifier:
        settings = {"ignore": ["lm_head"], "residual_group_size": 32, "base_rounding": "feedback", **settings}
        return SRDModifier(config_groups=group_scheme(32) if scheme is None else scheme, **settings)

    return make


@pytest.fixture
def made(monkeypatch) -> list[tuple[Tensor, QuantizedBase, int]]:
    """Every weight that is quantized with feedback, what it became, and its group size."""
    seen: list[tuple[Tensor, QuantizedBase, int]] = []

    def record(weight: Tensor, hessian: Hessian, **settings: Any) -> QuantizedBase:
        base = quantize_base(weight, hessian, **settings)
        seen.append((weight.clone(), base, settings["group_size"]))
        return base

    monkeypatch.setattr(calibrated, "quantize_base", record)
    return seen


def assert_saved(directory: Path, original: dict[str, Tensor], made: list[tuple[Tensor, QuantizedBase, int]]) -> None:
    """What the file says is what was made, to the bit."""
    base = BaseCheckpoint(directory)
    assert len(base.quantized_modules) == len(made) == MODULES
    for name in base.quantized_modules:
        ((one, group_size),) = (
            (one, group_size) for weight, one, group_size in made if torch.equal(weight, original[f"{name}.weight"])
        )
        assert torch.equal(base.dequantize(name).float(), one.dequantize(group_size)), name
        assert torch.equal(base.tensor(f"{name}.weight_scale"), one.scale), name


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, -1], ids=["group-32", "group-64", "channel"])
def test_the_file_has_the_base_that_was_made(
    group_size, symmetric, small, feedback, group_scheme, made, read, small_llama, assert_within_half_a_step, tmp_path
):
    output = small(feedback(group_scheme(group_size, symmetric=symmetric)), tmp_path / "srd")
    original = read(small_llama)
    assert_saved(output, original, made)
    assert any(name.endswith("weight_zero_point") for name in read(output)) is not symmetric
    assert_within_half_a_step(output, original, modules=MODULES)
    Sidecar.open(output).verify()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_originals_of_other_dtypes(
    dtype, small, feedback, made, read, small_llama, assert_within_half_a_step, tmp_path
):
    model = Path(shutil.copytree(small_llama, tmp_path / "original"))
    tensors = {name: tensor.to(dtype) for name, tensor in read(small_llama).items()}
    for name, tensor in tensors.items():
        if "_proj" in name:  # digits that bfloat16 does not have
            tensor.mul_(1 + 2**-10)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    output = small(feedback(), tmp_path / "srd", model=model)
    assert read(output)["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    assert_saved(output, tensors, made)
    assert_within_half_a_step(output, tensors, modules=MODULES)


def test_negative_scales_are_saved_as_they_are(small, feedback, read, tmp_path):
    tensors = read(small(feedback(), tmp_path / "srd"))
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("weight_scale")])
    # in about half of the groups of a random weight the largest entry is positive
    assert 0.4 < float((scales < 0).float().mean()) < 0.6


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_every_pipeline(pipeline, small, feedback, made, read, small_llama, assert_within_half_a_step, tmp_path):
    output = small(feedback(), tmp_path / "srd", pipeline=pipeline)
    assert_saved(output, read(small_llama), made)
    assert_within_half_a_step(output, read(small_llama), modules=MODULES)


PLAIN = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    model(input_ids=torch.arange(8)[None])  # compressed-tensors may wait with unpacking until then
save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, sys.argv[2])
assert not any(name.startswith("srd_modifier") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_transformers_alone_loads_the_same_w4(symmetric, small, feedback, group_scheme, tmp_path):
    output = small(feedback(group_scheme(32, symmetric=symmetric)), tmp_path / "srd")
    command = [sys.executable, "-c", PLAIN, str(output), str(tmp_path / "plain")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    base, found = BaseCheckpoint(output), load_file(tmp_path / "plain")
    for name in base.quantized_modules:
        assert torch.equal(found[f"{name}.weight"], base.dequantize(name).bfloat16()), name


# what it is good for


def test_feedback_leaves_less_than_nearest_rounding_of_the_same_bits(
    small, feedback, make_recipe, small_llama, divergence, tmp_path
):
    bits = {"residual_bits": 3}
    nearest = small(make_recipe("itself", **bits), tmp_path / "nearest")
    both = small(feedback(rounding="feedback", **bits), tmp_path / "both")
    at = {(path.name, alpha): divergence(small_llama, path, alpha) for path in (nearest, both) for alpha in (0, 1)}
    assert at["both", 1] < 0.9 * at["nearest", 1]
    assert at["both", 0] < 0.9 * at["nearest", 0]
    assert at["both", 1] < 0.2 * at["both", 0]


def test_balance_trades_w4_for_its_residual(small, feedback, small_llama, divergence, tmp_path):
    found = []
    for balance in (0.0, 1.0):
        output = small(feedback(balance=balance, residual_bits=3, rounding="feedback"), tmp_path / str(balance))
        found.append((divergence(small_llama, output, 0.0), divergence(small_llama, output, 1.0)))
    assert found[0][0] < found[1][0]
    assert found[0][1] > found[1][1]


# residuals with feedback on other bases


@pytest.mark.parametrize("kind", ["gptq", "itself", "gptq-asymmetric"])
@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_a_residual_with_feedback_leaves_the_base_as_it_is(
    kind, pipeline, small, make_recipe, group_scheme, read, small_llama, divergence, tmp_path
):
    kind, scheme = kind.removesuffix("-asymmetric"), group_scheme(32, symmetric=not kind.endswith("-asymmetric"))
    alone = read(small(make_recipe(kind, scheme, alone=True), tmp_path / "alone", pipeline=pipeline))
    settings = {"residual_bits": 4, "rounding": "feedback"}
    output = small(make_recipe(kind, scheme, **settings), tmp_path / "srd", pipeline=pipeline)
    found = read(output)
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    sidecar = Sidecar.open(output)
    sidecar.verify()
    assert {(entry.format.bits, entry.format.rounding) for entry in sidecar.entries.values()} == {(4, "feedback")}
    assert len(sidecar.entries) == MODULES
    assert divergence(small_llama, output, 1.0) < 0.05 * divergence(small_llama, output, 0.0)


def test_feedback_beats_nearest_residuals_on_a_gptq_base(small, make_recipe, small_llama, divergence, tmp_path):
    found = {
        rounding: divergence(
            small_llama, small(make_recipe("gptq", residual_bits=3, rounding=rounding), tmp_path / rounding), 1.0
        )
        for rounding in ("nearest", "feedback")
    }
    assert found["feedback"] < 0.9 * found["nearest"]


@pytest.mark.parametrize("settings", [{"density": 0.25}, {"residual_bits": 1, "residual_group_size": -1}], ids=str)
def test_formats_of_every_kind(settings, small, make_recipe, tmp_path):
    sidecar = Sidecar.open(small(make_recipe("gptq", rounding="feedback", **settings), tmp_path / "srd"))
    sidecar.verify()
    formats = {entry.format for entry in sidecar.entries.values()}
    assert formats == {sidecar.config.format}
    assert len(sidecar.entries) == MODULES


def test_two_modifiers_with_feedback_of_a_gptq_base(small, group_scheme, divergence, small_llama, tmp_path):
    srd: dict[str, Any] = {"residual_group_size": 32, "rounding": "feedback"}
    recipe: list[Modifier] = [
        SRDModifier(targets=["re:.*self_attn"], residual_bits=4, **srd),
        SRDModifier(targets=["re:.*mlp"], residual_bits=2, **srd),
        GPTQModifier(config_groups=group_scheme(32), ignore=["lm_head"]),
    ]
    output = small(recipe, tmp_path / "srd")
    sidecar = Sidecar.open(output)
    sidecar.verify()
    assert {(".mlp." in name, entry.format.bits) for name, entry in sidecar.entries.items()} == {(False, 4), (True, 2)}
    assert divergence(small_llama, output, 1.0) < 0.3 * divergence(small_llama, output, 0.0)


def test_two_modifiers_that_quantize_with_feedback(small, feedback, group_scheme, made, read, small_llama, tmp_path):
    schemes = [group_scheme(32), group_scheme(32)]
    for scheme, targets in zip(schemes, ("re:.*self_attn", "re:.*mlp"), strict=True):
        scheme["group_0"]["targets"] = [targets]
    recipe = [feedback(schemes[0], rounding="feedback", residual_bits=4), feedback(schemes[1])]
    output = small(recipe, tmp_path / "srd")
    Sidecar.open(output).verify()
    base = BaseCheckpoint(output)
    # the second one's inputs come from the first one's weights, but its own weights are the original ones
    assert_saved(output, read(small_llama), made)
    assert len(base.quantized_modules) == MODULES


# saving, and what is let go


def test_saving_twice_writes_the_same_bytes(quantized_model, feedback, small_llama, directory_bytes, tmp_path):
    model = quantized_model(feedback(rounding="feedback", residual_bits=4), model=small_llama)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert directory_bytes(tmp_path / "first") == directory_bytes(tmp_path / "second")
    Sidecar.open(tmp_path / "first").verify()


def test_two_runs_write_the_same_bytes(small, feedback, directory_bytes, tmp_path):
    settings = {"rounding": "feedback", "residual_bits": 4, "sensitivity": "gradient"}
    first, second = (directory_bytes(small(feedback(**settings), tmp_path / name)) for name in ("first", "second"))
    assert "srd/sensitivity.json" in first
    assert first == second


def test_the_saved_recipe_gives_the_same_checkpoint(small, directory_bytes, tmp_path):
    recipe = SRDModifier(
        scheme="W4A16",
        targets=["re:.*down_proj"],
        ignore=["lm_head"],
        base_rounding="feedback",
        balance=0.25,
        rounding="feedback",
        residual_bits=4,
        sensitivity="gradient",
        sensitivity_tokens=100,
    )
    first = small(recipe, tmp_path / "first")
    second = small(str(first / "recipe.yaml"), tmp_path / "second")
    assert directory_bytes(second) == directory_bytes(first)


@pytest.mark.parametrize("kind", ["feedback", "gptq", "itself"])
def test_moments_and_originals_are_released_after_every_layer(
    kind, small, feedback, make_recipe, monkeypatch, tmp_path
):
    factors: list[weakref.ref[Tensor]] = []
    originals: list[weakref.ref[Tensor]] = []
    layers: list[set[str]] = []
    prepare, keep, after = Hessian.prepare, ResidualCapture.keep_originals, ResidualCapture.after_quantizing

    def alive(kept: list[weakref.ref[Tensor]]) -> int:
        return sum(one() is not None for one in kept)

    def prepared(moment: Tensor, **settings: Any) -> Hessian:
        hessian = prepare(moment, **settings)
        factors.append(weakref.ref(hessian.factor))
        return hessian

    def keep_originals(self: ResidualCapture, modules: Any, *, overwritten: bool) -> None:
        assert not self._originals
        keep(self, modules, overwritten=overwritten)
        if self._originals:
            layers.append(set(self.inputs._moments))
            originals.extend(weakref.ref(tensor) for tensor in self._originals.values())

    def after_quantizing(self: ResidualCapture, *args: Any, **settings: Any) -> None:
        after(self, *args, **settings)
        assert not self.inputs._moments
        assert not self._originals
        assert (alive(factors), alive(originals)) == (0, 0)

    monkeypatch.setattr(Hessian, "prepare", staticmethod(prepared))
    monkeypatch.setattr(ResidualCapture, "keep_originals", keep_originals)
    monkeypatch.setattr(ResidualCapture, "after_quantizing", after_quantizing)
    settings = {"rounding": "feedback", "residual_bits": 4}
    small(feedback(**settings) if kind == "feedback" else make_recipe(kind, **settings), tmp_path / "srd")
    assert len(factors) == 4 * 3  # q, k and v share one, gate and up another
    assert len(originals) == MODULES
    assert len(layers) == 3
    for layer, moments in enumerate(layers):
        assert len(moments) == 7
        assert all(name.startswith(f"model.layers.{layer}.") for name in moments)


@pytest.mark.parametrize("kind", ["feedback", "gptq"])
def test_one_second_moment_for_modules_that_share_their_input(
    kind, small, feedback, make_recipe, monkeypatch, tmp_path
):
    captures: list[CalibrationInputs] = []
    make = CalibrationInputs.__init__

    def init(self: CalibrationInputs, **settings: Any) -> None:
        make(self, **settings)
        captures.append(self)

    monkeypatch.setattr(CalibrationInputs, "__init__", init)
    recipe = feedback() if kind == "feedback" else make_recipe("gptq", rounding="feedback", residual_bits=4)
    small(recipe, tmp_path / "srd")
    (inputs,) = captures
    for layer in range(3):
        owners = {
            name.split(".", 3)[3]: owner.split(".", 3)[3]
            for name, owner in inputs._owners.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        assert owners == {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "self_attn.o_proj": "self_attn.o_proj",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.gate_proj",
            "mlp.down_proj": "mlp.down_proj",
        }
    assert len(inputs.mean_squares()) == MODULES


def test_the_importance_is_that_of_the_diagonal(small, feedback, make_recipe, tmp_path):
    found, expected = (
        load_file(small(recipe, tmp_path / name) / "srd" / "importance.safetensors")
        for name, recipe in (("feedback", feedback()), ("gptq", make_recipe("gptq")))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".layers.0." in name:  # the layers after it have other inputs
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["feedback", "gptq"])
def test_nothing_is_left_on_the_disk(kind, small, feedback, make_recipe, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    settings = {"rounding": "feedback", "residual_bits": 4, "spool_dir": str(spool)}
    recipe = [feedback(**settings)] if kind == "feedback" else make_recipe("gptq", **settings)
    output = small(recipe, tmp_path / "srd")
    assert len(list(spool.iterdir())) == 1
    recipe[0].close()
    assert list(spool.iterdir()) == []
    Sidecar.open(output).verify()


# what cannot work


@pytest.mark.parametrize("pipeline", ["datafree", "independent"])
def test_a_base_without_calibration_forwards_is_refused(pipeline, small, feedback, forwards, tmp_path):
    if pipeline == "datafree":
        with pytest.raises(RecipeError, match=r"q_proj saw no calibration data, which feedback and sensitivity need"):
            small(feedback(), tmp_path / "srd", pipeline=pipeline)
    else:
        with pytest.raises(RecipeError, match="SRDModifier needs calibration data for feedback, sensitivity and budg"):
            small(feedback(), tmp_path / "srd", data=False)
    assert not forwards
    assert not (tmp_path / "srd").exists()


def test_a_model_that_was_quantized_before_is_refused(small, group_scheme, small_llama, read, tmp_path):
    grid = Path(shutil.copytree(small_llama, tmp_path / "grid"))
    generator = torch.Generator().manual_seed(0)
    tensors = read(small_llama)
    for name, tensor in tensors.items():
        if "_proj" in name:
            codes = torch.randint(-8, 8, tensor.shape, generator=generator).view(len(tensor), -1, 32)
            codes[..., 0], codes[..., 1] = -8, 7  # both ends of the range, so that it is found again
            tensors[name] = (codes.view(tensor.shape) / 128).to(torch.bfloat16)
    save_file(tensors, grid / "model.safetensors", metadata={"format": "pt"})
    recipe = [
        SRDModifier(ignore=["lm_head"], rounding="feedback"),
        GPTQModifier(config_groups=group_scheme(32, symmetric=False), ignore=["lm_head"]),
    ]
    with pytest.raises(RecipeError, match="lost nothing, its weights were on the 4-bit grid before"):
        small(recipe, tmp_path / "srd", model=grid)


def test_weights_that_are_not_finite_are_refused(small, feedback, small_llama, read, forwards, tmp_path):
    damaged = Path(shutil.copytree(small_llama, tmp_path / "damaged"))
    tensors = read(small_llama)
    tensors["model.layers.2.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"^model\.layers\.2\.mlp\.down_proj\.weight has NaN or infinite entries"):
        small(feedback(), tmp_path / "srd", model=damaged)
    assert not forwards


def test_groups_that_actorder_permutes_are_refused():
    # recent compressed-tensors have no such groups any more
    weights = SimpleNamespace(actorder=ActivationOrdering.GROUP)
    quantizer = SimpleNamespace(resolved_config=SimpleNamespace(config_groups={"a": SimpleNamespace(weights=weights)}))
    quantized = {"q_proj": QuantizedModule("q_proj", torch.nn.Linear(1, 1), cast(Modifier, quantizer))}
    with pytest.raises(RecipeError, match=r"^q_proj: base_rounding: feedback keeps groups of .* take actorder: group"):
        check_feedback_base(quantized)


def test_round_to_nearest_that_follows_gets_the_data_that_feedback_needs(
    small, group_scheme, read, make_recipe, small_llama, divergence, tmp_path
):
    # by itself it runs without
    recipe = [
        SRDModifier(ignore=["lm_head"], rounding="feedback", residual_bits=4, sensitivity="gradient"),
        QuantizationModifier(config_groups=group_scheme(32), ignore=["lm_head"]),
    ]
    output = small(recipe, tmp_path / "srd")
    assert (output / "srd" / "importance.safetensors").is_file()
    found, alone = read(output), read(small(make_recipe("round-to-nearest", alone=True), tmp_path / "alone"))
    assert [name for name in alone if not torch.equal(alone[name], found[name])] == []
    assert divergence(small_llama, output, 1.0) < 0.1 * divergence(small_llama, output, 0.0)


def test_a_quantizer_that_follows_without_data_is_refused(small, group_scheme, tmp_path):
    recipe = [
        SRDModifier(ignore=["lm_head"], rounding="feedback", residual_bits=4),
        QuantizationModifier(config_groups=group_scheme(32), ignore=["lm_head"]),
    ]
    with pytest.raises(RecipeError, match=r"saw no calibration data.* let SRDModifier quantize by itself"):
        small(recipe, tmp_path / "srd", pipeline="datafree")
