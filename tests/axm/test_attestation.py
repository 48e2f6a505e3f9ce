"""Attestations: what they say, and what they are compared with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from containers import FILES, OTHER_FILES, OTHER_SECRET, SECRET, container, fingerprint, key_id, record
from small_checkpoint import write_checkpoint

from srd_modifier import __version__
from srd_modifier.axm.attestation import attest, check_attestation, encode_attestation
from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import Key
from srd_modifier.axm.pack import pack
from srd_modifier.checkpoint.config import read_srd_config
from srd_modifier.errors import CheckpointError


def attested(path: Path) -> dict[str, Any]:
    with Container(path) as opened:
        opened.verify()
        return attest(opened)


def checked(path: Path, attestation: Path) -> None:
    with Container(path) as opened:
        opened.verify()
        check_attestation(opened, attestation)


@pytest.fixture
def attestation(packed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "attestation.json"
    path.write_text(encode_attestation(attested(packed)))
    return path


def test_what_it_says(packed: Path) -> None:
    stated = attested(packed)
    assert stated["fingerprint"] == fingerprint(record(name, data) for name, data in FILES.items())
    assert stated["key_id"] == key_id(SECRET)
    assert stated["container"] == {"name": "packed.axm", "size": packed.stat().st_size}
    assert stated["base_digest"] is None
    assert stated["recipe"] is None
    assert stated["packed_with"] == {"srd-modifier": __version__}
    assert {"python", "srd-modifier", "torch"} <= stated["attested_with"].keys()
    assert stated["files"] == [
        {name: known[name] for name in ("path", "size", "sha256")}
        for known in (record(name, data) for name, data in FILES.items())
    ]
    assert encode_attestation(stated).endswith("}\n")
    assert json.loads(encode_attestation(stated)) == stated


def test_a_checkpoint_has_base_digest_and_recipe(tmp_path: Path, key: Key) -> None:
    directory = write_checkpoint(tmp_path / "model", tmp_path / "scratch")
    (directory / "met.json").write_text("{}")
    (directory / "recipe.yaml").write_text("größe: 1\n", encoding="utf-8")
    pack([directory], tmp_path / "x.axm", key)
    stated = attested(tmp_path / "x.axm")
    config = read_srd_config(directory)
    assert config is not None
    assert stated["base_digest"] == config.base_digest
    assert stated["recipe"] == "größe: 1\n"


def test_it_does_not_say_where_or_by_whom(packed: Path) -> None:
    """It is made to be published."""
    text = encode_attestation(attested(packed))
    assert str(packed.parent) not in text
    assert SECRET.decode() not in text
    assert SECRET.hex() not in text


def test_it_matches(packed: Path, attestation: Path, tmp_path: Path) -> None:
    """The container may have another name."""
    checked(packed, attestation)
    checked(packed.rename(tmp_path / "other.axm"), attestation)


# --- of another container --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "difference"),
    [
        (OTHER_FILES, "model.gguf differs"),
        (
            {name: data for name, data in FILES.items() if name != "notes/about.txt"},
            "the container has no notes/about.txt",
        ),
        (FILES | {"z": b""}, "the container has z, the attestation does not"),
    ],
    ids=["another file", "a file less", "a file more"],
)
def test_other_files(files: dict[str, bytes], difference: str, attestation: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.axm"
    path.write_bytes(container(files))
    with pytest.raises(CheckpointError) as error:
        checked(path, attestation)
    assert str(error.value) == f"{attestation} is the attestation of another container than {path}: {difference}"


def test_another_key(attestation: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.axm"
    path.write_bytes(container(FILES, OTHER_SECRET))
    with pytest.raises(CheckpointError, match="the key id differs"):
        checked(path, attestation)


@pytest.mark.parametrize(
    ("field", "name"),
    [("base_digest", "base digest"), ("recipe", "recipe"), ("packed_with", "version of srd-modifier")],
)
def test_another_statement(field: str, name: str, packed: Path, attestation: Path) -> None:
    change(attestation, lambda stated: stated.update({field: "other"}))
    with pytest.raises(CheckpointError, match=f"is the attestation of another container than .*: the {name} differs$"):
        checked(packed, attestation)


# --- damaged ---------------------------------------------------------------------------------------------------------


def change(path: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    stated = json.loads(path.read_text())
    how(stated)
    path.write_text(json.dumps(stated))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda stated: stated.update(format="x"), " is not an attestation: its format is 'x'"),
    "no format": (lambda stated: stated.clear(), " is not an attestation: its format is None"),
    "a later version": (
        lambda stated: stated.update(version=2),
        " is an attestation of version 2, this srd-modifier reads 1",
    ),
    "a field less": (lambda stated: stated.pop("recipe"), " is damaged: recipe is missing or malformed"),
    "fingerprint": (lambda stated: stated.update(fingerprint="x"), " is damaged: fingerprint is missing or malformed"),
    "files are null": (lambda stated: stated.update(files=None), " is damaged: files is malformed"),
    "files are text": (lambda stated: stated.update(files="abc"), " is damaged: files is malformed"),
    "a file is null": (lambda stated: stated["files"].append(None), " is damaged: files is malformed"),
    "a file without size": (lambda stated: stated["files"][0].pop("size"), " is damaged: files is malformed"),
    "a size is true": (lambda stated: stated["files"][0].update(size=True), " is damaged: files is malformed"),
    "a digest is short": (lambda stated: stated["files"][0].update(sha256="0"), " is damaged: files is malformed"),
    "a path is no text": (lambda stated: stated["files"][0].update(path="\ud800"), " is damaged: files is malformed"),
    "a path is a list": (lambda stated: stated["files"][0].update(path=[]), " is damaged: files is malformed"),
    "files were changed": (
        lambda stated: stated["files"][0].update(size=4),
        " is damaged: its files do not have its fingerprint",
    ),
    "fingerprint was changed": (
        lambda stated: stated.update(fingerprint="0" * 64),
        " is damaged: its files do not have its fingerprint",
    ),
}


@pytest.mark.parametrize(("how", "sentence"), FAULTS.values(), ids=FAULTS)
def test_faults(how: Callable[[dict[str, Any]], Any], sentence: str, packed: Path, attestation: Path) -> None:
    change(attestation, how)
    with pytest.raises(CheckpointError) as error:
        checked(packed, attestation)
    assert str(error.value) == f"{attestation}{sentence}"


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_no_json(text: str, packed: Path, attestation: Path) -> None:
    attestation.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=str(attestation)):
        checked(packed, attestation)


def test_missing(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/nothing is missing$"):
        checked(packed, tmp_path / "nothing")


def test_a_container_with_a_damaged_config(tmp_path: Path) -> None:
    path = tmp_path / "x.axm"
    path.write_bytes(container({"config.json": b"{", "model.gguf": b"GGUF"}))
    with pytest.raises(CheckpointError, match=rf"^{path}: config\.json is not JSON$"):
        attested(path)


@pytest.mark.parametrize("config", [b"{}", b'{"srd_config":1}', b'{"srd_config":{}}'])
def test_a_container_of_a_model_without_residual(config: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.axm"
    path.write_bytes(container({"config.json": config, "model.gguf": b"GGUF"}))
    assert attested(path)["base_digest"] is None
