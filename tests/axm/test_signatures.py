"""Public signatures, against OpenSSF model-signing itself: its own verifier and signer are the reference."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from containers import FILES, OTHER_SECRET, container, write_files

from srd_modifier.axm.container import Container
from srd_modifier.axm.extract import extract
from srd_modifier.axm.keys import ENVIRONMENT
from srd_modifier.axm.manifest import in_order
from srd_modifier.axm.signatures import (
    PASSWORD,
    sign_container,
    sign_directory,
    verify_container_signature,
    verify_directory_signature,
)
from srd_modifier.errors import CheckpointError, MissingExtraError, SRDError

CURVES = {"P-256": "SECP256R1", "P-384": "SECP384R1", "P-521": "SECP521R1"}
WORD = "the password of these tests"


@dataclass(frozen=True)
class Pair:
    """A key pair on disk."""

    private: Path
    public: Path


@pytest.fixture(autouse=True)
def no_password_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)


@pytest.fixture
def official() -> Any:
    """OpenSSF model-signing."""
    pytest.importorskip("model_signing", reason="needs model-signing, the extra [sign]")
    import model_signing.signing
    import model_signing.verifying

    return model_signing


@pytest.fixture
def make_pair(official: Any, tmp_path: Path) -> Callable[..., Pair]:
    """Makes a key pair: on a curve by its name in `cryptography`, or of any private key; encrypted with a password."""
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(name: str = "signer", key: Any = "SECP256R1", *, password: str | None = None) -> Pair:
        if isinstance(key, str):
            key = ec.generate_private_key(getattr(ec, key)())
        lock = forms.BestAvailableEncryption(password.encode()) if password else forms.NoEncryption()
        pair = Pair(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem")
        pair.private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, lock))
        pair.private.chmod(0o600)
        public = key.public_key()
        pair.public.write_bytes(public.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo))
        return pair

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def verified(path: Path, public: Path, signature: Path | None = None) -> str:
    """What is said of the signer of a container, all of which is verified."""
    with Container(path) as opened:
        opened.verify()
        return verify_container_signature(opened, public, signature)


def write_container(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(container({name: files[name] for name in in_order(files)}))
    return path


def unpack(path: Path, output: Path) -> Path:
    with Container(path) as opened:
        extract(opened, output)
    return output


def check_officially(official: Any, directory: Path, signature: Path, public: Path) -> None:
    """The library's own verification, with no option that is not needed."""
    official.verifying.Config().use_elliptic_key_verifier(public_key=public).verify(directory, signature)


