"""A dense model that vLLM serves is the model of the checkpoint, as float32 torch computes it.

The cases that always run cover every value of every setting. SRD_FULL_MATRIX=1 adds the product of them, about twenty
engines; `-rP` prints all figures.
"""

import os
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from parity import VOCABULARY, Case, Reference, by_cover, sampled_prompts, text_prompts, write_peaked
from rtn import LINEAR, Scheme, write_checkpoint

pytestmark = pytest.mark.slow

HALF, ZERO = {"alpha": 0.5}, {"alpha": 0}
REASONING = {"alpha": 1, "chunks": ["reasoning"]}
NO_KEYS = {"alpha": 0.75, "layer_alphas": {r"re:.*\.k_proj$": 0, r"re:.*\.(0|5)\.mlp\.up_proj$": 0}}

# every layout of W4, in the first layers
SCHEMES = {
    r"model\.layers\.0\..*_proj": Scheme(group_size=32),
    r"model\.layers\.1\..*_proj": Scheme(group_size=128),
    r"model\.layers\.2\..*_proj": Scheme(group_size=-1),
    r"model\.layers\.3\..*_proj": Scheme(negative=True),
    r"model\.layers\.4\..*_proj": Scheme(symmetric=False),
    r"model\.layers\.5\..*_proj": Scheme(group_size=128, symmetric=False),
}

CASES = [
    Case("float32", 1, 64, "full", {}, (HALF, ZERO, REASONING, NO_KEYS)),
    Case("float32", 2, 128, "selective", HALF, ({"alpha": 1}, ZERO)),
    Case("bfloat16", 1, 64, "full", HALF, ({"alpha": 1}, ZERO, NO_KEYS)),
    Case("bfloat16", 1, 128, "selective", REASONING, ({**REASONING, "alpha": 0.5},)),
]
FULL_MATRIX = [
    *(
        Case(dtype, ranks, group_size, cover, {"compute": "merge"}, (HALF, ZERO, REASONING))
        for dtype, ranks, group_size, cover in product(
            ("float32", "bfloat16"), (1, 2), (64, 128), ("full", "selective")
        )
    ),
    *(Case("bfloat16", ranks, group_size, "full", ZERO) for ranks, group_size in product((1, 2), (64, 128))),
    *(Case("bfloat16", 1, group_size, "full", {}, (HALF, ZERO)) for group_size in (32, -1)),
]
if os.environ.get("SRD_FULL_MATRIX") == "1":
    CASES += [case for case in FULL_MATRIX if not any(case.covered_by(other) for other in CASES)]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny-llama by group size and cover, each made once."""
    return by_cover(tiny_llama, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return text_prompts()


def test_the_settings_make_a_difference_that_the_tolerance_does_not_hide(checkpoint, prompts):
    directory = checkpoint(64, "full")
    found = {str(given): Reference(directory, **given).own(prompts) for given in ({}, HALF, ZERO, REASONING, NO_KEYS)}
    for first, second in product(found, found):
        difference = float((found[first] - found[second]).abs().mean())
        assert first == second or difference > 0.02, (first, second, difference)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_parity(case, run_engine, checkpoint, prompts):
    case.check(run_engine, checkpoint(case.group_size, case.cover), prompts)


def test_every_layout_of_w4_in_vllms_own_kernels(run_engine, tiny_llama, prompts, tmp_path):
    """Groups of all sizes, zero points and negative scales, in slices, below layers that are corrected."""
    directory = write_checkpoint(tiny_llama, tmp_path / "layouts", schemes=SCHEMES)
    start = {"alpha": 0, "layer_alphas": {r"re:model\.layers\.[67]\.": 1}}
    engine = Case("bfloat16", 2, 64, "full", start).check(run_engine, directory, prompts)
    assert "srd-modifier: merge 8 layers, 14 modules" in engine.log


def test_every_layout_of_w4_merged(run_engine, tiny_llama, prompts, tmp_path):
    directory = write_checkpoint(tiny_llama, tmp_path / "layouts", schemes=SCHEMES)
    Case("float16", 1, 64, "full", {}, (ZERO,)).check(run_engine, directory, prompts)


def test_biases_and_a_quantized_head(run_engine, tmp_path):
    """Fused layers with biases, corrected in part, and an output head with a residual."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=VOCABULARY, attention_bias=True, mlp_bias=True, eos_token_id=0
    )
    model = write_peaked(config, tmp_path / "model")
    prompts = sampled_prompts(model)
    directory = write_checkpoint(
        model, tmp_path / "srd", quantized=f"{LINEAR}|lm_head", ignore=(), corrected=lambda name: "v_proj" not in name
    )
    engine = Case("bfloat16", 2, 64, "selective", {}, (HALF,)).check(run_engine, directory, prompts)
    assert re.search(r"srd-modifier: merge 13 layers", engine.log)


def test_pipeline_stages(run_engine, checkpoint, prompts):
    """The second stage of vLLM 0.32 on a CPU gets its buffers while the model is compiled: not with enforce_eager."""
    parallel = {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    }
    case = Case("float32", 1, 64, "selective", HALF)
    case.check(run_engine, checkpoint(64, "selective"), prompts, **parallel)
