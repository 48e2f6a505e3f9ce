"""Time and memory: how the probe chooses what to measure, and what it makes of what it found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from header_models import write_headers
from random_models import make_llama, make_mixture, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.memory_curve import write_recipe
from benchmarks.models import write_sharded
from benchmarks.process import run
from srd_modifier.errors import SRDError
from srd_modifier.planning import probe
from srd_modifier.planning.miniature import write_miniature
from srd_modifier.planning.plan import plan
from srd_modifier.planning.probe import depths_to_measure, seconds_at
from srd_modifier.planning.source import read_source
from srd_modifier.quantizing import load_recipe
from srd_modifier.streaming.run import StreamedModel

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("layers", "weights", "depths"),
    [
        (30, 3.5e6, (10, 20, 30)),
        (12, 3.5e6, (10, 12)),
        (2, 1000, (2,)),
        (24, 50e6, (1, 2, 3)),
        (32, 120e6, (1, 2)),
        (32, 218e6, (1,)),
        (1, 50e6, (1,)),
    ],
)
def test_larger_layers_are_measured_less_often(layers: int, weights: float, depths: tuple[int, ...]) -> None:
    assert depths_to_measure(layers, weights) == depths


def test_a_layer_too_large() -> None:
    with pytest.raises(SRDError, match="a decoder layer has 856,000,000 weights, too many for a probe of 10 seconds"):
        depths_to_measure(80, 856e6)


def runs(*weights: int, of: Any = lambda weights: weights) -> list[dict[str, Any]]:
    return [{"weights": own, "seconds": of(own)} for own in weights]


def test_the_line_through_the_runs() -> None:
    assert seconds_at(1000, runs(100, 200, 300, of=lambda w: 7 + w / 50)) == pytest.approx(27)


def test_a_model_that_was_measured_whole_takes_what_was_measured() -> None:
    assert seconds_at(1000, runs(200, 1000, of=lambda w: w * w)) == 1_000_000


def test_one_run_is_scaled() -> None:
    assert seconds_at(1000, runs(200, of=lambda w: w / 10)) == pytest.approx(100)


def test_noise_never_makes_a_larger_model_faster() -> None:
    assert seconds_at(1000, runs(100, 200, of=lambda w: 900 - w)) == 800


def test_the_time_of_a_part_of_the_depth_is_not_estimated(small: Path, tmp_path: Path) -> None:
    text = (RECIPES / "srd_full.yaml").read_text() + "      correct: {depth: [0.4, 0.77]}\n"
    (tmp_path / "r.yaml").write_text(text)
    planned = plan(str(small), tmp_path / "r.yaml")
    assert planned.estimate is None
    assert planned.not_estimated is not None
    assert planned.not_estimated.startswith("the recipe corrects only a part of the modules")


# the model that is measured


def test_a_miniature_has_whole_layers_and_few_words(tmp_path: Path) -> None:
    """Every weight is as large as usual; none is left as the memory was."""
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 50000}
    source = read_source(str(write_headers(tmp_path / "headers", 2, **settings, num_attention_heads=4)))
    model = AutoModelForCausalLM.from_pretrained(write_miniature(source, 3, tmp_path / "short"))
    assert len(model.model.layers) == 3
    assert model.model.embed_tokens.weight.shape == (4096, 256)
    assert model.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        assert 0.01 < weight.float().std() < 0.03, name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "short")) == 2


def test_a_miniature_of_experts(tmp_path: Path) -> None:
    source = read_source(str(save_model(make_mixture(num_experts=4), tmp_path / "moe")))
    model = AutoModelForCausalLM.from_pretrained(write_miniature(source, 1, tmp_path / "short"))
    assert model.config.num_hidden_layers == 1
    assert model.config.num_experts == 4


# the whole probe


@pytest.mark.slow
def test_a_probe_measures_and_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found = plan(str(small), RECIPES / "srd_full.yaml").estimate
    assert found is not None
    assert found.layers == (5,)
    assert 0.0 < found.seconds < 60
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_a_probe_that_fails_says_why(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sentence as the command's."""
    monkeypatch.setattr(probe, "write_miniature", lambda source, depth, folder: tmp_path / "nothing-here")
    planned = plan(str(small), RECIPES / "srd_full.yaml")
    assert planned.estimate is None
    assert planned.not_estimated is not None
    assert planned.not_estimated.startswith(f"the probe failed: cannot load {tmp_path / 'nothing-here'}")


@pytest.mark.slow
def test_memory_is_that_of_the_quantization(tmp_path: Path) -> None:
    model, recipe = write_sharded("smollm2-1.7b", tmp_path, layers=6), write_recipe(tmp_path / "recipe.yaml")
    estimate = plan(str(model), recipe).estimate
    assert estimate is not None
    assert estimate.peak_bytes is not None
    cost = run("benchmarks.memory_curve", ["--worker", str(model), str(recipe), str(tmp_path / "output")])
    shutil.rmtree(tmp_path)  # a gigabyte
    assert estimate.peak_bytes / 2**20 == pytest.approx(cost.peak_mb, rel=0.15)


def test_no_memory_is_promised_of_a_model_that_is_held_whole(tmp_path: Path) -> None:
    model = make_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)  # equal, and not tied: not streamed
    directory = save_model(model, tmp_path / "model")
    estimate = plan(str(directory), write_recipe(tmp_path / "recipe.yaml")).estimate
    assert estimate is not None
    assert estimate.peak_bytes is None
    assert estimate.why_no_memory == "its output head equals its embedding, and is tied to it when it is saved"


@pytest.mark.parametrize("tied", [True, False])
def test_a_miniature_is_streamed_if_its_model_is(tied: bool, tmp_path: Path) -> None:
    model = make_llama(hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    source = read_source(str(save_model(model, tmp_path / "model")))
    short = read_source(str(write_miniature(source, 1, tmp_path / "short")))
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert [StreamedModel(one, load_recipe(recipe)).unsuitable for one in (source, short)] == [None, None]