def sign_officially(official: Any, directory: Path, signature: Path, private: Path, **hashing: Any) -> Path:
    config = official.signing.Config().use_elliptic_key_signer(private_key=private)
    if hashing:
        config.set_hashing_config(official.hashing.Config().set_ignored_paths(**hashing))
    config.sign(directory, signature)
    return signature


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The library's own command."""
    line = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def edit(signature: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the JSON of a signature."""
    bundle = json.loads(signature.read_bytes())
    change(bundle)
    signature.write_text(json.dumps(bundle))
    return signature


# what is signed can be verified


@pytest.mark.parametrize("curve", CURVES)
def test_a_container_is_signed_with_any_of_the_curves(
    curve: str, make_pair: Callable[..., Pair], packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(key=CURVES[curve])
    written = sign_container(packed, pair.private)
    assert written == packed.with_name("packed.axm.sig")
    digest = hashlib.sha256(pair.public.read_bytes()).hexdigest()
    assert verified(packed, pair.public) == f"EC key {curve}, SHA-256 of its public key {digest}"
    assert capsys.readouterr() == ("", "")
    assert not list(packed.parent.glob("*.partial"))


def test_one_signature_is_good_for_container_directory_and_the_library(
    official: Any, pair: Pair, packed: Path, tmp_path: Path
) -> None:
    signature = sign_container(packed, pair.private)
    directory = unpack(packed, tmp_path / "out")
    signer = verified(packed, pair.public)
    assert verify_directory_signature(directory, pair.public, signature) == signer
    check_officially(official, directory, signature, pair.public)
    (directory / "model.gguf").write_bytes(b"GGUF of another")
    with pytest.raises(CheckpointError, match=r"'model\.gguf' differs$"):
        verify_directory_signature(directory, pair.public, signature)
    with pytest.raises(ValueError, match=r"Hash mismatch for .*model\.gguf"):
        check_officially(official, directory, signature, pair.public)


def test_a_signed_directory_can_be_packed_and_unpacked(official: Any, pair: Pair, model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    signature = sign_directory(model, pair.private, progress=lambda *done: seen.append(done))
    assert signature == model / "model.sig"
    total = sum(len(data) for data in FILES.values())
    assert seen[-1] == (total, total)
    check_officially(official, model, signature, pair.public)
    packed = write_container(tmp_path / "signed.axm", FILES | {"model.sig": signature.read_bytes()})
    signer = verified(packed, pair.public)
    directory = unpack(packed, tmp_path / "out")
    assert signer == verify_directory_signature(directory, pair.public) == verified(packed, pair.public, signature)
    check_officially(official, directory, directory / "model.sig", pair.public)


def test_what_the_library_signs_is_verified_here(official: Any, pair: Pair, model: Path, tmp_path: Path) -> None:
    signature = sign_officially(official, model, model / "model.sig", pair.private)
    signer = verify_directory_signature(model, pair.public)
    packed = write_container(tmp_path / "signed.axm", FILES | {"model.sig": signature.read_bytes()})
    assert verified(packed, pair.public) == signer
    beside = sign_officially(official, model, tmp_path / "any.sig", pair.private, paths=["model.sig"])
    assert verified(packed, pair.public, beside) == signer


def test_the_librarys_command_agrees(pair: Pair, model: Path, packed: Path, tmp_path: Path) -> None:
    signature = sign_container(packed, pair.private)
    directory = unpack(packed, tmp_path / "out")
    verifying = ("verify", "key", directory, "--signature", signature, "--public_key", pair.public)
    assert command(*verifying).returncode == 0
    (directory / "extra.txt").write_text("more")
    refused = command(*verifying)
    assert refused.returncode == 1
    assert "Extra files found" in refused.stdout + refused.stderr
    signed = command("sign", "key", model, "--signature", model / "model.sig", "--private_key", pair.private)
    assert signed.returncode == 0, signed.stderr
    files = FILES | {"model.sig": (model / "model.sig").read_bytes()}
    assert verified(write_container(tmp_path / "signed.axm", files), pair.public).startswith("EC key P-256, ")


def test_hidden_files_are_not_signed_and_downloading_adds_none(official: Any, pair: Pair, model: Path) -> None:
    signature = sign_directory(model, pair.private)
    write_files(model, {".cache/huggingface/x.metadata": b"1", ".gitattributes": b"*.gguf filter=lfs\n"})
    check_officially(official, model, signature, pair.public)
    (model / ".env").write_text("a name that must not be published")
    verify_directory_signature(model, pair.public)
    payload = json.loads(sign_directory(model, pair.private, overwrite=True).read_bytes())["dsseEnvelope"]["payload"]
    assert b".env" not in base64.b64decode(payload)


def test_the_signature_beside_a_container_comes_before_the_one_in_it(
    make_pair: Callable[..., Pair], official: Any, model: Path, tmp_path: Path
) -> None:
    author, publisher = make_pair("author"), make_pair("publisher")
    inner = sign_directory(model, author.private)
    packed = write_container(tmp_path / "signed.axm", FILES | {"model.sig": inner.read_bytes()})
    verified(packed, author.public)
    outer = sign_container(packed, publisher.private)
    verified(packed, publisher.public)
    with pytest.raises(CheckpointError, match=r"signed\.axm\.sig was signed with another key"):
        verified(packed, author.public)
    verified(packed, author.public, inner)
    # the inner one stays in the directory, where neither minds it
    directory = unpack(packed, tmp_path / "out")
    verify_directory_signature(directory, publisher.public, outer)
    check_officially(official, directory, outer, publisher.public)


def test_a_signature_file_of_another_name_in_the_directory_is_no_file_of_it(
    official: Any, pair: Pair, model: Path
) -> None:
    signature = sign_officially(official, model, model / "first.sig", pair.private)
    verify_directory_signature(model, pair.public, signature)


def test_a_signature_of_an_older_library_is_valid_and_nothing_is_printed(
    pair: Pair, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = edit(
        sign_container(packed, pair.private), lambda bundle: bundle["verificationMaterial"]["publicKey"].pop("hint")
    )
    verified(packed, pair.public, signature)
    assert capsys.readouterr() == ("", "")


# files other than the signed ones


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (FILES | {"tokenizer.json": b"{}"}, r"'tokenizer\.json' differs$"),
        ({name: data for name, data in FILES.items() if name != "notes/about.txt"}, r"'notes/about\.txt' is missing$"),
        (FILES | {"zusatz\u00e9.txt": b"x"}, r"'zusatz\u00e9\.txt' is not signed$"),
        (
            {"met.json": b"{}\n", "model.gguf": b"", "renamed.txt": FILES["notes/about.txt"]},
            r"'model\.gguf' differs, 'notes/about\.txt' is missing, 'tokenizer\.json' is missing, "
            r"'renamed\.txt' is not signed$",
        ),
        (
            FILES | {f"x{number}": b"" for number in range(9)},
            r"'x0' is not signed, 'x1' is not signed, 'x2' is not signed, 'x3' is not signed, 'x4' is not signed, "
            r"and 4 more$",
        ),
    ],
    ids=["changed", "missing", "extra", "all", "many"],
)
def test_other_files_are_named(
    files: dict[str, bytes], message: str, pair: Pair, packed: Path, model: Path, tmp_path: Path
) -> None:
    signature = sign_container(packed, pair.private)
    other = write_container(tmp_path / "other.axm", files)
    start = f"^{re.escape(str(signature))} is a valid signature, but of other files than those of "
    with pytest.raises(CheckpointError, match=f"{start}{re.escape(str(other))}: .*{message}"):
        verified(other, pair.public, signature)
    directory = unpack(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{start}{re.escape(str(directory))}: .*{message}"):
        verify_directory_signature(directory, pair.public, signature)


def test_a_hidden_file_that_the_library_signed_is_named(
    official: Any, pair: Pair, model: Path, packed: Path, tmp_path: Path
) -> None:
    write_files(model, {"notes/.draft": b"x"})
    signature = sign_officially(official, model, tmp_path / "model.sig", pair.private)
    message = r"'notes/\.draft' is a hidden file, which is neither packed nor looked at$"
    for check in (verified, verify_directory_signature):
        with pytest.raises(CheckpointError, match=message):
            check(packed if check is verified else model, pair.public, signature)


def test_a_signature_cannot_leave_files_out(
    official: Any, pair: Pair, model: Path, packed: Path, tmp_path: Path
) -> None:
    signature = sign_officially(official, model, tmp_path / "model.sig", pair.private, paths=["notes"])
    check_officially(official, model, signature, pair.public)
    with pytest.raises(CheckpointError, match=r"'notes/about\.txt' is not signed$"):
        verified(packed, pair.public, signature)


@pytest.mark.parametrize(
    ("choose", "what"),
    [
        (lambda config: config.use_shard_serialization(), "'shards' by 'sha256'"),
        (lambda config: config.use_file_serialization(hashing_algorithm="blake3"), "'files' by 'blake3'"),
    ],
    ids=["shards", "blake3"],
)
def test_another_way_of_hashing_is_a_sentence(
    choose: Callable[[Any], Any], what: str, official: Any, pair: Pair, model: Path, packed: Path, tmp_path: Path
) -> None:
    config = official.signing.Config().use_elliptic_key_signer(private_key=pair.private)
    config.set_hashing_config(choose(official.hashing.Config())).sign(model, tmp_path / "model.sig")
    with pytest.raises(CheckpointError, match=f"is a valid signature, but of {what}; sign whole files by SHA-256"):
        verified(packed, pair.public, tmp_path / "model.sig")


def test_a_file_that_changes_while_it_is_read(pair: Pair, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the sizes are asked for first
    path = model / "tokenizer.json"

    def grow(work: Callable[[int, Any], None], sizes: list[int], progress: Any) -> None:
        path.write_bytes(path.read_bytes() * 2)
        for number in range(len(sizes)):
            work(number, lambda count: None)

    monkeypatch.setattr("srd_modifier.axm.signatures.in_parallel", grow)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} has grown while it was read$"):
        sign_directory(model, pair.private)
    assert not (model / "model.sig").exists()


# signatures that are not one by the key


def test_another_key_is_named(make_pair: Callable[..., Pair], pair: Pair, packed: Path) -> None:
    signature, other = sign_container(packed, pair.private), make_pair("other")
    names = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (pair.public, other.public)]
    with pytest.raises(CheckpointError) as error:
        verified(packed, other.public)
    assert str(error.value) == (
        f"{signature} was signed with another key: it names the public key with the SHA-256 {names[0]}, "
        f"that of {other.public} is {names[1]}"
    )


def test_a_signature_that_claims_to_be_by_the_key(make_pair: Callable[..., Pair], pair: Pair, packed: Path) -> None:
    digest = hashlib.sha256(pair.public.read_bytes()).hexdigest()
    forged = edit(
        sign_container(packed, make_pair("forger").private),
        lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=digest),
    )
    with pytest.raises(
        CheckpointError, match=r"is not a valid signature of a model by .*: it was changed, or made with"
    ):
        verified(packed, pair.public, forged)


def test_the_signed_files_cannot_be_exchanged(pair: Pair, packed: Path, tmp_path: Path) -> None:
    other = write_container(tmp_path / "other.axm", FILES | {"tokenizer.json": b"{}"})
    theirs = json.loads(sign_container(other, pair.private).read_bytes())["dsseEnvelope"]["payload"]
    mixed = edit(sign_container(packed, pair.private), lambda bundle: bundle["dsseEnvelope"].update(payload=theirs))
    with pytest.raises(CheckpointError, match="is not a valid signature of a model by"):
        verified(other, pair.public, mixed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b"[" * 100_000,
        b'{"verificationMaterial": {}}',
        b'{"verificationMaterial": [], "dsseEnvelope": {}}',
        b'{"mediaType": "x", "verificationMaterial": {}, "messageSignature": {}}',
    ],
    ids=["empty", "text", "bytes", "list", "object", "deep", "half", "kinds", "of a message"],
)
def test_a_damaged_signature_is_a_sentence(content: bytes, pair: Pair, packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.sig"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.sig is damaged: it is not a signature that model-signing writes$"):
        verified(packed, pair.public, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle.pop("mediaType"),
        lambda bundle: bundle["verificationMaterial"].clear(),
        lambda bundle: bundle["verificationMaterial"].update(publicKey=7),
        lambda bundle: bundle["dsseEnvelope"].clear(),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[{"sig": "AAAA", "keyid": ""}]),
        lambda bundle: bundle["dsseEnvelope"].update(payload="?"),
        lambda bundle: bundle["dsseEnvelope"].update(payload=""),
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
    ],
    ids=[
        *("no media type", "no key", "key", "no envelope", "no signatures", "no DER", "no base64", "no payload", "type")
    ],
)
def test_a_changed_bundle_is_a_sentence(change: Callable[[dict[str, Any]], Any], pair: Pair, packed: Path) -> None:
    signature = edit(sign_container(packed, pair.private), change)
    with pytest.raises(CheckpointError, match=r"is not a valid signature of a model by .*: it was changed, or made"):
        verified(packed, pair.public, signature)


@pytest.mark.parametrize("predicate", [{}, {"predicate": None}, {"predicateType": "https://slsa.dev/provenance/v1"}])
def test_a_statement_of_another_kind_by_the_same_key(predicate: dict[str, Any], pair: Pair, packed: Path) -> None:
    """Signed in full validity, but not of a model: such a key may have other uses."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: Any = load_pem_private_key(pair.private.read_bytes(), None)
    kind = b"application/vnd.in-toto+json"
    statement = {"_type": "https://in-toto.io/Statement/v1", "subject": [], **predicate}
    payload = json.dumps(statement).encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    made = base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()

    def change(bundle: dict[str, Any]) -> None:
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        bundle["dsseEnvelope"]["signatures"] = [{"sig": made, "keyid": ""}]

    signature = edit(sign_container(packed, pair.private), change)
    with pytest.raises(CheckpointError, match="is not a valid signature of a model by"):
        verified(packed, pair.public, signature)


@pytest.mark.parametrize("material", ["certificate", "x509CertificateChain"])
def test_a_signature_with_a_certificate_is_sent_to_the_library(material: str, pair: Pair, packed: Path) -> None:
    def change(bundle: dict[str, Any]) -> None:
        bundle["verificationMaterial"] = {material: {"rawBytes": "AAAA"}, "tlogEntries": []}

    signature = edit(sign_container(packed, pair.private), change)
    with pytest.raises(
        CheckpointError, match="was signed with a certificate, as Sigstore does, not with a key; verify"
    ):
        verified(packed, pair.public, signature)


def test_no_character_of_a_signature_can_be_changed_to_another_meaning(pair: Pair, packed: Path) -> None:
    signature = sign_container(packed, pair.private)
    whole = signature.read_bytes()
    envelope = json.loads(whole)["dsseEnvelope"]
    refused = 0
    with Container(packed) as opened:
        opened.verify()
        for place in range(0, len(whole), 7):
            changed = bytearray(whole)
            changed[place] ^= 1
            signature.write_bytes(changed)
            try:
                verify_container_signature(opened, pair.public, signature)
            except CheckpointError:
                refused += 1
            else:
                # names that nothing depends on, or bits that base64 has to spare
                assert decoded(json.loads(changed)["dsseEnvelope"]) == decoded(envelope)
    assert refused > len(whole) / 7 * 0.9


def decoded(envelope: dict[str, Any]) -> tuple[bytes, bytes]:
    """What counts of an envelope: payload and signature."""
    return base64.b64decode(envelope["payload"]), base64.b64decode(envelope["signatures"][0]["sig"])


# no signature, or none that can be read


def test_no_signature_is_a_sentence(pair: Pair, packed: Path, model: Path) -> None:
    message = r"no signature of .*packed\.axm was found, neither .*packed\.axm\.sig nor model\.sig in it; name it with"
    with pytest.raises(CheckpointError, match=message):
        verified(packed, pair.public)
    with pytest.raises(CheckpointError, match=r"no signature of .*model was found, there is no .*model\.sig; name it"):
        verify_directory_signature(model, pair.public)
    with pytest.raises(SRDError, match=r"^the signature .*none\.sig is missing$"):
        verified(packed, pair.public, packed.with_name("none.sig"))


def test_a_signature_that_is_no_small_file(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srd_modifier.axm.signatures._MAX_SIGNATURE_BYTES", 1000)
    packed = write_container(tmp_path / "signed.axm", FILES | {"model.sig": bytes(1001)})
    with pytest.raises(CheckpointError, match=r"signed\.axm: model\.sig has 1001 bytes, this is no signature$"):
        verified(packed, pair.public)
    (tmp_path / "large.sig").write_bytes(bytes(1001))
    with pytest.raises(SRDError, match=r"large\.sig has more than 1000 bytes, this is no signature$"):
        verified(packed, pair.public, tmp_path / "large.sig")
    with pytest.raises(SRDError, match=r"^cannot read the signature .*: Is a directory$"):
        verified(packed, pair.public, tmp_path)


def test_an_unverified_container_is_not_looked_at(pair: Pair, packed: Path) -> None:
    sign_container(packed, pair.private)
    with Container(packed) as opened, pytest.raises(ValueError, match="is not verified"):
        verify_container_signature(opened, pair.public, None)


# keys


def test_public_keys_that_are_none(make_pair: Callable[..., Pair], pair: Pair, packed: Path, tmp_path: Path) -> None:
    sign_container(packed, pair.private)
    (tmp_path / "text").write_text("no key")
    for path, message in {
        pair.private: r"signer\.pem is a private key; `openssl pkey -in .* -pubout` prints the public one$",
        tmp_path / "text": "text is not a public key in PEM, which begins with BEGIN PUBLIC KEY$",
        tmp_path / "none": "^the public key .*none is missing$",
        make_pair("koblitz", "SECP256K1").public: r"is a key on the curve secp256k1; model-signing takes EC keys on",
        make_pair("rsa", rsa_key()).public: r"is a key of another kind than EC; model-signing takes EC keys on P-256",
    }.items():
        with pytest.raises(SRDError, match=message):
            verified(packed, path)


def test_private_keys_that_are_none(make_pair: Callable[..., Pair], pair: Pair, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    (tmp_path / "large").write_bytes(bytes(1 << 17))
    for path, message in {
        pair.public: r"signer\.pub\.pem is a public key, signing takes the private one$",
        tmp_path / "text": "text is not a private key in PEM, which begins with BEGIN PRIVATE KEY$",
        tmp_path / "large": "large has more than 65536 bytes, this is no private key$",
        tmp_path / "none": "^the private key .*none is missing$",
        make_pair("koblitz", "SECP256K1").private: r"is a key on the curve secp256k1; model-signing takes EC keys on",
        make_pair("rsa", rsa_key()).private: r"is a key of another kind than EC; model-signing takes EC keys on P-256",
    }.items():
        with pytest.raises(SRDError, match=message):
            sign_container(packed, path)
    assert not packed.with_name("packed.axm.sig").exists()


def rsa_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def test_an_encrypted_key_takes_its_password_from_the_environment(
    make_pair: Callable[..., Pair], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("locked", password=WORD)
    with pytest.raises(SRDError, match=r"locked\.pem is encrypted; set the environment variable SRD_SIGN_PASSWORD to"):
        sign_container(packed, pair.private)
    monkeypatch.setenv(PASSWORD, "another word")
    with pytest.raises(SRDError, match=r"^the password in SRD_SIGN_PASSWORD does not open the private key .*") as error:
        sign_container(packed, pair.private)
    assert "another word" not in str(error.value)
    assert error.value.__cause__ is None
    monkeypatch.setenv(PASSWORD, WORD)
    sign_container(packed, pair.private)
    verified(packed, pair.public)
    # a key that needs none is not refused for it
    sign_container(packed, make_pair("open").private, packed.with_name("open.sig"))


def test_a_private_key_that_others_can_read_is_warned_of(pair: Pair, packed: Path) -> None:
    pair.private.chmod(0o644)
    with pytest.warns(UserWarning, match=r"signer\.pem can be read by others; run: chmod 600"):
        sign_container(packed, pair.private)


# the output


def test_an_existing_file_is_kept(pair: Pair, packed: Path, tmp_path: Path) -> None:
    output = sign_container(packed, pair.private)
    first = output.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"packed\.axm\.sig already exists; choose another name or pass --overwrit"
    ):
        sign_container(packed, pair.private)
    assert output.read_bytes() == first
    sign_container(packed, pair.private, overwrite=True)
    assert output.read_bytes() != first  # ECDSA draws a number each time
    verified(packed, pair.public)
    with pytest.raises(CheckpointError, match=r"packed\.axm is not a signature and is not overwritten; remove it"):
        sign_container(packed, pair.private, packed, overwrite=True)
    with pytest.raises(CheckpointError, match="is a directory, expected the name of a file to make"):
        sign_container(packed, pair.private, tmp_path)
    with pytest.raises(CheckpointError, match=r"^cannot write .*: No such file or directory"):
        sign_container(packed, pair.private, tmp_path / "nowhere" / "x.sig")


def test_a_signature_does_not_become_a_file_of_its_directory(pair: Pair, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mine\.sig would be a file of what it signs; write to .*model\.sig, or"):
        sign_directory(model, pair.private, model / "notes" / "mine.sig")
    outside = sign_directory(model, pair.private, model.with_name("mine.sig"))
    verify_directory_signature(model, pair.public, outside)


# what is not signed


def test_a_damaged_container_is_not_signed(pair: Pair, packed: Path) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content.replace(b"What this is", b"What that is"))
    with pytest.raises(CheckpointError, match=r"notes/about\.txt was changed after it was packed"):
        sign_container(packed, pair.private)
    assert not packed.with_name("packed.axm.sig").exists()


def test_a_container_of_another_key_than_the_one_in_the_environment_is_not_signed(
    pair: Pair, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, OTHER_SECRET.hex())
    with pytest.raises(CheckpointError, match="was packed with another key"):
        sign_container(packed, pair.private)


def test_links_are_not_signed(pair: Pair, model: Path) -> None:
    (model / "link").symlink_to(model / "met.json")
    with pytest.raises(CheckpointError, match=r"link is a symbolic link to .*; copy the file"):
        sign_directory(model, pair.private)


def test_the_extra_is_named_where_the_library_is_missing(
    packed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srd_modifier._extras.find_spec", lambda name: None)
    (model / "model.sig").write_text("{}")
    packed.with_name("packed.axm.sig").write_text("{}")
    message = r"model_signing is not installed; it comes with: pip install 'srd-modifier\[sign\]'"
    for call in (
        lambda: sign_container(packed, tmp_path / "key", tmp_path / "new.sig"),
        lambda: sign_directory(model, tmp_path / "key", tmp_path / "new.sig"),
        lambda: verified(packed, tmp_path / "key"),
        lambda: verify_directory_signature(model, tmp_path / "key"),
    ):
        with pytest.raises(MissingExtraError, match=message):
            call()
