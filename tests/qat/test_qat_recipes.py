"""The recipes of `recipes/qat`: they are read, they train a small model, and one of them is the published setting."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from random_models import make_llama, save_model
from safetensors.torch import load_file

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.qat.exports.destination import Destination
from srd_modifier.qat.schedule import QATSchedule
from srd_modifier.qat.settings import TrainingSettings
from srd_modifier.qat.train import Data, train

REPOSITORY = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((REPOSITORY / "recipes" / "qat").glob("*.yaml"))}
DEMO = REPOSITORY / "examples" / "text" / "demo.txt"

# what the weights of a small model and a short text have to have smaller than a recipe does
SMALL = {"group_size": 32, "num_samples": 8, "max_seq_length": 32, "batch_size": 2, "micro_batch_size": 2}

PUBLISHED = {
    "grid": "w4a16",
    "schedule": "linear",
    "start": "nearest",
    "group_size": 64,
    "ignore": (),
    "scales": "searched",
    "train": "all",
    "distill": 0.0,
    "temperature": 1.0,
    "epochs": 1,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "batch_size": 64,
    "micro_batch_size": 8,
    "num_samples": 4000,
    "max_seq_length": 512,
    "products": "auto",
    "seed": 0,
}


def test_no_recipe_is_left_out():
    assert {"distilled", "smollm2_1_7b"} <= RECIPES.keys()
    assert all(path in RECIPES.values() for path in (REPOSITORY / "recipes" / "qat").iterdir())


@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_a_recipe_sets_what_it_says(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written.keys() <= {field.name for field in fields(TrainingSettings)}
    settings = TrainingSettings.read(path).as_dict()
    assert {name: settings[name] for name in written} == written


def test_the_published_setting():
    assert asdict(TrainingSettings.read(RECIPES["smollm2_1_7b"])) == PUBLISHED


def test_the_published_schedule():
    """Full precision for a tenth, a straight fall to 4 bits, the last tenth at 4 bits."""
    schedule = QATSchedule.parse(TrainingSettings.read(RECIPES["smollm2_1_7b"]).schedule)
    # 101 steps, so that a step is a hundredth of the training
    assert [schedule.width(step, 101) for step in (0, 10, 30, 50, 70, 90, 100)] == [16, 16, 13, 10, 7, 4, 4]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(make_llama(), tmp_path_factory.mktemp("models") / "small")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_a_recipe_trains(path, small, tmp_path):
    settings = TrainingSettings.read(path, **SMALL)
    exports = [Destination.parse(word) for word in ("bf16", "w4a16")]
    output = tmp_path / "out"
    trained = train(str(small), Data(text=DEMO), settings, output, exports=exports, device="cpu")
    assert (trained.steps, trained.samples) == (4, 8)
    assert trained.exports == (output / "bf16", output / "w4a16")
    record = json.loads((output / "training.json").read_text())
    widths = [entry["bits"] for entry in record["history"] if "loss" in entry]
    assert widths == [QATSchedule.parse(settings.schedule).width(step, 4) for step in range(4)]
    original, dense = load_file(small / "model.safetensors"), load_file(output / "bf16" / "model.safetensors")
    levels = BaseCheckpoint(output / "w4a16")
    for name, weight in dense.items():
        if "_proj." in name:
            assert not torch.equal(weight, original[name])
            assert torch.equal(levels.dequantize(name.removesuffix(".weight")).bfloat16(), weight)
        elif settings.train == "linear":
            assert torch.equal(weight, original[name])
    assert sum("_proj." in name for name in dense) == 14
    if settings.train == "all":
        assert not torch.equal(dense["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
