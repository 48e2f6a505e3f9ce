"""Time and memory of recipes that calibrate: what is added to a short run, and what is not estimated."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from header_models import write_headers
from random_models import make_llama, make_mixture, save_model

from benchmarks.models import SCHEME
from benchmarks.process import run
from srd_modifier.planning.calibrated import Size, peak_at, seconds_at
from srd_modifier.planning.plan import plan

RECIPES = Path(__file__).parents[2] / "recipes"

SHORT = Size(weights=10, weight_bytes=100, base_bytes=5, checkpoint_bytes=2, samples=4, sensitivity_tokens=200)
SECONDS = {"preparing": 1.0, "sensitivity": 10.0, "passes": 100.0, "quantizing": 1000.0, "saving": 10_000.0}
PEAKS = {"preparing": 500, "calibrating": 500, "saving": 500}


def test_a_run_that_is_the_whole_model_is_what_was_measured() -> None:
    assert seconds_at(SHORT, SHORT, SECONDS) == sum(SECONDS.values())
    assert peak_at(SHORT, SHORT, {"preparing": 300, "calibrating": 500, "saving": 400}, sample_bytes=70) == 500


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({"samples": 8}, 11_211),
        ({"weights": 20}, 12_211),
        ({"weight_bytes": 200}, 21_121),
        ({"sensitivity_tokens": 400}, 11_121),
    ],
)
def test_each_part_of_the_time_grows_by_its_own_measure(more: dict[str, int], seconds: float) -> None:
    assert seconds_at(replace(SHORT, **more), SHORT, SECONDS) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("more", "peak"),
    [
        ({"weight_bytes": 150}, 550),
        ({"samples": 40}, 500 + 36 * 70),
        ({"base_bytes": 45}, 540),
        ({"checkpoint_bytes": 32}, 530),
        ({"checkpoint_bytes": 32, "base_bytes": 45}, 540),
    ],
)
def test_the_largest_stage_is_the_peak(more: dict[str, int], peak: int) -> None:
    assert peak_at(replace(SHORT, **more), SHORT, PEAKS, sample_bytes=70) == peak


def test_no_peak_of_a_stage_no_peak() -> None:
    assert peak_at(SHORT, SHORT, PEAKS | {"saving": None}, sample_bytes=70) is None


def reason(model: Path, recipe: Path) -> str | None:
    planned = plan(str(model), recipe)
    assert planned.estimate is None
    return planned.not_estimated


def test_a_quantizer_with_passes_of_its_own(small: Path) -> None:
    assert reason(small, RECIPES / "srd_autoround.yaml") == (
        "AutoRoundModifier calibrates in a way of its own, and what that takes a short run does not show"
    )


def test_a_gguf_file(small: Path) -> None:
    assert reason(small, RECIPES / "srd_gguf.yaml") == (
        "the recipe writes a GGUF file too, which needs the model's own tokenizer"
    )


def test_a_layer_too_large_to_be_calibrated(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
    model = write_headers(tmp_path / "headers", 2, **sizes, num_attention_heads=32)
    assert str(reason(model, RECIPES / "srd_gptq.yaml")).endswith("weights, too many for a probe that calibrates")


def test_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128}
    model = save_model(make_mixture(num_experts=4, **sizes), tmp_path / "moe")
    assert str(reason(model, RECIPES / "srd_gptq.yaml")).startswith("the model has experts, which are copied")


# the whole probe


@pytest.mark.slow
def test_an_architecture_with_other_names_in_its_config(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        n_embd=128, n_layer=2, n_head=4, rotary_dim=16, n_inner=256, n_positions=64, vocab_size=4096, eos_token_id=0
    )
    model = save_model(GPTJForCausalLM(config), tmp_path / "gptj")
    recipe = tmp_path / "recipe.yaml"
    modifiers = {"SRDModifier": {"ignore": ["lm_head"]}, "GPTQModifier": SCHEME}
    recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False))
    planned = plan(str(model), recipe, num_samples=2, max_seq_length=16)
    assert planned.not_estimated is None
    assert planned.estimate is not None
    assert planned.estimate.tokens == 32


@pytest.mark.slow
def test_a_probe_that_fails_says_why(small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    srd = SCHEME | {"base_rounding": "feedback", "correct": {"max_divergence": 1e-30}}
    recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": {"SRDModifier": srd}}}))
    planned = plan(str(small), recipe, num_samples=2, max_seq_length=16)
    assert planned.estimate is None
    assert str(planned.not_estimated).startswith("the probe failed: ")


@pytest.mark.slow
def test_memory_is_that_of_the_calibration(tmp_path: Path) -> None:
    """Of 24 layers the probe sees two: without the weights of the others its peak would be a quarter too low."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}
    model = save_model(make_llama(**sizes), tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    modifiers = {"SRDModifier": {"ignore": ["lm_head"]}, "GPTQModifier": SCHEME}
    recipe.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False))
    estimate = plan(str(model), recipe, num_samples=16, max_seq_length=32).estimate
    assert estimate is not None
    assert estimate.peak_bytes is not None
    arguments = ["--worker", str(model), str(recipe), str(tmp_path / "output"), "16", "32"]
    cost = run("benchmarks.plan_accuracy", arguments)
    assert estimate.peak_bytes / 2**20 == pytest.approx(cost.peak_mb, rel=0.15)
