"""The secret of a container: where it comes from, and the keys for one purpose each that are derived from it.

Derivation is HKDF-SHA256 (RFC 5869) with one block of output, which is two calls of the standard library's HMAC. A key
is never shown: not in its `repr`, not in an error, and it is taken from a file or the environment but from no argument.
"""

import hashlib
import hmac
import os
import secrets
import stat
import warnings
from pathlib import Path

from srd_modifier.errors import SRDError

ENVIRONMENT = "SRD_AXM_KEY"
MIN_BYTES = 32
_MAX_BYTES = 4096  # somebody who names a model file by mistake
_SALT = b"srd-axm"


class Key:
    """A secret of 32 bytes or more.

    Attributes:
        key_id: 32 hexadecimal digits that tell one secret from another and say nothing else about it.
    """

    def __init__(self, secret: bytes, *, source: str = "the key") -> None:
        """Take a secret.

        Args:
            secret: at least 32 bytes.
            source: where it is from, for errors.

        Raises:
            SRDError: it is empty or too short.
        """
        if not secret:
            raise SRDError(f"{source} is empty; `srd axm keygen FILE` makes a key")
        if len(secret) < MIN_BYTES:
            raise SRDError(
                f"{source} has {len(secret)} bytes, a key needs at least {MIN_BYTES}; `srd axm keygen FILE` makes one"
            )
        self._extracted = hmac.digest(_SALT, secret, "sha256")
        self.key_id = self._derive("key id").hex()[:32]

    def __repr__(self) -> str:
        return f"Key(key_id={self.key_id!r})"

    def __reduce__(self) -> str:
        raise TypeError("a key is neither copied nor pickled")

    def authenticate(self, purpose: str, message: bytes) -> str:
        """HMAC-SHA256 of a message under the key of a purpose, in hexadecimal."""
        return hmac.new(self._derive(purpose), message, hashlib.sha256).hexdigest()

    def is_authentic(self, purpose: str, message: bytes, tag: str) -> bool:
        """Whether `authenticate` gives this tag, compared in constant time."""
        return hmac.compare_digest(self.authenticate(purpose, message).encode(), tag.encode())

    def _derive(self, purpose: str) -> bytes:
        return hmac.digest(self._extracted, f"srd-axm/1 {purpose}".encode() + b"\x01", "sha256")


def write_key(path: Path) -> Key:
    """Make a file with 32 random bytes, readable by its owner only.

    Raises:
        SRDError: there is such a file already, or it cannot be written.
    """
    secret = secrets.token_bytes(MIN_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SRDError(f"{path} already exists; a key is never overwritten") from None
    except OSError as error:
        raise SRDError(f"cannot write {path}: {error.strerror or error}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return Key(secret)


def find_key(key_file: Path | None) -> Key | None:
    """The key in a file, else the one in the environment, else None.

    Args:
        key_file: holds the secret's bytes as they are.

    Raises:
        SRDError: the file cannot be read, the variable is not hexadecimal, or the secret is too short.
    """
    if key_file is not None:
        return _read_key(key_file)
    text = os.environ.get(ENVIRONMENT)
    if text is None:
        return None
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        # without the cause: its message may quote the secret
        raise SRDError(f"the environment variable {ENVIRONMENT} is not hexadecimal") from None
    return Key(secret, source=f"the key in the environment variable {ENVIRONMENT}")


def require_key(key_file: Path | None) -> Key:
    """As `find_key`, but without a key that is an SRDError."""
    key = find_key(key_file)
    if key is None:
        raise SRDError(
            f"no key was given: name a file with --key-file or set {ENVIRONMENT} (hexadecimal); "
            "`srd axm keygen FILE` makes a key"
        )
    return key


def _read_key(path: Path) -> Key:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise SRDError(f"the key file {path} is missing; `srd axm keygen {path}` makes one") from None
    except OSError as error:
        raise SRDError(f"cannot read the key file {path}: {error.strerror or error}") from error
    if len(secret) > _MAX_BYTES:
        raise SRDError(f"the key file {path} has more than {_MAX_BYTES} bytes, this is no key")
    if os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077:
        warnings.warn(f"the key file {path} can be read by others; run: chmod 600 {path}", stacklevel=3)
    return Key(secret, source=f"the key file {path}")
