import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from srd_modifier import load_corrected
from srd_modifier.errors import CheckpointError
from srd_modifier.transformers.source import checkpoint_directory

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARD = "residual-00001-of-00001.safetensors"


@pytest.fixture
def snapshot(finished_checkpoint, tmp_path) -> Path:
    """The base of a checkpoint as the hub's client caches it: without the files that Transformers does not ask for."""
    directory = tmp_path / "hub" / "models--owner--name" / "snapshots" / REVISION
    shutil.copytree(finished_checkpoint, directory, ignore=shutil.ignore_patterns("srd"))
    refs = directory.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISION)
    return directory


@pytest.fixture
def downloads(finished_checkpoint, snapshot, monkeypatch) -> list[dict[str, Any]]:
    """The hub: copies what is asked for into the snapshot, and writes down how it was asked."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, **kwargs})
        shutil.copytree(finished_checkpoint / "srd", snapshot / "srd", dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_the_sidecar_is_fetched_from_the_repository_and_revision_of_the_base(
    snapshot, downloads, finished_checkpoint, by_hand, assert_weights
):
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    (call,) = downloads
    assert call.pop("repo_id") == "owner/name"
    assert call.pop("revision") == REVISION
    assert Path(call.pop("cache_dir")) == snapshot.parents[2]
    patterns = call.pop("allow_patterns")
    assert patterns in ("srd/*", ["srd/*"])
    assert_weights(model, by_hand(finished_checkpoint).weights())


def test_a_model_is_loaded_by_its_name_on_the_hub(snapshot, downloads, finished_checkpoint, by_hand, assert_weights):
    cache = snapshot.parents[2]
    model = load_corrected("owner/name", alpha=0.5, cache_dir=cache)
    assert [(call["repo_id"], call["revision"]) for call in downloads] == [("owner/name", REVISION)]
    assert_weights(model, by_hand(finished_checkpoint).weights(0.5))
    AutoModelForCausalLM.from_pretrained("owner/name", cache_dir=cache, revision="main")
    assert len(downloads) == 1  # once fetched, it is there


@pytest.mark.parametrize("missing", ["index", "shard"])
def test_a_sidecar_that_is_there_in_part_is_completed(missing, snapshot, downloads, finished_checkpoint):
    shutil.copytree(finished_checkpoint / "srd", snapshot / "srd")
    (snapshot / "srd" / ("residual.safetensors.index.json" if missing == "index" else SHARD)).unlink()
    AutoModelForCausalLM.from_pretrained(snapshot)
    assert len(downloads) == 1


def test_a_complete_sidecar_is_not_fetched_again(snapshot, downloads, finished_checkpoint):
    shutil.copytree(finished_checkpoint / "srd", snapshot / "srd")
    AutoModelForCausalLM.from_pretrained(snapshot)
    assert downloads == []


def test_a_local_directory_is_never_looked_for_on_a_hub(checkpoint, downloads):
    shutil.rmtree(checkpoint / "srd")
    with pytest.raises(CheckpointError, match="is missing"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert downloads == []


def test_a_model_without_a_residual_asks_for_none(snapshot, downloads):
    config = json.loads((snapshot / "config.json").read_text())
    del config["srd_config"]
    (snapshot / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(snapshot)
    assert downloads == []


def test_a_download_that_fails_is_explained(snapshot, monkeypatch):
    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(snapshot)
    message = str(error.value)
    assert message.startswith(f"the residual of owner/name at {REVISION} could not be fetched (LocalEntryNotFound")
    assert "outgoing traffic has been disabled" in message
    assert "hf download owner/name --include 'srd/*'" in message


def test_alpha_zero_is_no_way_around_it(snapshot, monkeypatch):
    # the dial of such a model would have nothing to turn, so the message must not recommend it
    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="could not be fetched") as error:
        load_corrected(snapshot, alpha=0)
    assert "alpha=0" not in str(error.value)


def test_a_download_that_brings_nothing_is_an_error(snapshot, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(CheckpointError, match=r"residual\.safetensors\.index\.json is missing"):
        AutoModelForCausalLM.from_pretrained(snapshot)


def test_directories_that_only_look_like_a_cache(tmp_path):
    for directory in (tmp_path / "snapshots" / "abc", tmp_path / "models--a--b" / "abc", tmp_path):
        directory.mkdir(parents=True, exist_ok=True)
        assert checkpoint_directory(directory / "model.safetensors") == directory
