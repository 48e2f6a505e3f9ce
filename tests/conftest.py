"""Models and checkpoints that many tests share, made once per session."""

import gc
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA, make_llama, save_model

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"

# as in the Makefile: no model is on a hub, and Transformers writes into a saved tokenizer whether it asked one
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# a key of whoever runs the tests would open their containers
os.environ.pop("SRD_AXM_KEY", None)
torch.set_num_threads(1)

if find_spec("hypothesis") is not None:  # the serving environment has none
    from hypothesis import HealthCheck, settings

    # a slow machine is no error
    settings.register_profile("srd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("srd")


def pytest_collection_finish() -> None:
    """Take what is imported out of every later collection: AutoRound and llm-compressor ask for dozens in a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained model that the repository ships."""
    return TINY_LLAMA


@pytest.fixture(scope="session")
def wikitext() -> str:
    """WikiText-2's raw test split, where it is at hand."""
    path = SHARED / "data" / "eval" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip(f"needs WikiText-2 at {path}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six small layers with random bf16 weights, untied head, and tiny-llama's tokenizer."""
    return save_model(make_llama(num_hidden_layers=6), tmp_path_factory.mktemp("models") / "random-llama")


@pytest.fixture(scope="session")
def group_scheme() -> Callable[..., dict[str, Any]]:
    """`config_groups` for 4-bit weights with any group size; -1 is one scale per row."""

    def make(group_size: int = 32, *, symmetric: bool = True, bits: int = 4) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        return {"group_0": {"targets": ["Linear"], "weights": weights}}

    return make


@pytest.fixture(scope="session")
def calibration(tiny_llama: Path) -> Any:
    """Eight tokenized samples of 64 tokens from the demo text."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    text = (REPOSITORY / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text[:6000])["input_ids"]
    rows = [ids[start : start + 64] for start in range(0, 512, 64)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64 for _ in rows]})


@pytest.fixture(scope="session")
def quantize(random_llama: Path, calibration: Any) -> Callable[..., Path]:
    """Run `oneshot` on the random Llama (or `model`) with a recipe, and return the output directory."""
    from llmcompressor import oneshot

    def run(recipe: Any, output: Path, *, model: Path = random_llama, data: bool = False, **kwargs: Any) -> Path:
        if data:
            kwargs |= {"dataset": calibration, "num_calibration_samples": 8, "max_seq_length": 64}
        oneshot(model=str(model), recipe=recipe, output_dir=str(output), **kwargs)
        return output

    return run


@pytest.fixture(scope="session")
def finished_checkpoint(
    quantize: Callable[..., Path], group_scheme: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The random Llama as W4A16 g32 with a dense D8: for reading only."""
    from srd_modifier import SRDModifier

    recipe = SRDModifier(config_groups=group_scheme(32), ignore=["lm_head"], residual_group_size=32)
    return quantize(recipe, tmp_path_factory.mktemp("checkpoints") / "srd")


@pytest.fixture
def checkpoint(finished_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the finished checkpoint that a test may damage."""
    return Path(shutil.copytree(finished_checkpoint, tmp_path / "checkpoint"))
