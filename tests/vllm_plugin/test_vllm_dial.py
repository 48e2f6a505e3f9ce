"""The dial of running engines: whatever it is turned to, the engine answers as one that was started so."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from random_models import save_model
from rtn import write_checkpoint
from torch import Tensor
from vllm_environment import environment

from srd_modifier.errors import ConfigError
from srd_modifier.vllm.dial import EXTENSION, set_alpha

pytestmark = pytest.mark.slow

TURNING = Path(__file__).with_name("turning.py")
PROMPTS = [[(37 * i * i + 11 * k + 5) % 4000 + 3 for i in range(200)] for k in range(2)]
OTHER = {"rms_norm_eps": 1e-4}  # what else a user overrides; the dial replaces srd_config and nothing besides
MIXED = {
    "alpha": 0.5,
    "layer_alphas": {r"re:.*\.o_proj$": 0.25, "model.layers.4.mlp.down_proj": 1},
    "chunks": ["factual", "reasoning"],
}


class Turn(NamedTuple):
    """What an engine answered after a turn; see turning.py."""

    error: str | None
    refused: str | None
    logprobs: Tensor
    next: list[float] | None = None
    cached: int | None = None


Turner = Callable[..., list[Turn]]


@pytest.fixture(scope="module")
def turn(tmp_path_factory: pytest.TempPathFactory) -> Turner:
    """Start an engine with settings of srd_config, turn its dial, and give its answers."""

    def run(
        model: Path, start: dict[str, Any], *turns: dict[str, Any], multiprocessing: bool = False, **arguments: Any
    ) -> list[Turn]:
        arguments = {
            "model": str(model),
            "hf_overrides": {**OTHER, "srd_config": start},
            "worker_extension_cls": EXTENSION,
            "dtype": "float32",
            "max_model_len": 256,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "disable_log_stats": True,
            **arguments,
        }
        folder = tmp_path_factory.mktemp("turning")
        request = {"arguments": arguments, "prompts": PROMPTS, "turns": turns}
        (folder / "REQUEST.json").write_text(json.dumps(request))
        multiprocessing = multiprocessing or arguments.get("tensor_parallel_size", 1) > 1
        done = subprocess.run(
            [sys.executable, str(TURNING), str(folder / "REQUEST.json")],
            env=environment(multiprocessing=multiprocessing),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        results = json.loads((folder / "RESULT.json").read_text())
        for result in results:
            result["logprobs"] = torch.tensor(result.get("logprobs", []))
        return [Turn(**result) for result in results]

    return run


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_llama, tmp_path_factory.mktemp("dial") / "checkpoint")


def merged(**settings: Any) -> dict[str, Any]:
    return {"compute": "merge", **settings}


def same(found: Turn, expected: Turn) -> bool:
    return found.error is None and torch.equal(found.logprobs, expected.logprobs) and found.next == expected.next


@pytest.fixture(scope="module")
def started(checkpoint: Path, turn: Turner) -> dict[str, list[Turn]]:
    """Three engines that were started at one setting each, and turned to another one."""
    bad = [{"alpha": 2}, {"alpha": 1, "chunks": ["late"]}, {"alpha": 1, "layer_alphas": {"re:(": 1}}]
    return {
        "full": turn(checkpoint, merged(alpha=1), {"alpha": 0}, *bad, MIXED, {"alpha": 1}),
        "none": turn(checkpoint, merged(alpha=0), {"alpha": 1}),
        "mixed": turn(checkpoint, merged(**MIXED), {"alpha": 0.5}, {"alpha": 0}, multiprocessing=True),
    }


def test_the_settings_differ_at_all(started):
    full, none, mixed = (started[name][0].logprobs for name in ("full", "none", "mixed"))
    distances = [(a - b).abs().mean().item() for a, b in ((full, none), (full, mixed), (none, mixed))]
    assert min(distances) > 1e-3, distances
    assert not torch.equal(started["mixed"][1].logprobs, started["mixed"][0].logprobs)


def test_a_turned_engine_answers_as_one_that_was_started_so(started):
    full, none, mixed = started["full"], started["none"], started["mixed"]
    assert same(full[1], none[0])
    assert same(full[5], mixed[0])
    assert same(full[6], full[0])  # and back
    assert same(none[1], full[0])  # up from nothing
    assert same(mixed[2], none[0])


def test_what_was_cached_of_prompts_is_dropped(started):
    full = started["full"]
    assert full[0].cached == full[1].cached == full[5].cached == full[6].cached == 0
    assert full[2].cached > 0  # after a turn that failed, the weights are what they were


def test_a_turn_that_fails_changes_nothing(started):
    after, *failed = started["full"][1:5]
    assert [turn.error for turn in failed] == [
        "ConfigError: alpha is 2, expected a number from 0 to 1",
        "ConfigError: chunk 'late' is unknown, expected some of ['early', 'factual', 'reasoning', 'governance']",
        "ConfigError: the pattern 're:(' is not a regular expression: missing ), unterminated subpattern at position 0",
    ]
    assert all(torch.equal(turn.logprobs, after.logprobs) for turn in failed)


@pytest.fixture(scope="module")
def half(checkpoint: Path, turn: Turner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Turn]]:
    """An engine in bfloat16, and the file that is damaged before its last turn."""
    copy = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("spoiled") / "checkpoint"))
    spoiled = next((copy / "srd").glob("residual*.safetensors"))
    turns = [{"alpha": 1}, {"alpha": 0}, {"alpha": 0.5, "spoil": str(spoiled)}, {"alpha": 1}]
    return spoiled, turn(copy, merged(alpha=0.5), *turns, dtype="bfloat16")


def test_bfloat16(half, checkpoint, turn):
    middle, full, none = half[1][:3]
    first, turned = turn(checkpoint, merged(alpha=0), {"alpha": 0.5}, dtype="bfloat16")
    assert same(none, first)
    assert same(turned, middle)
    assert not torch.equal(full.logprobs, middle.logprobs)


def test_a_file_that_was_damaged_meanwhile_leaves_no_engine_of_two_settings(half):
    """Its residual is read when some layers have their new weights already."""
    spoiled, turns = half
    assert len(turns) == 4
    assert re.fullmatch(
        rf"CheckpointError: {spoiled}: model\.\S+ does not match its digest; the file is damaged; the weights are "
        r"those of two settings now: start the engine again",
        turns[3].error,
    )
    assert turns[3].refused == f"SRDError: {turns[3].error.removeprefix('CheckpointError: ')}"


def test_a_layer_that_was_started_as_w4_stays_w4(checkpoint, turn):
    """`auto` leaves the layers of other chunks to the W4 kernels, which have no place for a correction."""
    chunk = {"alpha": 1, "chunks": ["early"]}
    first, full, half, back = turn(checkpoint, chunk, {"alpha": 1}, {**chunk, "alpha": 0.5}, chunk, dtype="bfloat16")
    assert re.fullmatch(
        r"ConfigError: model\.layers\.2\.\w+\.\w+: the engine was started with alpha 0 for it, and computes it as W4; "
        r"start it with srd_config\.compute 'merge' to turn the dial later",
        full.error,
    )
    assert torch.equal(full.logprobs, first.logprobs)
    assert not torch.equal(half.logprobs, first.logprobs)
    assert same(back, first)


@pytest.mark.parametrize("extension", ["", "srd_modifier.vllm.settings.Settings"])
def test_an_engine_must_be_started_for_it(extension):
    engine = idle_engine(worker_extension_cls=extension)
    with pytest.raises(
        ConfigError, match=r"^the dial of this engine cannot be turned: start it with worker_extension_cls="
    ):
        set_alpha(engine, 1)


def test_requests_must_have_ended():
    """Each of them would be computed with weights of two settings."""
    engine = idle_engine(worker_extension_cls=EXTENSION)
    engine.llm_engine.has_unfinished_requests = lambda: True
    with pytest.raises(ConfigError, match=r"^the dial of this engine cannot be turned while requests are running$"):
        set_alpha(engine, 1)


def idle_engine(**parallel: Any) -> Any:
    """As much of a `vllm.LLM` as can be told from outside."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config, has_unfinished_requests=lambda: False))


def test_two_ranks(checkpoint, turn, started):
    first, none, wrong, back = turn(
        checkpoint,
        merged(alpha=1),
        {"alpha": 0},
        {"alpha": 1, "layer_alphas": {"re:(": 1}},
        {"alpha": 1},
        tensor_parallel_size=2,
    )
    # two ranks add up in another order than one
    torch.testing.assert_close(first.logprobs, started["full"][0].logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(none.logprobs, started["none"][0].logprobs, rtol=0, atol=1e-4)
    assert wrong.error.startswith("ConfigError: the pattern 're:(' is not a regular expression: ")
    assert torch.equal(wrong.logprobs, none.logprobs)
    assert same(back, first)


def test_a_mixture_of_experts(turn, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes = {"num_hidden_layers": 2, "vocab_size": 4096, "max_position_embeddings": 256, "initializer_range": 0.1}
    model = save_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **heads, **sizes)), tmp_path / "model")
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint", group_size=32)
    full, none, back = turn(checkpoint, merged(alpha=1), {"alpha": 0}, {"alpha": 1})
    assert same(none, turn(checkpoint, merged(alpha=0))[0])
    assert same(back, full)
    assert not torch.equal(none.logprobs, full.logprobs)
