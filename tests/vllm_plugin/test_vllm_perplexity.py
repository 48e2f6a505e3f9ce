"""Perplexity through vLLM's log-probabilities of prompts is what `srd eval` says of the same windows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rtn import write_checkpoint

from srd_modifier.evaluation.windows import Window, window_rule

pytestmark = pytest.mark.slow

WINDOWS, CONTEXT, STRIDE = 64, 512, 256
TOKENS = CONTEXT + (WINDOWS - 1) * STRIDE
TOLERANCE = 1e-3  # W4 and the corrected model are twice as far apart


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_llama, tmp_path_factory.mktemp("checkpoints") / "srd")


@pytest.fixture(scope="module")
def text(wikitext: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its beginning, more than is scored."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(wikitext[: 8 * TOKENS], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    found = window_rule(ctx=CONTEXT, stride=STRIDE).windows(TOKENS)
    assert len(found) == WINDOWS
    return found


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path, text: Path, windows: list[Window]) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_llama)(text.read_text(encoding="utf-8"))["input_ids"]
    assert len(ids) > TOKENS
    return [ids[window.start : window.stop] for window in windows]


@pytest.fixture(scope="module")
def reports(checkpoint: Path, text: Path) -> dict[int, dict[str, Any]]:
    """What the command says, by alpha."""
    sizes = ["--ctx", str(CONTEXT), "--stride", str(STRIDE), "--max-tokens", str(TOKENS)]
    command = [Path(sys.executable).with_name("srd"), "eval", checkpoint, "--text", text, *sizes, "--json", "-"]
    return {
        alpha: json.loads(
            subprocess.run([*command, "--alpha", str(alpha)], check=True, stdout=subprocess.PIPE).stdout,
        )
        for alpha in (0, 1)
    }


@pytest.mark.parametrize("alpha", [0, 1], ids=["w4", "corrected"])
def test_perplexity_agrees_with_srd_eval(alpha, serve, checkpoint, reports, windows, prompts):
    overrides = {"srd_config": {"alpha": alpha}}
    logprobs = serve(checkpoint, prompts, max_model_len=2 * CONTEXT, hf_overrides=overrides).logprobs
    scored = torch.cat([values[-window.scored :] for values, window in zip(logprobs, windows, strict=True)])
    found, expected = float(scored.double().mean().neg().exp()), reports[alpha]["ppl"]
    print(f"perplexity | alpha {alpha} | vLLM bfloat16 {found:.4f} | srd eval float32 {expected:.4f}")
    assert reports[alpha]["tokens"] == len(scored)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert found != pytest.approx(reports[1 - alpha]["ppl"], rel=TOLERANCE)  # the other model is not the one served
