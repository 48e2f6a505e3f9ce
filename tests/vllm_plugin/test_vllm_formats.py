"""Residuals of every format, and checkpoints from a hub, are served."""

from pathlib import Path

import pytest
from parity import assert_parity, text_prompts
from rtn import write_checkpoint

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.residual import WHOLE_ROW, ResidualFormat

pytestmark = pytest.mark.slow

REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER_REVISION = "f" * 40

FORMATS = [
    ResidualFormat(bits=8, group_size=WHOLE_ROW),
    ResidualFormat(bits=2, group_size=32),
    ResidualFormat(bits=3, group_size=WHOLE_ROW, scale_dtype="float32"),
    ResidualFormat(bits=4, density=0.25),
    ResidualFormat(bits=6, group_size=40),  # leaves a shorter last group
    ResidualFormat(bits=4, rounding="dithered", seed=7),
    ResidualFormat(bits=8, density=0.5, rounding="stochastic", seed=3),
    ResidualFormat(bits=1, group_size=128),
    ResidualFormat(bits=8, rounding="dithered", group_size=32),
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return text_prompts()


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose fused layers have parts of different formats."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    blocks = ("self_attn",) * 4 + ("mlp",) * 3
    modules = [
        f"model.layers.{layer}.{block}.{part}" for layer in range(8) for block, part in zip(blocks, parts, strict=True)
    ]
    formats = {module: FORMATS[number % len(FORMATS)] for number, module in enumerate(modules)}
    directory = write_checkpoint(
        tiny_llama, tmp_path_factory.mktemp("checkpoints") / "mixed", formats=formats, alpha=0.75
    )
    stored = Sidecar.open(directory).entries
    assert {module: entry.format for module, entry in stored.items()} == formats
    return directory


def test_every_format_is_decoded_on_load(run_engine, mixed, prompts):
    engine = run_engine(mixed, prompts, tokens=24, dtype="float32", steps=[{"alpha": 0.25}])
    assert engine.status == 0, engine.log[-8000:]
    for settings, answer in zip(({}, {"alpha": 0.25}), engine.answers, strict=True):
        assert_parity(f"formats: {settings}", mixed, prompts, answer, "float32", settings)


def test_a_hub_id_is_served_with_the_sidecar_of_its_revision(run_engine, tiny_llama, prompts, tmp_path, monkeypatch):
    """The main branch has other residuals than the branch that is asked for."""
    model = tmp_path / "hub" / "models--owner--name"
    for revision, branch, bits in ((REVISION, "asked-for", 8), (OTHER_REVISION, "main", 2)):
        write_checkpoint(tiny_llama, model / "snapshots" / revision, fmt=ResidualFormat(bits=bits))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    engine = run_engine("owner/name", prompts, tokens=24, dtype="float32", revision="asked-for")
    assert engine.status == 0, engine.log[-8000:]
    assert_parity("hub id", model / "snapshots" / REVISION, prompts, engine.answers[0], "float32")
