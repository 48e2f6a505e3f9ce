"""A model that is on the hub only: a stand-in for the client has the metadata and nothing else."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError

from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.errors import SRDError
from srd_modifier.planning.plan import plan
from srd_modifier.planning.source import read_source

FULL = Path(__file__).parents[2] / "recipes" / "srd_full.yaml"
HUB_ID = "someone/llama-128"


@pytest.fixture
def hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with the small model, of which only config.json is in the cache; the list has what was asked of it."""
    asked: list[str] = []
    (tmp_path / "snapshot").mkdir()
    shutil.copy(small / "config.json", tmp_path / "snapshot")
    base = BaseCheckpoint(small)
    tensors = {name: SimpleNamespace(dtype=base.info(name).dtype, shape=list(base.info(name).shape)) for name in base}

    class Api:
        def get_safetensors_metadata(self, name: str) -> Any:
            asked.append(f"headers of {name}")
            return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

        def model_info(self, name: str, *, files_metadata: bool) -> Any:
            asked.append(f"sizes of {name}")
            files = [SimpleNamespace(rfilename=file.name, size=file.stat().st_size) for file in small.iterdir()]
            return SimpleNamespace(siblings=files)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("srd_modifier.planning.source.find_model", lambda name: tmp_path / "snapshot")
    return asked


def test_metadata_gives_the_plan_of_the_files(small: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = plan(HUB_ID, FULL, probe=False)
    assert hub == [f"headers of {HUB_ID}", f"sizes of {HUB_ID}"]
    monkeypatch.undo()
    here = plan(str(small), FULL, probe=False)
    assert (there.files, there.chunks, there.skipped) == (here.files, here.chunks, here.skipped)
    assert there.alternatives == tuple(form for form in here.alternatives if "GGUF" not in form.name)


def test_a_model_in_the_cache_is_not_asked_for(small: Path, hub: list[str], tmp_path: Path) -> None:
    shutil.copy(small / "model.safetensors", tmp_path / "snapshot")
    source = read_source(HUB_ID)
    assert source.has_weights
    assert hub == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), OSError("offline mode is enabled")])
def test_no_connection(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: str) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", refuse)
    with pytest.raises(SRDError, match=f"^{HUB_ID} is not in the local cache and the Hugging Face hub cannot be asked"):
        read_source(HUB_ID)


@pytest.mark.usefixtures("hub")
def test_no_safetensors_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: str) -> Any:
        raise NotASafetensorsRepoError("none")

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", refuse)
    with pytest.raises(SRDError, match="has no safetensors files on the Hugging Face hub"):
        read_source(HUB_ID)


def test_offline_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SRDError, match="no such model could be fetched from the Hugging Face hub"):
        read_source("someone/nothing-of-that-name")
