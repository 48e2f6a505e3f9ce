"""Where a key comes from, what is derived from it, and that it is never shown."""

import copy
import hashlib
import hmac
import os
import pickle
import stat
import traceback
from pathlib import Path

import pytest
from containers import SECRET, derived, key_id, tag, write_secret

from srd_modifier.axm.keys import ENVIRONMENT, Key, find_key, require_key, write_key
from srd_modifier.errors import SRDError

GOLDEN_ZEROS, GOLDEN_RANGE = "e0f0a131afadcc83535cda86749f5704", "f08678e510b2aa1d657a8047393a2660"


def shows(text: str, secret: bytes = SECRET) -> bool:
    """Whether a text has the secret in it in any of the usual spellings."""
    return any(spelling in text for spelling in (secret.decode("latin-1"), secret.hex(), secret.hex().upper()))


def hkdf(salt: bytes, secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, of which a key takes the first block."""
    extracted = hmac.digest(salt, secret, "sha256")
    block, output = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        output += block
    return output[:length]


# --- derivation ------------------------------------------------------------------------------------------------------


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Its test case 1; what the tests compare with is itself right."""
    expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert hkdf(salt, b"\x0b" * 22, info, 42).hex() == expected


@pytest.mark.parametrize("purpose", ["header", "file"])
def test_a_purpose_has_a_key_of_its_own_by_hkdf(purpose: str) -> None:
    sub_key = hkdf(b"srd-axm", SECRET, b"srd-axm/1 " + purpose.encode(), 32)
    expected = hmac.new(sub_key, b"message", hashlib.sha256).hexdigest()
    assert Key(SECRET).authenticate(purpose, b"message") == expected
    assert tag(SECRET, purpose, b"message") == expected


def test_derivation_agrees_with_cryptography() -> None:
    hashes = pytest.importorskip("cryptography.hazmat.primitives.hashes")
    library = pytest.importorskip("cryptography.hazmat.primitives.kdf.hkdf")
    for purpose in ("header", "file", "key id"):
        made = library.HKDF(hashes.SHA256(), 32, b"srd-axm", b"srd-axm/1 " + purpose.encode()).derive(SECRET)
        assert made == derived(SECRET, purpose)
    assert Key(SECRET).key_id == made.hex()[:32]


def test_key_ids_do_not_change() -> None:
    """They stand in containers that people have."""
    assert Key(bytes(32)).key_id == GOLDEN_ZEROS
    assert Key(bytes(range(64))).key_id == GOLDEN_RANGE
    assert Key(SECRET).key_id == key_id(SECRET)


def test_another_purpose_message_or_key_has_another_tag() -> None:
    key = Key(SECRET)
    right = key.authenticate("file", b"message")
    assert key.is_authentic("file", b"message", right)
    assert not key.is_authentic("header", b"message", right)
    assert not key.is_authentic("file", b"massage", right)
    assert not Key(SECRET + b"\0").is_authentic("file", b"message", right)
    assert not key.is_authentic("file", b"message", right[:-1])
    assert not key.is_authentic("file", b"message", "")
    assert not key.is_authentic("file", b"message", "ü" * 64)


# --- secrecy ---------------------------------------------------------------------------------------------------------


def test_the_secret_is_not_shown() -> None:
    key = Key(SECRET)
    assert repr(key) == f"Key(key_id={key.key_id!r})"
    for text in (repr(key), str(key), f"{key}", repr(vars(key)), repr([key])):
        assert not shows(text)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_neither_copied_nor_pickled(duplicate) -> None:
    with pytest.raises(TypeError, match="a key is neither copied nor pickled"):
        duplicate(Key(SECRET))


@pytest.mark.parametrize("value", [SECRET[:20].hex(), SECRET.decode(), SECRET.hex() + "x", SECRET.hex()[:-1] + "ü"])
def test_an_error_does_not_show_the_secret(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    with pytest.raises(SRDError) as error:
        find_key(None)
    text = "".join(traceback.format_exception(error.value))
    assert not shows(text, SECRET[:20])
    assert value not in text


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_a_new_key_file(tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    before = os.umask(0)  # the worst one
    try:
        key = write_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert find_key(path).key_id == key.key_id
    assert write_key(tmp_path / "second.key").key_id != key.key_id


def test_a_key_is_never_overwritten(key_file: Path) -> None:
    with pytest.raises(SRDError, match=rf"^{key_file} already exists; a key is never overwritten$"):
        write_key(key_file)
    assert key_file.read_bytes() == SECRET


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SRDError, match="already exists"):
        write_key(tmp_path / "link.key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_in_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "new.key"
    with pytest.raises(SRDError, match=rf"^cannot write {path}: No such file or directory$"):
        write_key(path)


def test_key_of_a_file(key_file: Path) -> None:
    """Its bytes as they are, a line break at the end included."""
    assert find_key(key_file).key_id == key_id(SECRET)
    write_secret(key_file, SECRET + b"\n")
    assert find_key(key_file).key_id == key_id(SECRET + b"\n")


def test_the_file_counts_before_the_environment(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, bytes(32).hex())
    assert find_key(key_file).key_id == key_id(SECRET)
    assert find_key(None).key_id == key_id(bytes(32))


def test_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_key(None) is None
    for value in (SECRET.hex(), SECRET.hex().upper(), f" {SECRET.hex()}\n"):
        monkeypatch.setenv(ENVIRONMENT, value)
        assert find_key(None).key_id == key_id(SECRET)
        assert require_key(None).key_id == key_id(SECRET)


def test_no_key() -> None:
    with pytest.raises(SRDError, match=r"^no key was given: name a file with --key-file or set SRD_AXM_KEY"):
        require_key(None)


@pytest.mark.parametrize("length", [1, 16, 31])
def test_short_keys(length: int) -> None:
    with pytest.raises(SRDError, match=f"^the key has {length} bytes, a key needs at least 32"):
        Key(bytes(length))


def test_empty_key() -> None:
    with pytest.raises(SRDError, match=r"^the key is empty"):
        Key(b"")


def test_a_key_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SRDError, match=rf"^cannot read the key file {tmp_path}: Is a directory$"):
        find_key(tmp_path)


def test_a_model_file_for_a_key(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "model.gguf", bytes(5000))
    with pytest.raises(SRDError, match=rf"^the key file {path} has more than 4096 bytes, this is no key$"):
        find_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_file_that_others_can_read(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.warns(
        UserWarning, match=rf"^the key file {key_file} can be read by others; run: chmod 600 {key_file}$"
    ):
        assert find_key(key_file).key_id == key_id(SECRET)
