"""`srd axm sign` and `srd axm verify --public-key`, from making the keys to one command that shows everything."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from containers import FILES, write_files

from srd_modifier.axm.keys import ENVIRONMENT
from srd_modifier.axm.signatures import PASSWORD

pytest.importorskip("model_signing", reason="needs model-signing, the extra [sign]")

WORD = "the password of these tests"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENVIRONMENT, PASSWORD):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_files(tmp_path / "model")


@pytest.fixture
def signer(tmp_path: Path) -> Path:
    """A private key, encrypted, with the public one beside it."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = tmp_path / "signer.pem"
    lock = forms.BestAvailableEncryption(WORD.encode())
    private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, lock))
    private.chmod(0o600)
    public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "signer.pub.pem").write_bytes(public)
    return private


@pytest.fixture
def packed(srd: Any, model: Path, tmp_path: Path) -> Path:
    """A container, with the key file `axm.key` beside it."""
    assert srd("axm", "keygen", tmp_path / "axm.key").status == 0
    done = srd("axm", "pack", model, "--output", tmp_path / "packed.axm", "--key-file", tmp_path / "axm.key")
    assert (done.status, done.stderr) == (0, "")
    return tmp_path / "packed.axm"


def test_one_command_shows_integrity_origin_and_signer(
    srd: Any, packed: Path, signer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, WORD)
    signed = srd("axm", "sign", packed, "--private-key", signer)
    assert (signed.status, signed.stdout, signed.stderr) == (0, f"wrote {packed}.sig\n", "")
    monkeypatch.delenv(PASSWORD)
    public, key_file = tmp_path / "signer.pub.pem", tmp_path / "axm.key"
    known = f"EC key P-384, SHA-256 of its public key {hashlib.sha256(public.read_bytes()).hexdigest()}"
    done = srd("axm", "verify", packed, "--key-file", key_file, "--public-key", public)
    assert (done.status, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.replace("public signer", "signer").splitlines())
    assert lines["integrity"] == f"{len(FILES)} files, {packed.stat().st_size:,} bytes, every byte verified"
    assert lines["origin"].startswith("packed by a holder of key ")
    assert lines["signer"] == known
    found = json.loads(srd("axm", "verify", packed, "--public-key", public, "--json").stdout)
    assert (found["verified"], found["key_id"], found["signer"]) == (True, None, known)


def test_a_directory_is_signed_packed_and_verified(
    srd: Any, model: Path, signer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, WORD)
    public, key_file, container = tmp_path / "signer.pub.pem", tmp_path / "axm.key", tmp_path / "signed.axm"
    assert srd("axm", "sign", model, "--private-key", signer).stdout == f"wrote {model / 'model.sig'}\n"
    direct = srd("axm", "verify", model, "--public-key", public)
    assert (direct.status, direct.stdout.splitlines()[0]) == (0, "integrity      every file is as it was signed")
    srd("axm", "keygen", key_file)
    assert srd("axm", "pack", model, "--output", container, "--key-file", key_file).status == 0
    done = srd("axm", "verify", container, "--public-key", public)
    assert done.stdout.splitlines()[-1] == direct.stdout.splitlines()[-1]
    assert srd("axm", "extract", container, "--output", tmp_path / "out").status == 0
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert srd("axm", "verify", tmp_path / "out", "--public-key", public).sentence == (
        f"{tmp_path / 'out' / 'model.sig'} is a valid signature, but of other files than those of "
        f"{tmp_path / 'out'}: 'tokenizer.json' differs"
    )


def test_an_encrypted_key_never_asks(srd: Any, packed: Path, signer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("axm", "sign", packed, "--private-key", signer)
    assert srd(*arguments).sentence == (
        f"the private key {signer} is encrypted; set the environment variable {PASSWORD} to its password"
    )
    monkeypatch.setenv(PASSWORD, "the wrong one")
    refused = srd(*arguments)
    assert refused.sentence == f"the password in {PASSWORD} does not open the private key {signer}"
    assert not packed.with_name("packed.axm.sig").exists()


def test_a_failure_is_a_sentence(srd: Any, packed: Path, model: Path, tmp_path: Path) -> None:
    public = tmp_path / "none.pem"
    assert srd("axm", "verify", packed, "--public-key", public).sentence.startswith(
        f"no signature of {packed} was found"
    )
    packed.with_name("packed.axm.sig").write_text("{}")
    assert srd("axm", "verify", packed, "--public-key", public).sentence == f"the public key {public} is missing"
    assert srd("axm", "verify", model).sentence.startswith(f"{model} is a directory: name the --public-key")
