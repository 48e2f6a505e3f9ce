"""Whole engines with compute `int8` and `split`, whose int8 kernel is plain torch (`reference_engine.py`).

All of vLLM but that kernel is real, and so is its W4 kernel for a CPU. Not every part of a fused layer is corrected.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import TOLERANCES, Reference, text_prompts, write_peaked
from rtn import write_checkpoint

from srd_modifier.checkpoint.sidecar import Sidecar

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "reference_engine.py"
CORRECTED = ("v_proj", "up_proj", "down_proj")
LOST = re.compile(r"srd-modifier: (\w+) (\d+) layers.* kernels lose ([\d.]+)% of the correction")


@pytest.fixture(scope="module")
def run_reference(run_engine: Callable[..., Any]) -> Callable[..., Any]:
    """`run_engine` with the reference kernel."""
    return partial(run_engine, program=PROGRAM)


@pytest.fixture(scope="module")
def partly(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama, corrected in part of its fused layers."""
    directory = tmp_path_factory.mktemp("int8") / "partly"
    return write_checkpoint(tiny_llama, directory, corrected=lambda module: module.endswith(CORRECTED))


@pytest.fixture(scope="module", params=["int8", "split"])
def engine(request: pytest.FixtureRequest, run_reference: Callable[..., Any], partly: Path) -> tuple[str, Any]:
    """The answers at alpha 1 and then, with the dial turned, at 0.5."""
    overrides = {"srd_config": {"compute": request.param}}
    found = run_reference(partly, text_prompts(), steps=[{"alpha": 0.5}], hf_overrides=overrides)
    assert found.status == 0, found.log[-8000:]
    return request.param, found


@pytest.mark.parametrize(("step", "alpha"), [(0, 1.0), (1, 0.5)])
def test_logprobs_are_the_references(engine, partly, step, alpha):
    compute, found = engine
    difference = (found.answers[step].logprobs - Reference(partly, alpha=alpha).own(text_prompts())).abs().mean()
    print(f"parity | tiny-llama, {compute}, alpha {alpha}, in part | bfloat16 | {difference:.2e}")
    assert difference <= TOLERANCES["bfloat16"].mean


@pytest.mark.parametrize("step", [0, 1])
def test_the_log_tells_what_the_kernels_lose(engine, partly, step):
    compute, found = engine
    logged = LOST.findall(found.log)[step]
    sidecar = Sidecar.open(partly)
    layers = sidecar.base.layers * 3  # qkv, gate and up, down
    assert logged[:2] == (compute, str(layers))
    lost = lost_in_int8(sidecar, alpha=(1.0, 0.5)[step]) if compute == "int8" else 0
    assert float(logged[2]) == pytest.approx(100 * lost, abs=0.02)


def lost_in_int8(sidecar: Sidecar, alpha: float) -> float:
    """Against the correction, in plain torch: scales of bfloat16 for 64 columns."""
    lost = corrected = 0.0
    for module in sidecar.entries:
        base, exact = sidecar.base.dequantize(module), sidecar.correct(module, alpha)
        grouped = exact.view(len(exact), -1, 64)
        scale = (grouped.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
        lost += float(((grouped / scale).round() * scale - grouped).square().sum())
        corrected += float((exact - base).square().sum())
    return (lost / corrected) ** 0.5


@pytest.mark.parametrize(
    ("compute", "dtype"), [("split", "float16"), ("int8", "bfloat16")], ids=["split, float16", "int8, bfloat16"]
)
def test_two_ranks_and_biases(run_reference, tmp_path, compute, dtype):
    """The kernel permutes the bias of its layer: had that of the residual the same bias, it would be permuted twice."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    model = write_peaked(LlamaConfig(max_position_embeddings=256, **sizes, **heads), tmp_path / "model")
    directory = write_checkpoint(model, tmp_path / "checkpoint", group_size=32, alpha=0.75)
    prompts = torch.randint(1, 4096, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    overrides = {"srd_config": {"alpha": 0.75, "compute": compute}}
    found = run_reference(directory, prompts, tensor_parallel_size=2, dtype=dtype, hf_overrides=overrides)
    assert found.status == 0, found.log[-8000:]
    difference = (found.answers[0].logprobs - Reference(directory).own(prompts)).abs().mean()
    print(f"parity | random Llama with biases, {compute}, alpha 0.75, TP=2 | {dtype} | {difference:.2e}")
    assert difference <= TOLERANCES[dtype].mean
