import shutil

import pytest
from safetensors.torch import load_file, save_file
from small_checkpoint import edit_json

from srd_modifier.errors import CheckpointError
from srd_modifier.met import build_met

LAYERS, EXPERTS, ACTIVE, HIDDEN, INNER = 10, 6, 2, 64, 48
WEIGHTS = 3 * HIDDEN * INNER  # of one expert: gate, up and down
# 20 / 20 / 37 / 23 percent of ten layers
SPLIT = {"early": [0, 1], "factual": [2, 3], "reasoning": [4, 5, 6, 7], "governance": [8, 9]}


def test_experts_are_split_with_their_layers(mixture):
    met = build_met(mixture)
    assert met["model"] == {
        "architecture": "Qwen3MoeForCausalLM",
        "layers": LAYERS,
        "experts": {"count": EXPERTS, "active": ACTIVE, "active_fraction": ACTIVE / EXPERTS},
    }
    assert {name: chunk["layers"] for name, chunk in met["chunks"].items()} == SPLIT
    of_one_layer = EXPERTS * WEIGHTS * 4  # float32
    for name, layers in SPLIT.items():
        assert met["chunks"][name]["expert_base_bytes"] == len(layers) * of_one_layer
        assert met["chunks"][name]["base_bytes"] > len(layers) * of_one_layer
    # a third of the experts, and all the rest
    experts = LAYERS * of_one_layer
    active = met["files"]["base_bytes"] - experts + experts * ACTIVE // EXPERTS
    assert {budget["active_bytes_per_token"] for budget in met["budgets"].values()} == {active}
    assert met["files"]["total_bytes"] == (mixture / "model.safetensors").stat().st_size


def test_a_quantized_mixture_has_its_experts_residual_in_the_chunks(mixture_checkpoint):
    met = build_met(mixture_checkpoint)
    groups = WEIGHTS // 16
    shapes = 3 * 16  # weight_shape of gate, up and down: two int64
    base = EXPERTS * (WEIGHTS // 2 + groups * 2 + shapes)
    residual = EXPERTS * (WEIGHTS + groups * 2)
    for name, layers in SPLIT.items():
        chunk = met["chunks"][name]
        assert (chunk["expert_base_bytes"], chunk["expert_residual_bytes"]) == (
            len(layers) * base,
            len(layers) * residual,
        )
        assert chunk["residual_bytes"] > chunk["expert_residual_bytes"]  # attention has some too
    for intent, chunks in met["hydration"].items():
        experts = LAYERS * base + sum(len(SPLIT[chunk]) for chunk in chunks) * residual
        budget = met["budgets"][intent]
        assert budget["active_bytes_per_token"] == budget["memory_bytes"] - experts + -(-experts * ACTIVE // EXPERTS)
    on_disk = [mixture_checkpoint / name for name in met["source"]["files"]]
    assert met["files"]["total_bytes"] == sum(path.stat().st_size for path in on_disk)


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({"num_experts": None, "num_local_experts": 6}, (6, 2)),
        ({"num_experts": None, "n_routed_experts": 6, "num_experts_per_tok": 3}, (6, 3)),
        ({"num_experts_per_tok": None, "top_k_experts": 4}, (6, 4)),
        ({"num_experts": None, "text_config": {"num_experts": 6, "num_experts_per_tok": 1}}, (6, 1)),
    ],
)
def test_configurations_spell_the_experts_in_their_own_ways(changes, experts, mixture, tmp_path):
    copy = shutil.copytree(mixture, tmp_path / "copy")
    edit_json(copy / "config.json", lambda config: config.update(changes))
    found = build_met(copy)["model"]["experts"]
    assert (found["count"], found["active"]) == experts


@pytest.mark.parametrize("changes", [{"num_experts": None}, {"num_experts_per_tok": None}, {"num_experts_per_tok": 7}])
def test_experts_of_which_nothing_is_known_are_refused(changes, mixture, tmp_path):
    copy = shutil.copytree(mixture, tmp_path / "copy")
    edit_json(copy / "config.json", lambda config: config.update(changes))
    message = r"config\.json does not say how many experts there are and how many a token uses"
    with pytest.raises(CheckpointError, match=message):
        build_met(copy)


def test_shared_experts_and_routers_are_for_every_token(mixture, tmp_path):
    copy = shutil.copytree(mixture, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    before = build_met(copy)["chunks"]["early"]
    tensors["model.layers.0.mlp.shared_experts.up_proj.weight"] = tensors["model.layers.0.mlp.gate.weight"].clone()
    save_file(tensors, copy / "model.safetensors")
    after = build_met(copy)["chunks"]["early"]
    assert after["base_bytes"] - before["base_bytes"] == EXPERTS * HIDDEN * 4
    assert after["expert_base_bytes"] == before["expert_base_bytes"]
