"""Verifying a container against what its reader holds: a key, a fingerprint, an attestation, a public key.

A container that is whole by its own account proves nothing, because whoever changes it can make it whole again. So at
least one thing from outside is asked for.
"""

import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from srd_modifier.axm.attestation import check_attestation
from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import Key
from srd_modifier.axm.streams import Progress
from srd_modifier.errors import CheckpointError, SRDError

_SHORT = re.compile(r"[0-9a-f]{4}(-[0-9a-f]{4}){3}")
_WHOLE = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verified:
    """What was proven of a container.

    Attributes:
        fingerprint: of its files.
        files: how many there are, each found whole.
        size: bytes of the container.
        key_id: of the key that authenticated it; None if no key was given.
        by_fingerprint: whether its fingerprint was compared with one from outside.
        by_attestation: whether it was compared with an attestation.
        signer: who signed it publicly; None if that was not asked for.
    """

    fingerprint: str
    files: int
    size: int
    key_id: str | None
    by_fingerprint: bool
    by_attestation: bool
    signer: str | None


def verify(
    path: Path,
    *,
    key: Key | None = None,
    fingerprint: str | None = None,
    attestation: Path | None = None,
    public_key: Path | None = None,
    signature: Path | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Read a whole container and compare it with everything that is given.

    Args:
        path: the container.
        key: the key that it should have been packed with.
        fingerprint: the whole one, or the short one, of 64 bits, that was read aloud.
        attestation: file that `srd axm attest` wrote.
        public_key: PEM file of the public signer.
        signature: its signature; None is `model.sig` in the container, or the file beside it.
        progress: called with (done, of all) in bytes.

    Raises:
        CheckpointError: it was changed, or does not match what was given; the message says which.
        SRDError: nothing was given to compare it with.
    """
    if key is None and fingerprint is None and attestation is None and public_key is None:
        raise SRDError(
            f"{path}: nothing was given to verify it with; a container is made whole again by whoever changes it, so "
            "name a --key-file, a --fingerprint, an --attestation or a --public-key"
        )
    if signature is not None and public_key is None:
        raise SRDError(f"{signature}: a signature is checked with the --public-key of its signer")
    with Container(path, key=key) as container:
        if fingerprint is not None:
            _check_fingerprint(container, fingerprint)
        container.verify(progress)
        if attestation is not None:
            check_attestation(container, attestation)
        signer = None
        if public_key is not None:
            from srd_modifier.axm.signatures import verify_container_signature

            signer = verify_container_signature(container, public_key, signature)
        return Verified(
            container.fingerprint,
            len(container.manifest.files),
            container.size,
            None if key is None else key.key_id,
            fingerprint is not None,
            attestation is not None,
            signer,
        )


def _check_fingerprint(container: Container, expected: str) -> None:
    given = expected.strip().lower()
    if not _WHOLE.fullmatch(given) and not _SHORT.fullmatch(given):
        raise SRDError(
            f"--fingerprint {expected!r} is neither 64 hexadecimal digits nor four groups of four, "
            "as `srd axm inspect` prints them"
        )
    digits = given.replace("-", "")
    if not hmac.compare_digest(container.fingerprint[: len(digits)], digits):
        raise CheckpointError(
            f"{container.path} has the fingerprint {container.fingerprint}, expected {given}: these are other files"
        )
