"""`srd inspect`, `srd eval` and `srd compare` on containers: what they say of the directory that was packed."""

import json
from pathlib import Path

import pytest
from containers import FILES, container
from packing import KEY_HEX, flip_byte, pack_copy

from srd_modifier.axm.keys import ENVIRONMENT


@pytest.fixture
def packed(finished_checkpoint: Path, tmp_path: Path) -> Path:
    return pack_copy(finished_checkpoint, tmp_path / "srd.axm")


@pytest.fixture
def dense(tiny_llama: Path, tmp_path: Path) -> Path:
    return pack_copy(tiny_llama, tmp_path / "tiny.axm")


@pytest.mark.parametrize("options", [[], ["--verify"]], ids=["quick", "verify"])
def test_inspect_says_what_it_says_of_the_directory(srd, packed, finished_checkpoint, options):
    found, expected = (srd("inspect", path, "--json", *options) for path in (packed, finished_checkpoint))
    assert (found.status, found.stderr) == (0, "")
    assert json.loads(found.stdout) == json.loads(expected.stdout) | {"directory": str(packed)}
    assert "verified: base and residual match" in srd("inspect", packed, "--verify").stdout


def test_inspect_of_a_dense_model_says_what_it_says_of_the_directory(srd, dense, tiny_llama):
    found, expected = (srd("inspect", path, "--json") for path in (dense, tiny_llama))
    assert json.loads(found.stdout) == json.loads(expected.stdout) | {"directory": str(dense)}


def test_inspect_takes_the_key_in_the_environment(srd, packed, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, KEY_HEX)
    assert srd("inspect", packed).status == 0
    monkeypatch.setenv(ENVIRONMENT, "00" * 32)
    assert "was packed with another key" in srd("inspect", packed).sentence


@pytest.mark.parametrize("options", [[], ["--verify"], ["--json"]], ids=["quick", "verify", "json"])
def test_inspect_shows_nothing_of_a_changed_container(srd, packed, finished_checkpoint, options):
    flip_byte(packed, (finished_checkpoint / "config.json").read_bytes())
    assert "config.json was changed after it was packed" in srd("inspect", packed, *options).sentence


def test_inspect_of_a_container_without_a_checkpoint_is_a_sentence(srd, tmp_path):
    (tmp_path / "x.axm").write_bytes(container(FILES))
    sentence = srd("inspect", tmp_path / "x.axm").sentence
    assert sentence == f"{tmp_path / 'x.axm'} holds no checkpoint directory; `srd axm inspect` shows what it holds"


def test_eval_scores_as_the_directory(srd, packed, finished_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("There was a small house at the edge of the wood. " * 20)
    options = ("--text", text, "--ctx", 64, "--stride", 32, "--alpha", 0.5)
    for name, path in (("found", packed), ("expected", finished_checkpoint)):
        done = srd("eval", path, *options, "--json", tmp_path / f"{name}.json")
        assert done.status == 0, done.stderr
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("found", "expected"))
    assert found["model"] == str(packed)
    changing = {"model": None, "seconds": None}
    assert found | changing == expected | changing


def test_eval_of_a_changed_container_is_a_sentence(srd, dense, tiny_llama, tmp_path):
    flip_byte(dense, (tiny_llama / "model.safetensors").read_bytes())
    (tmp_path / "text.txt").write_text("A text. " * 50)
    done = srd("eval", dense, "--text", tmp_path / "text.txt", "--json", tmp_path / "x.json")
    assert "model.safetensors was changed after it was packed" in done.sentence
    assert not (tmp_path / "x.json").exists()


def test_compare_scores_as_the_directories_and_shares_their_cache(
    srd, packed, dense, finished_checkpoint, tiny_llama, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("There was a small house at the edge of the wood. " * 20)
    options = ("--text", text, "--ctx", 64, "--stride", 32, "--depth-tokens", 0, "--cache-dir", tmp_path / "cache")
    kept, found = [], []
    for name, models in (("expected", (tiny_llama, finished_checkpoint)), ("found", (dense, packed))):
        output = tmp_path / name
        done = srd("compare", f"a={models[0]}", f"b={models[1]}@alpha=0.5", *options, "--output", output)
        assert done.status == 0, done.stderr
        values = json.loads((output / "results.json").read_text())["models"]
        for model, path in zip(values, models, strict=True):
            assert (model.pop("model"), model.pop("seconds") > 0) == (str(path), True)
        found.append(values)
        kept.append({path.name: path.stat().st_ino for path in (tmp_path / "cache").rglob("*") if path.is_file()})
        assert (output / "table.md").is_file()
    assert found[0] == found[1]
    assert kept[0] == kept[1] != {}
