"""Settings of a training: a recipe, options over it, and what is refused."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.qat.settings import TrainingSettings, gguf_type


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_the_published_sizes_and_rates():
    settings = TrainingSettings.read(None)
    assert settings == TrainingSettings()
    reference = {
        "num_samples": 4000,
        "max_seq_length": 512,
        "epochs": 1,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "batch_size": 64,
        "schedule": "constant",
    }
    assert {name: getattr(settings, name) for name in reference} == reference


def test_a_recipe_may_have_every_setting(tmp_path):
    values = {
        "grid": "gguf:Q4_K_M",
        "schedule": "step=0:16,0.1:8,0.5:4",
        "start": "nearest",
        "group_size": 32,
        "ignore": ["re:.*k_proj", "model.layers.0.mlp.up_proj"],
        "scales": "searched",
        "train": "all",
        "distill": 0.5,
        "temperature": 2,
        "epochs": 3,
        "learning_rate": 1e-4,
        "weight_decay": 0,
        "batch_size": 12,
        "micro_batch_size": 4,
        "num_samples": 100,
        "max_seq_length": 64,
        "products": "float32",
        "seed": 7,
    }
    assert set(values) == {field.name for field in fields(TrainingSettings)}
    # JSON is YAML
    settings = TrainingSettings.read(write(tmp_path / "recipe.yaml", json.dumps(values)))
    assert settings.as_dict() == values
    assert settings == TrainingSettings(**{**values, "ignore": tuple(values["ignore"])})


def test_what_is_given_wins_over_the_recipe(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "epochs: 3\nseed: 4\nignore: re:.*k_proj\n")
    settings = TrainingSettings.read(recipe, epochs=0.5, seed=None, batch_size=16)
    assert (settings.epochs, settings.seed, settings.batch_size) == (0.5, 4, 16)
    assert settings.ignore == ("re:.*k_proj",)


def test_zero_is_given(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "distill: 0.5\nweight_decay: 0.1\nseed: 3\n")
    settings = TrainingSettings.read(recipe, distill=0.0, weight_decay=0.0, seed=0)
    assert (settings.distill, settings.weight_decay, settings.seed) == (0, 0, 0)


def test_a_number_without_a_point_is_a_number(tmp_path):
    """For YAML 1.1, 2e-5 is text."""
    recipe = write(tmp_path / "recipe.yaml", "learning_rate: 3e-5\n")
    assert TrainingSettings.read(recipe).learning_rate == 3e-5


@pytest.mark.parametrize("word", ["all", "null", "~"])
def test_all_samples_in_a_recipe(word, tmp_path):
    recipe = write(tmp_path / "recipe.yaml", f"num_samples: {word}\n")
    assert TrainingSettings.read(recipe).num_samples is None
    assert TrainingSettings.read(recipe, num_samples=5).num_samples == 5


def test_all_samples_over_a_recipe(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "num_samples: 5\n")
    assert TrainingSettings.read(recipe, num_samples="all").num_samples is None


def test_what_json_gives_back_is_the_same():
    settings = TrainingSettings(ignore=("a", "b"), num_samples=None)
    stored = json.loads(json.dumps(settings.as_dict()))
    assert stored == settings.as_dict()
    assert TrainingSettings(**{**stored, "ignore": tuple(stored["ignore"])}) == settings


WRONG = [
    ("grid", "w8", "grid is 'w8'; expected w4a16, or gguf: and a type"),
    ("grid", "gguf:Q9", "there is no GGUF type 'Q9'; there are F32"),
    ("grid", "gguf:F16", "grid is gguf:F16, which is not quantized"),
    ("schedule", "falling", "there is no schedule 'falling'"),
    ("schedule", "0.1:16,0.9:4", "a schedule starts at progress 0, but its first milestone is 0.1:16"),
    ("schedule", "0:8,0.5:16,0.9:4", "the width of a schedule never rises, but its milestone 0.5:16 comes after 0:8"),
    ("schedule", "0:16,0.9:8", "ends at 8 bits, but w4a16 has 4: give it a last milestone of 4 bits"),
    ("scales", "free", "scales is 'free'; expected searched or learned"),
    ("train", "everything", "train is 'everything'; expected linear or all"),
    ("products", "int8", "products is 'int8'; expected auto or float32 or bfloat16"),
    ("distill", 1.5, "distill is 1.5; expected a share from 0 to 1"),
    ("distill", -0.1, "distill is -0.1; expected a share"),
    ("temperature", 0, "temperature is 0; expected more than 0"),
    ("epochs", 0, "epochs is 0; expected more than 0"),
    ("epochs", float("inf"), "epochs is inf; expected a number"),
    ("epochs", float("nan"), "epochs is nan; expected a number"),
    ("learning_rate", -1e-5, "learning_rate is -1e-05; expected more than 0"),
    ("learning_rate", "fast", "learning_rate is 'fast'; expected a number"),
    ("weight_decay", -1, "weight_decay is -1; expected 0 or more"),
    ("batch_size", 0, "batch_size is 0; expected more than 0"),
    ("batch_size", 12, "batch_size 12 is not a multiple of micro_batch_size 8"),
    ("batch_size", 64.0, "batch_size is 64.0; expected a whole number"),
    ("micro_batch_size", -8, "micro_batch_size is -8; expected more than 0"),
    ("num_samples", 0, "num_samples is 0; expected more than 0"),
    ("num_samples", "many", "num_samples is 'many'; expected a whole number"),
    ("num_samples", True, "num_samples is True; expected a whole number"),
    ("max_seq_length", 1, "max_seq_length is 1; a sample needs at least 2 tokens"),
    ("group_size", 0, "group_size is 0; expected more than 0"),
    ("seed", -1, "seed is -1; expected 0 to 4294967295"),
    ("seed", 2**32, "seed is 4294967296; expected"),
    ("ignore", [1], r"ignore is \(1,\); expected a list of texts"),
    ("ignore", {"a": 1}, "ignore is {'a': 1}; expected a list of texts"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{name}={value}" for name, value, _ in WRONG])
def test_a_wrong_setting(name, value, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings.read(None, **{name: value})


def test_learned_scales_of_a_gguf_grid():
    with pytest.raises(ConfigError, match="scales are learned on the w4a16 grid only: those of gguf:Q4_K_M are codes"):
        TrainingSettings(grid="gguf:Q4_K_M", scales="learned")


def test_a_gguf_grid_may_have_another_width():
    assert TrainingSettings(grid="gguf:Q8_0", schedule="0:16,0.9:8").grid == "gguf:Q8_0"
    assert gguf_type("gguf:Q8_0").value == "Q8_0"


RECIPES = [
    ("rate: 1\n", "{path}: rate is no setting of a training; there are grid, schedule"),
    ("- epochs\n", "{path} is not a training recipe, which is a mapping of grid, schedule"),
    ("", "{path} is not a training recipe"),
    ("epochs: [1\n", "{path} is not YAML: "),
]


@pytest.mark.parametrize(("text", "message"), RECIPES)
def test_a_recipe_that_is_none(text, message, tmp_path):
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(ConfigError) as raised:
        TrainingSettings.read(path)
    assert str(raised.value).startswith(message.format(path=path))
    assert "\n" not in str(raised.value)


def test_a_recipe_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        TrainingSettings.read(path)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such recipe"):
        TrainingSettings.read(tmp_path / "nowhere.yaml")
