import json
from pathlib import Path

import pytest
from random_models import make_llama, save_model

from srd_modifier.planning.plan import plan

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5}
    return save_model(make_llama(**sizes), tmp_path_factory.mktemp("models") / "llama-128")


def test_json_is_the_plan(srd, model):
    done = srd("plan", model, "--recipe", RECIPES / "srd_full.yaml", "--no-probe", "--json")
    assert (done.status, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(
        json.dumps(plan(str(model), RECIPES / "srd_full.yaml", probe=False).as_json())
    )


def test_the_tables_have_the_figures(srd, model):
    recipe = RECIPES / "srd_datafree.yaml"
    planned = plan(str(model), recipe, probe=False)
    shown = srd("plan", model, "--recipe", recipe, "--no-probe").stdout
    for size in (planned.base.codes, planned.base.zero_points, planned.residual.codes, planned.total_bytes):
        assert f"{size:,}" in shown
    assert "GGUF Q4_K_M" in shown
    assert "output head" in shown
    assert "time" not in shown


def test_a_budget_is_shown_as_the_most(srd, model):
    shown = srd("plan", model, "--recipe", RECIPES / "srd_budget.yaml", "--no-probe").stdout
    assert "at most 5.500" in shown
    assert "up to 14" in shown


def test_what_is_not_estimated_is_said(srd, model):
    shown = srd("plan", model, "--recipe", RECIPES / "srd_autoround.yaml").stdout
    assert "time and memory are not estimated: AutoRoundModifier calibrates in a way of its own" in shown


@pytest.mark.slow
def test_a_recipe_that_calibrates(srd_process, model):
    data = ("--num-samples", "3", "--max-seq-length", "32")
    done = srd_process("plan", model, "--recipe", RECIPES / "srd_gptq.yaml", *data)
    assert (done.status, done.stderr) == (0, "")
    assert "of given data of 96 tokens" in done.stdout
    assert "memory at its peak: about 0." in done.stdout


@pytest.mark.slow
def test_the_installed_command(srd_process, model):
    done = srd_process("plan", model, "--recipe", RECIPES / "srd_full.yaml")
    assert (done.status, done.stderr) == (0, "")
    assert "time on this machine: about " in done.stdout
    assert "memory at its peak: about 0." in done.stdout


# faults: one sentence each


def test_no_such_recipe(srd, model, tmp_path):
    sentence = srd("plan", model, "--recipe", tmp_path / "none.yaml").sentence
    assert sentence == f"{tmp_path / 'none.yaml'}: there is no such recipe"


def test_no_such_model(srd, tmp_path):
    sentence = srd("plan", tmp_path / "none", "--recipe", RECIPES / "srd_full.yaml").sentence
    assert sentence == f"{tmp_path / 'none'}: there is no such directory"


def test_a_hub_id_without_a_connection(srd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = srd("plan", "someone/nothing-of-that-name", "--recipe", RECIPES / "srd_full.yaml").sentence
    assert sentence.startswith("someone/nothing-of-that-name: there is no such directory, and no such model could be")
