"""Models that memory has no room for."""

import gc
from pathlib import Path
from typing import Any

import pytest
from random_models import make_llama, save_model
from streamed import differing, scheme, srd, write_recipe

from srd_modifier import loading
from srd_modifier.errors import SRDError
from srd_modifier.loading import load_tokenizer, loaded_model
from srd_modifier.quantizing import quantize

SRD = {"ignore": ["lm_head"], "residual_group_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"SRDModifier": SRD, "GPTQModifier": scheme()},
    "nearest": {"SRDModifier": srd()},
    "feedback": {"SRDModifier": srd(base_rounding="feedback", rounding="feedback")},
    "budget": {"SRDModifier": {**scheme(), "correct": {"budget": "6bpw"}, "sensitivity_tokens": 64}},
}
SAMPLES = [[(7 * row + 3 * position) % 4000 + 1 for position in range(24)] for row in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_llama(num_hidden_layers=3), tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("name", RECIPES)
def test_weights_on_the_disk_change_nothing_of_the_result(name: str, model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", *RECIPES[name].items())
    outputs = [tmp_path / "out" / "memory", tmp_path / "out" / "disk"]
    for output, limit in zip(outputs, (None, 100_000), strict=True):
        quantize(str(model), recipe, output, dataset=SAMPLES, max_memory=limit)
    assert differing(*outputs) == []
    gc.collect()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["disk", "memory"]


def on_the_disk(model: Any) -> list[str]:
    from compressed_tensors.offload.cache import DiskCache

    return [name for name, module in model.named_modules() if isinstance(module._parameters, DiskCache)]


def test_what_has_no_room_is_on_the_disk(model: Path, tmp_path: Path) -> None:
    with loaded_model(str(model), tmp_path, max_memory=100_000) as loaded:
        assert "model.layers.2.mlp.down_proj" in on_the_disk(loaded)
        assert [path.name.startswith(".srd-offload-") for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []


def test_what_has_room_is_in_memory(model: Path, tmp_path: Path) -> None:
    with loaded_model(str(model), tmp_path, max_memory=10**9) as loaded:
        assert on_the_disk(loaded) == []
        assert list(tmp_path.iterdir()) == []


def test_free_memory_decides_where_nobody_else_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "room_for_weights", lambda: 100_000)
    with loaded_model(str(model), tmp_path) as loaded:
        assert on_the_disk(loaded)


def test_an_error_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), loaded_model(str(model), tmp_path, max_memory=0):
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SRDError, match=r"empty has no config\.json"), loaded_model(str(tmp_path / "empty"), tmp_path):
        pass
    with pytest.raises(SRDError, match=r"cannot load .*nowhere"), loaded_model(str(tmp_path / "nowhere"), tmp_path):
        pass
    with pytest.raises(SRDError, match="cannot load"):
        load_tokenizer(str(tmp_path / "empty"))
