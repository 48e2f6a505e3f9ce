import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from header_models import write_headers

from srd_modifier.checkpoint.shards import Shard
from srd_modifier.errors import CheckpointError, ConfigError, RecipeError, SRDError
from srd_modifier.planning.plan import plan

FULL = Path(__file__).parents[2] / "recipes" / "srd_full.yaml"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every way to the data of a safetensors file fail."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a weight was read")

    for name in ("view", "chunks", "read", "tensor"):
        monkeypatch.setattr(Shard, name, refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)


def write(path: Path, **modifiers: Any) -> Path:
    path.write_text(yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False))
    return path


@pytest.mark.usefixtures("no_reading")
def test_no_weight_is_read(small: Path) -> None:
    assert plan(str(small), FULL, probe=False).quantized["q_proj"] == 5


@pytest.mark.usefixtures("no_reading")
def test_a_model_of_holes_is_planned_as_the_whole_one(tmp_path: Path) -> None:
    """Sixteen gigabytes of which the disk has a few kilobytes."""
    model = write_headers(tmp_path / "8b", 4, **LLAMA_8B)
    assert sum(path.stat().st_blocks * 512 for path in model.iterdir()) < 2**20
    planned = plan(str(model), FULL, probe=False)
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert planned.weights == weights
    assert planned.base.codes == weights // 2
    assert planned.base.scales == 2 * weights // 128
    assert planned.base.shapes == 16 * 7 * 32
    assert planned.base.zero_points == 0
    assert planned.base.unquantized == 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)
    assert planned.residual is not None
    assert (planned.residual.codes, planned.residual.scales, planned.residual.masks) == (weights, 2 * weights // 64, 0)
    forms = {form.name: form for form in planned.alternatives}
    assert forms["original"].bytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert forms["original"].bits_per_weight == 16
    assert forms["W4 alone"].bytes == planned.files.base
    assert forms["W4 and D8 everywhere"].bytes == planned.files.base + planned.files.residual
    # layers 13 to 24 of 32
    part = forms["W4 and D8 at 40-77 % of depth"]
    assert part.bits_per_weight == pytest.approx(
        forms["W4 alone"].bits_per_weight + 12 / 32 * (8 + 16 / 64),
        rel=1e-9,  # type: ignore[operator]
    )
    assert "GGUF Q8_0" not in forms  # there is no tokenizer


def test_modules_by_kind_and_chunk_and_why_others_are_left(small: Path, tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        SRDModifier={"ignore": [], "correct": {"chunks": ["early", "reasoning"]}},
        GPTQModifier={"scheme": "W4A16", "targets": ["re:.*proj$"], "ignore": ["lm_head", "re:.*layers.1.mlp.*"]},
    )
    planned = plan(str(small), recipe, probe=False)
    attention = {"q_proj": 5, "k_proj": 5, "v_proj": 5, "o_proj": 5}
    assert planned.quantized == {**attention, "gate_proj": 4, "up_proj": 4, "down_proj": 4}
    chunks = {name: (chunk.quantized, chunk.corrected) for name, chunk in planned.chunks.items()}
    assert chunks == {"early": (7, 7), "factual": (4, 0), "reasoning": (14, 14), "governance": (7, 0)}
    assert planned.skipped == {"embedding": 1, "ignore": 3, "output head": 1}


def test_a_budget_in_bytes_is_of_the_files_with_weights(small: Path, tmp_path: Path) -> None:
    srd = {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"], "correct": {"budget": 2_700_000}}
    planned = plan(str(small), write(tmp_path / "r.yaml", SRDModifier=srd), probe=False)
    assert planned.files.base + planned.files.residual == 2_700_000
    assert planned.residual is None


def test_a_divergence_leaves_the_bytes_open(small: Path, tmp_path: Path) -> None:
    srd = {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"], "correct": {"max_divergence": 0.001}}
    planned = plan(str(small), write(tmp_path / "r.yaml", SRDModifier=srd), probe=False)
    assert (planned.total_bytes, planned.bits_per_weight, planned.files.residual) == (None, None, 0)


# what `srd quantize` would refuse


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    model = write_headers(tmp_path / "m", 1, **{**LLAMA_8B, "hidden_size": 576, "num_attention_heads": 9})
    with pytest.raises(RecipeError, match="q_proj has 576 input features, which groups of 128 do not divide"):
        plan(str(model), FULL, probe=False)


def test_too_small_a_budget(small: Path, tmp_path: Path) -> None:
    srd = {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"], "correct": {"budget": "3bpw"}}
    with pytest.raises(ConfigError, match="budget 3 bpw is too small"):
        plan(str(small), write(tmp_path / "r.yaml", SRDModifier=srd), probe=False)


def test_a_model_that_is_quantized(finished_checkpoint: Path) -> None:
    with pytest.raises(SRDError, match="is quantized already; start from the original model"):
        plan(str(finished_checkpoint), FULL, probe=False)


def test_a_config_that_belongs_to_another_model(small: Path, tmp_path: Path) -> None:
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \[256, 128\] in the file, \[512, 128\] by config"):
        plan(str(tmp_path), FULL, probe=False)


def test_json_has_everything(small: Path) -> None:
    planned = plan(str(small), FULL, probe=False)
    assert json.loads(json.dumps(planned.as_json()))["files"]["base"] == planned.files.base
    assert replace(planned, model="x").as_json()["model"] == "x"
