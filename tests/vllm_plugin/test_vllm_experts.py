"""A mixture of experts that vLLM serves is the model of the checkpoint, as float32 torch computes it.

vLLM's W4 experts need a processor with AMX, so they are merged at alpha 0 too. SRD_FULL_MATRIX=1 adds the product of
all settings, fifteen engines; `-rP` prints all figures.
"""

import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from parity import VOCABULARY, Case, Reference, assert_parity, by_cover, sampled_prompts, write_peaked
from rtn import write_checkpoint
from safetensors.torch import load_file, save_file

from srd_modifier.residual import ResidualFormat

pytestmark = pytest.mark.slow

HALF, ZERO = {"alpha": 0.5}, {"alpha": 0}
SOME = {"alpha": 1, "layer_alphas": {r"re:.*\.experts\.[0-4]\.": 0, r"re:.*\.down_proj$": 0.5}}

CASES = [
    Case("float32", 1, 64, "full", HALF, ({"alpha": 1}, ZERO, SOME)),
    Case("bfloat16", 2, 128, "selective", {}, (HALF, ZERO)),
]
FULL_MATRIX = [
    Case(dtype, ranks, group_size, cover, {"compute": "merge"}, (HALF, ZERO, SOME))
    for dtype, ranks, group_size, cover in product(("float32", "bfloat16"), (1, 2), (64, 128), ("full", "selective"))
]
if os.environ.get("SRD_FULL_MATRIX") == "1":
    CASES += [case for case in FULL_MATRIX if not any(case.covered_by(other) for other in CASES)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 mixture of eight experts, four to a token."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return write_peaked(config, tmp_path_factory.mktemp("models") / "mixture")


@pytest.fixture(scope="module")
def checkpoint(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The mixture by group size and cover, each made once."""
    return by_cover(mixture, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def prompts(mixture: Path) -> list[list[int]]:
    return sampled_prompts(mixture)


def test_the_settings_make_a_difference_that_the_tolerance_does_not_hide(checkpoint, prompts):
    directory = checkpoint(64, "full")
    found = {str(given): Reference(directory, **given).own(prompts) for given in ({}, HALF, ZERO, SOME)}
    for first, second in product(found, found):
        difference = float((found[first] - found[second]).abs().mean())
        assert first == second or difference > 0.02, (first, second, difference)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_parity(case, run_engine, checkpoint, prompts):
    engine = case.check(run_engine, checkpoint(case.group_size, case.cover), prompts)
    assert "srd-modifier: merge" in engine.log


# --- Gemma 4


GEMMA4 = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied to random embeddings, it would repeat the last token
}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
E2B = {
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}


def take_apart(model: Path, directory: Path) -> Path:
    """A copy of a model with a tensor for each expert, as llm-compressor saves them."""
    shutil.copytree(model, directory)
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stem, _, stack = name.rpartition(".")
        if stack not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor
            continue
        for number, weight in enumerate(tensor):
            parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            for part, values in (parts if stack == "gate_up_proj" else {stack: weight}).items():
                tensors[f"{stem}.{number}.{part}.weight"] = values.clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(("layout", "modules"), [(EXPERTS, 14 + 12 + 48), (E2B, 24 + 8 + 1)], ids=["experts", "E2B"])
def test_gemma4(layout, modules, run_engine, tmp_path):
    from transformers import Gemma4TextConfig

    model = write_peaked(Gemma4TextConfig(**GEMMA4, **layout), tmp_path / "model")
    quantized = r"(_proj|per_layer_(input_gate|projection|model_projection))$"
    directory = write_checkpoint(
        take_apart(model, tmp_path / "apart"),
        tmp_path / "srd",
        quantized=quantized,
        ignore=("lm_head", "re:.*router"),
        # as a budget may choose: one expert otherwise than the others, one not at all
        formats={"model.layers.1.experts.2.up_proj": ResidualFormat(bits=4, group_size=32, density=0.5)},
        corrected=lambda module: ".experts.3." not in module,
    )
    prompts = sampled_prompts(model)
    engine = run_engine(directory, prompts, tokens=24, steps=[HALF, ZERO], dtype="float32")
    assert engine.status == 0, engine.log[-8000:]
    assert f", {modules} modules of the checkpoint" in engine.log
    for settings, answer in zip(({}, HALF, ZERO), engine.answers, strict=True):
        assert_parity(f"gemma4: {settings}", directory, prompts, answer, "float32", settings)
    first, _, last = (answer.logprobs for answer in engine.answers)
    assert float((first - last).abs().mean()) > 0.02
