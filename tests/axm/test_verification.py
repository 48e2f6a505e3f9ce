"""Verification against what the reader holds, one thing or all of them."""

from pathlib import Path

import pytest
from containers import (
    FILES,
    FINGERPRINT,
    OTHER_FILES,
    OTHER_SECRET,
    SECRET,
    SHORT,
    container,
    key_id,
    same_checksum,
    signed_entries,
    write_zip,
)

from srd_modifier.axm.attestation import attest, encode_attestation
from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import Key
from srd_modifier.axm.verification import Verified, verify
from srd_modifier.errors import CheckpointError, SRDError


@pytest.fixture
def attestation(packed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "attestation.json"
    with Container(packed) as opened:
        opened.verify()
        path.write_text(encode_attestation(attest(opened)))
    return path


def test_by_key(packed: Path, key: Key) -> None:
    assert verify(packed, key=key) == Verified(
        FINGERPRINT, len(FILES), packed.stat().st_size, key_id(SECRET), False, False, None
    )


@pytest.mark.parametrize("given", [FINGERPRINT, FINGERPRINT.upper(), f" {FINGERPRINT}\n", SHORT, SHORT.upper()])
def test_by_fingerprint(given: str, packed: Path) -> None:
    found = verify(packed, fingerprint=given)
    assert found.by_fingerprint
    assert found.key_id is None


def test_by_attestation(packed: Path, attestation: Path) -> None:
    found = verify(packed, attestation=attestation)
    assert found.by_attestation
    assert not found.by_fingerprint


def test_by_everything(packed: Path, key: Key, attestation: Path) -> None:
    found = verify(packed, key=key, fingerprint=SHORT, attestation=attestation)
    assert (found.key_id, found.by_fingerprint, found.by_attestation) == (key_id(SECRET), True, True)


def test_progress_counts_every_byte(packed: Path, key: Key) -> None:
    shown: list[tuple[int, int]] = []
    verify(packed, key=key, progress=lambda done, total: shown.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert shown[-1] == (size, size)


def test_by_nothing(packed: Path) -> None:
    with pytest.raises(SRDError, match=rf"^{packed}: nothing was given to verify it with; .*name a --key-file"):
        verify(packed)


def test_a_signature_without_a_public_key(packed: Path, key: Key, tmp_path: Path) -> None:
    with pytest.raises(SRDError, match=r"x\.sig: a signature is checked with the --public-key of its signer$"):
        verify(packed, key=key, signature=tmp_path / "x.sig")


@pytest.mark.parametrize(
    "given", ["", "x", FINGERPRINT[:-1], FINGERPRINT + "0", SHORT[:-1], SHORT.replace("-", ""), "g" * 64, "\u0660" * 64]
)
def test_no_fingerprint_at_all(given: str, packed: Path) -> None:
    """Of a shorter one there would be another container."""
    with pytest.raises(SRDError) as error:
        verify(packed, fingerprint=given)
    assert str(error.value) == (
        f"--fingerprint {given!r} is neither 64 hexadecimal digits nor four groups of four, "
        "as `srd axm inspect` prints them"
    )


LAST = "0" if FINGERPRINT[-1] != "0" else "1"


@pytest.mark.parametrize("given", ["0" * 64, "0000-0000-0000-0000", FINGERPRINT[:-1] + LAST])
def test_the_fingerprint_of_other_files(given: str, packed: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        verify(packed, fingerprint=given)
    assert str(error.value) == f"{packed} has the fingerprint {FINGERPRINT}, expected {given}: these are other files"


def test_the_attestation_of_other_files(attestation: Path, tmp_path: Path, key: Key) -> None:
    """Which a holder of the key has packed: the key alone does not show it."""
    path = tmp_path / "other.axm"
    path.write_bytes(container(OTHER_FILES))
    assert verify(path, key=key).files == len(FILES)
    with pytest.raises(CheckpointError, match=r"is the attestation of another container than .*: model\.gguf differs$"):
        verify(path, key=key, attestation=attestation)


def test_everything_must_match(packed: Path, key: Key, attestation: Path) -> None:
    with pytest.raises(CheckpointError, match="was packed with another key"):
        verify(packed, key=Key(OTHER_SECRET), fingerprint=FINGERPRINT, attestation=attestation)
    with pytest.raises(CheckpointError, match="these are other files"):
        verify(packed, key=key, fingerprint="0" * 64, attestation=attestation)


@pytest.mark.parametrize("by", ["key", "fingerprint", "attestation"])
def test_every_byte_is_read(by: str, tmp_path: Path, key: Key, attestation: Path) -> None:
    path, entries = tmp_path / "changed.axm", signed_entries()
    entries[3].data = same_checksum(OTHER_FILES["model.gguf"], FILES["model.gguf"])
    path.write_bytes(write_zip(entries))
    given = {"key": key, "fingerprint": FINGERPRINT, "attestation": attestation}
    with pytest.raises(CheckpointError, match=rf"^{path}: model\.gguf was changed after it was packed"):
        verify(path, **{by: given[by]})
