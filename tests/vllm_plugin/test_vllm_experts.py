"""A mixture of experts that vLLM serves is the model of the checkpoint, as float32 torch computes it.

vLLM's W4 experts need a processor with AMX, so they are merged at alpha 0 too. SRD_FULL_MATRIX=1 adds the product of
all settings, fifteen engines; `-rP` prints all figures.
"""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from parity import VOCABULARY, Case, Reference, by_cover, sampled_prompts, write_peaked

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
