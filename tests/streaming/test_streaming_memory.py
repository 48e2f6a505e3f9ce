"""Models of real sizes: what quantizing them takes of the memory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.memory_curve import write_recipe
from benchmarks.models import write_sharded
from benchmarks.process import Cost, run
from srd_modifier.checkpoint.sidecar import Sidecar

GB = 1e9


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """What is written is too large to be kept until the tests end."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def quantize(shape: str, folder: Path) -> Cost:
    model = write_sharded(shape, folder)
    output = folder / "output"
    recipe = write_recipe(folder / "recipe.yaml")
    cost = run("benchmarks.memory_curve", ["--worker", str(model), str(recipe), str(output)])
    sidecar = Sidecar.open(output)
    assert len(sidecar.entries) == 7 * sidecar.base.layers
    assert list(folder.glob(".*partial")) == []
    return cost


@pytest.mark.slow
def test_a_model_of_1_7_billion_weights(folder: Path) -> None:
    if shutil.disk_usage(folder).free < 10 * GB:
        pytest.skip("writes 6 GB, and the disk has less than 10 GB free")
    assert quantize("smollm2-1.7b", folder).peak_mb < 2_000  # 3,400 MB are the weights alone


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SRD_LARGE_TESTS"), reason="takes minutes: run with SRD_LARGE_TESTS=1")
def test_a_model_of_7_billion_weights(folder: Path) -> None:
    if shutil.disk_usage(folder).free < 28 * GB:
        pytest.skip("writes 24 GB, and the disk has less than 28 GB free")
    assert quantize("llama-7b", folder).peak_mb < 3_000  # 13,000 MB are the weights alone
