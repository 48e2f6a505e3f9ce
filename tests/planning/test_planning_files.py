"""The files of a plan against the files that `srd quantize` then writes, byte for byte where they hold tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from random_models import make_llama, make_mixture, save_model

from srd_modifier.checkpoint import base_writer
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.planning.plan import Plan, plan
from srd_modifier.quantizing import quantize

REPOSITORY = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((REPOSITORY / "recipes").glob("*.yaml"))}
# AWQ of llm-compressor needs an accelerator
EXACT = ("w4a16", "srd_full", "srd_datafree", "srd_gptq", "srd_selective", "srd_gguf")
SLOW = ("srd_autoround", "srd_budget", "srd_small")
TEXT = REPOSITORY / "examples" / "text" / "demo.txt"

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_llama(**SIZES), tmp_path_factory.mktemp("models") / "llama-128")


def w4(group: int, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, **changes}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., tuple[Plan, Path]]:
    """The plan, made first, and the checkpoint."""

    def run(model: Path, recipe: Path | dict[str, Any], *, data: bool = False) -> tuple[Plan, Path]:
        if isinstance(recipe, dict):
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": {"SRDModifier": recipe}}}))
            recipe = path
        planned = plan(str(model), recipe, probe=False)
        options: dict[str, Any] = {"dataset": str(TEXT), "num_samples": 8, "max_seq_length": 64} if data else {}
        quantize(str(model), recipe, tmp_path / "out", **options)
        return planned, tmp_path / "out"

    return run


def found(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern))


def total(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_exact(planned: Plan, written: Path, *, biases: int = 0) -> None:
    files = planned.files
    assert files.base == found(written, "*.safetensors")
    assert files.base_index == found(written, "model.safetensors.index.json")
    assert files.residual == found(written, "srd/residual-*.safetensors")
    assert files.residual_index == found(written, "srd/residual.safetensors.index.json")
    assert files.importance == found(written, "srd/importance.safetensors")
    assert files.gguf == found(written, "*.gguf")
    assert planned.total_bytes == pytest.approx(total(written), rel=0.01)
    size = measure(written)
    assert planned.bits_per_weight == pytest.approx(size.bits_per_weight, rel=1e-12)
    assert planned.weights == size.quantized_weights
    assert planned.all_weights == size.total_weights + biases


@pytest.mark.parametrize(
    "name", [*EXACT, pytest.param("srd_autoround", marks=pytest.mark.slow)], ids=lambda name: str(name)
)
def test_recipes_of_the_repository(name: str, model: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    check_exact(*both(model, RECIPES[name], data=name not in ("w4a16", "srd_full", "srd_datafree")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["srd_budget", "srd_small"])
def test_a_budget_is_the_most_that_is_written(name: str, model: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    planned, written = both(model, RECIPES[name], data=True)
    assert planned.residual is None
    assert planned.files.base == found(written, "*.safetensors")
    assert planned.total_bytes is not None
    assert planned.total_bytes == pytest.approx(total(written), rel=0.01)
    assert measure(written).bits_per_weight <= planned.bits_per_weight  # type: ignore[operator]


def test_no_recipe_is_left_out() -> None:
    assert {*EXACT, *SLOW, "srd_awq"} == set(RECIPES)


def test_a_tied_head_is_written_once(tmp_path: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    model = save_model(make_llama(**SIZES, tie_word_embeddings=True), tmp_path / "tied")
    check_exact(*both(model, w4(64)))


def test_uneven_residual_groups_and_odd_shapes(tmp_path: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    """Rows that are no whole words of zero points, columns that are no whole groups or bytes of codes."""
    sizes = {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = save_model(make_llama(**sizes, head_dim=10), tmp_path / "odd")
    settings = {"residual_bits": 5, "residual_group_size": 32, "density": 0.3, "scale_dtype": "float32"}
    check_exact(*both(model, {**w4(20, symmetric=False), **settings}))


def test_biases_and_channel_scales(tmp_path: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    model = save_model(make_llama(attention_bias=True, mlp_bias=True), tmp_path / "biases")
    biases = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    recipe = w4(64)
    recipe["config_groups"]["group_0"]["weights"] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
    }
    check_exact(*both(model, recipe), biases=biases)


def test_a_mixture_of_experts(tmp_path: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    planned, written = both(save_model(make_mixture(num_experts=4), tmp_path / "moe"), w4(32))
    assert planned.quantized["gate_proj"] == 8
    check_exact(planned, written)


def test_a_model_of_several_files(tmp_path: Path, both: Callable[..., tuple[Plan, Path]]) -> None:
    model = save_model(make_llama(), tmp_path / "whole")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((model / name).read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    check_exact(*both(tmp_path / "sharded", w4(32)))


def test_an_output_of_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: Callable[..., tuple[Plan, Path]]
) -> None:
    """Their limit is 20 GB; here llm-compressor is told another one too."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(base_writer, "MAX_FILE", "200KB")
    model = save_model(make_llama(), tmp_path / "model")
    monkeypatch.setattr(
        PreTrainedModel,
        "save_pretrained",
        lambda self, folder, **options: save(self, folder, **options | {"max_shard_size": "200KB"}),
    )
    planned, written = both(model, w4(32))
    assert planned.files.base_index > 0
    check_exact(planned, written)
