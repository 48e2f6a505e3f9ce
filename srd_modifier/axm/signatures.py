"""Public signatures with OpenSSF model-signing: who has the public key can check who signed, and cannot sign.

What is signed is path and SHA-256 of every file, as the `model_signing` command signs a directory of them. One
signature is therefore good for a container, for what is extracted from it, and for the library's own command; hidden
files and `model.sig`, where the signature of a directory is, are not part of it.

The library decides whether a signature is good. What is parsed here of one that it has refused gives words to an error.
"""

import base64
import hashlib
import io
import json
import os
import stat
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from srd_modifier._extras import require
from srd_modifier.axm.container import Container
from srd_modifier.axm.keys import find_key
from srd_modifier.axm.manifest import is_digest
from srd_modifier.axm.sources import SIGNATURE, find_sources
from srd_modifier.axm.streams import Advance, Progress, digest_file, in_parallel
from srd_modifier.checkpoint.atomic import refuse_existing_file, write_text
from srd_modifier.errors import CheckpointError, SRDError

if TYPE_CHECKING:
    from model_signing.hashing import Config as HashingConfig
    from model_signing.manifest import Manifest

PASSWORD = "SRD_SIGN_PASSWORD"

_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_MAX_KEY_BYTES = 1 << 16
_MAX_SIGNATURE_BYTES = 1 << 26  # 100,000 files take half of it
_MOST_NAMED = 5

# what the signature tells other verifiers to leave out: itself, and what downloading a directory adds to it. The fixed
# list, and not the hidden files that are there, because a signature is public and their names may not be
_LEFT_OUT = (SIGNATURE, ".cache", ".git", ".gitattributes", ".github", ".gitignore")


def sign_container(
    path: Path,
    private_key: Path,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sign the files of a container, after it has been verified: with the key in the environment if one is there.

    Args:
        path: the container.
        private_key: PEM file of an EC key, P-256, P-384 or P-521; the environment variable SRD_SIGN_PASSWORD opens it
            if it is encrypted.
        output: the signature to make; None is the container's name with `.sig` after it.
        overwrite: replace an existing signature; nothing else is ever replaced.
        progress: called with (done, of all) in bytes.

    Returns:
        The signature's path.

    Raises:
        CheckpointError: the container was changed, or the output is in the way.
        SRDError: the private key cannot be used.
        MissingExtraError: model-signing is not installed.
    """
    output = _beside(path) if output is None else output
    password = _prepare(private_key, output, overwrite)
    with Container(path, key=find_key(None)) as container:
        container.verify(progress)
        digests = _in_container(container)
    return _sign(path.stem, digests, private_key, password, output)


def sign_directory(
    path: Path,
    private_key: Path,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sign the files of a checkpoint directory, sidecar and policy included, hidden ones not.

    Args:
        path: the directory.
        private_key: as for `sign_container`.
        output: the signature to make; None is `model.sig` in the directory.
        overwrite: replace an existing signature; nothing else is ever replaced.
        progress: called with (done, of all) in bytes.

    Returns:
        The signature's path.

    Raises:
        CheckpointError: a file cannot be read or is a link, or the output is in the way.
        SRDError: the private key cannot be used.
        MissingExtraError: model-signing is not installed.
    """
    own = path / SIGNATURE
    output = own if output is None else output
    if output.resolve().is_relative_to(path.resolve()) and output.resolve() != own.resolve():
        raise CheckpointError(f"{output} would be a file of what it signs; write to {own}, or out of the directory")
    password = _prepare(private_key, output, overwrite)
    return _sign(path.resolve().name, _in_directory(path, None, progress), private_key, password, output)


def verify_container_signature(container: Container, public_key: Path, signature: Path | None) -> str:
    """Check the signature of a container.

    Args:
        container: its contents verified.
        public_key: PEM file of the signer.
        signature: its signature; None is the file beside the container with `.sig` after its name, else `model.sig` in
            it.

    Returns:
        What is known of the signer, in words.

    Raises:
        CheckpointError: there is no signature, it is damaged, made with another key, or for other files.
        SRDError: the public key cannot be used.
        MissingExtraError: model-signing is not installed.
        ValueError: the container is not verified.
    """
    if not container.verified:
        raise ValueError(f"{container.path} is not verified")
    beside, inside = _beside(container.path), container.entry(SIGNATURE)
    if signature is None and beside.exists():
        signature = beside
    if signature is not None:
        data, source = _read(signature, _MAX_SIGNATURE_BYTES, "signature"), str(signature)
    elif inside is not None:
        source = f"{container.path}: {SIGNATURE}"
        if inside.size > _MAX_SIGNATURE_BYTES:
            raise CheckpointError(f"{source} has {inside.size} bytes, this is no signature")
        data = container.read(SIGNATURE) or b""
    else:
        raise CheckpointError(
            f"no signature of {container.path} was found, neither {beside} nor {SIGNATURE} in it; "
            "name it with --signature"
        )
    return _verify(str(container.path), _in_container(container), public_key, data, source)


def verify_directory_signature(
    path: Path, public_key: Path, signature: Path | None = None, *, progress: Progress | None = None
) -> str:
    """Check the signature of a directory: that all its files but hidden ones are as they were signed.

    Args:
        path: the directory.
        public_key: PEM file of the signer.
        signature: its signature; None is `model.sig` in the directory.
        progress: called with (done, of all) in bytes.

    Returns:
        What is known of the signer, in words.

    Raises:
        CheckpointError: there is no signature, it is damaged, made with another key, or for other files.
        SRDError: the public key cannot be used.
        MissingExtraError: model-signing is not installed.
    """
    if signature is None:
        signature = path / SIGNATURE
        if not signature.exists():
            raise CheckpointError(
                f"no signature of {path} was found, there is no {signature}; name it with --signature"
            )
    data = _read(signature, _MAX_SIGNATURE_BYTES, "signature")
    _read_public_key(public_key)  # a wrong file is refused before 100 GB are read
    return _verify(str(path), _in_directory(path, signature, progress), public_key, data, str(signature))


def _beside(container: Path) -> Path:
    return container.with_name(f"{container.name}.sig")


# --- the files -------------------------------------------------------------------------------------------------------


def _in_container(container: Container) -> dict[str, str]:
    """SHA-256 of its files, hexadecimal, by path."""
    return {record.path: record.sha256 for record in container.manifest.files if record.path != SIGNATURE}


def _in_directory(directory: Path, signature: Path | None, progress: Progress | None) -> dict[str, str]:
    """SHA-256 of its files but its signature, hexadecimal, by path."""
    found = find_sources([directory])
    found.pop(SIGNATURE, None)
    files = [(name, file) for name, file in found.items() if signature is None or not file.samefile(signature)]
    digests: dict[str, str] = {}

    def work(number: int, advance: Advance) -> None:
        name, file = files[number]
        digests[name] = digest_file(file, sizes[number], "read", copy_to=None, advance=advance).sha256

    try:
        sizes = [file.stat().st_size for _, file in files]
        in_parallel(work, sizes, progress)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or directory}: {error.strerror or error}") from error
    return digests


# --- the keys --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PublicKey:
    """A signer's public key.

    Attributes:
        pem: as OpenSSL writes it, whatever the file had around it.
        sha256: of that, hexadecimal; model-signing puts it into a signature.
        curve: as NIST calls it.
    """

    pem: bytes
    sha256: str
    curve: str

    def __str__(self) -> str:
        return f"EC key {self.curve}, SHA-256 of its public key {self.sha256}"


def _read_public_key(path: Path) -> _PublicKey:
    require("model_signing", extra="sign")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    data = _read(path, _MAX_KEY_BYTES, "public key")
    if b"PRIVATE KEY" in data:
        raise SRDError(f"{path} is a private key; `openssl pkey -in {path} -pubout` prints the public one")
    try:
        key: Any = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise SRDError(f"{path} is not a public key in PEM, which begins with BEGIN PUBLIC KEY") from None
    curve = _curve(key, path)
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return _PublicKey(pem, hashlib.sha256(pem).hexdigest(), curve)


def _check_private_key(path: Path) -> bytes | None:
    """The password of a private key that can sign, None if it needs none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, _MAX_KEY_BYTES, "private key")
    password = None
    # without the causes: the library may quote what it could not read
    try:
        try:
            key: Any = load_pem_private_key(data, None)
        except TypeError:  # it is encrypted; that a password is set for another one is no error
            password = os.environ.get(PASSWORD, "").encode()
            if not password:
                raise SRDError(
                    f"the private key {path} is encrypted; set the environment variable {PASSWORD} to its password"
                ) from None
            key = load_pem_private_key(data, password)
    except (ValueError, UnsupportedAlgorithm):
        if password is not None:
            raise SRDError(f"the password in {PASSWORD} does not open the private key {path}") from None
        if b"PUBLIC KEY" in data:
            raise SRDError(f"{path} is a public key, signing takes the private one") from None
        raise SRDError(f"{path} is not a private key in PEM, which begins with BEGIN PRIVATE KEY") from None
    _curve(key, path)
    if os.name == "posix" and path.stat().st_mode & 0o077 and stat.S_ISREG(path.stat().st_mode):
        warnings.warn(f"the private key {path} can be read by others; run: chmod 600 {path}", stacklevel=4)
    return password


def _curve(key: Any, path: Path) -> str:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        kind = f"on the curve {curve}" if curve else "of another kind than EC"
        raise SRDError(f"{path} is a key {kind}; model-signing takes EC keys on P-256, P-384 and P-521")
    return _CURVES[curve]


def _read(path: Path, most: int, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise SRDError(f"the {kind} {path} is missing") from None
    except OSError as error:
        raise SRDError(f"cannot read the {kind} {path}: {error.strerror or error}") from error
    if len(data) > most:
        raise SRDError(f"{path} has more than {most} bytes, this is no {kind}")
    return data


# --- signing ---------------------------------------------------------------------------------------------------------


def _prepare(private_key: Path, output: Path, overwrite: bool) -> bytes | None:
    """Refuse what can be refused before the files are read; the private key's password."""
    require("model_signing", extra="sign")
    refuse_existing_file(output, overwrite=overwrite)
    if output.exists() and _bundle(_read(output, _MAX_SIGNATURE_BYTES, "signature")) is None:
        raise CheckpointError(f"{output} is not a signature and is not overwritten; remove it yourself")
    return _check_private_key(private_key)


def _sign(name: str, digests: Mapping[str, str], private_key: Path, password: bytes | None, output: Path) -> Path:
    from model_signing import signing

    # the library calls the password a str, and hands it on to where only bytes are taken
    config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=cast("str | None", password))
    config.set_hashing_config(cast("HashingConfig", _HashedBefore(name, digests)))
    with TemporaryDirectory() as folder:
        signature = Path(folder) / SIGNATURE
        config.sign(Path(name), signature)
        write_text(output, signature.read_text(encoding="utf-8"))
    return output


class _HashedBefore:
    """What the library hashes a model with, except that the digests are known.

    It keeps a container from being unpacked, and a directory from being read twice. Of what the library does not
    document, only the type of a digest is used, for which it has no public name.

    Attributes:
        asked: whether the library has asked for the digests: it does so when it has found a signature to be valid.
    """

    def __init__(self, name: str, digests: Mapping[str, str]) -> None:
        self._name = name
        self._digests = digests
        self.asked = False

    def hash(self, model_path: Path, *, files_to_hash: None = None) -> "Manifest":
        """The digests, as the library's own configuration gives them."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        self.asked = True
        kind = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(_LEFT_OUT)}
        items = [
            manifest.FileManifestItem(path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(digest)))
            for path, digest in self._digests.items()
        ]
        return manifest.Manifest(self._name, items, manifest.SerializationType.from_args(kind))

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Nothing: a signature does not decide which of the files need not be signed."""


# --- verifying -------------------------------------------------------------------------------------------------------


def _verify(place: str, digests: Mapping[str, str], public_key: Path, signature: bytes, source: str) -> str:
    key = _read_public_key(public_key)  # first, for what it says where the library is missing
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    known = _HashedBefore(place, digests)
    # copies, so that what is read here for an error is what was verified
    with TemporaryDirectory() as folder:
        copy, pem = Path(folder) / SIGNATURE, Path(folder) / "public.pem"
        copy.write_bytes(signature)
        pem.write_bytes(key.pem)
        config = verifying.Config().use_elliptic_key_verifier(public_key=pem)
        config.set_hashing_config(cast("HashingConfig", known))
        try:
            # it prints to standard output that a signature is of an old version, which `--json` cannot have there
            with redirect_stdout(io.StringIO()):
                config.verify(Path(place), copy)
        except (InvalidSignature, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            # a verdict, or whatever the library stumbles over in a file from anywhere
            if known.asked:
                raise CheckpointError(_explain_files(signature, digests, place, source)) from None
            raise CheckpointError(_explain_signature(signature, key, public_key, source)) from None
    return str(key)


def _bundle(signature: bytes) -> dict[str, Any] | None:
    """The parsed bundle of a signature by key or certificate, None if it is no such thing."""
    try:
        bundle = json.loads(signature)
    except (ValueError, RecursionError):
        return None
    parts = ("verificationMaterial", "dsseEnvelope")
    whole = isinstance(bundle, dict) and all(isinstance(bundle.get(part), dict) for part in parts)
    return bundle if whole else None


def _explain_signature(signature: bytes, key: _PublicKey, public_key: Path, source: str) -> str:
    """Why a signature is not one by the key, as far as an unverified file can say."""
    bundle = _bundle(signature)
    if bundle is None:
        return f"{source} is damaged: it is not a signature that model-signing writes"
    material = bundle["verificationMaterial"]
    if "certificate" in material or "x509CertificateChain" in material:
        return (
            f"{source} was signed with a certificate, as Sigstore does, not with a key; "
            "verify it with `model_signing verify` and the extracted files"
        )
    named = material.get("publicKey")
    hint = named.get("hint") if isinstance(named, dict) else None
    if is_digest(hint) and hint != key.sha256:
        return (
            f"{source} was signed with another key: it names the public key with the SHA-256 {hint}, "
            f"that of {public_key} is {key.sha256}"
        )
    return f"{source} is not a valid signature of a model by {public_key}: it was changed, or made with another key"


def _explain_files(signature: bytes, digests: Mapping[str, str], place: str, source: str) -> str:
    """How the files differ from those of a signature that is valid."""
    other = f"{source} is a valid signature, but of other files than those of {place}"
    try:
        bundle = _bundle(signature) or {}
        predicate = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]
        kind = predicate["serialization"]
        signed = {str(resource["name"]): resource["digest"] for resource in predicate["resources"]}
        if (kind["method"], kind["hash_type"]) != ("files", "sha256"):
            return (
                f"{source} is a valid signature, but of {kind['method']!r} by {kind['hash_type']!r}; "
                "sign whole files by SHA-256, as model-signing does by default"
            )
    except (ValueError, LookupError, TypeError):
        return other  # of an older version, which spells its files otherwise
    differences = [
        *(f"{name!r} differs" for name in sorted(digests) if name in signed and signed[name] != digests[name]),
        *(_missing(name) for name in sorted(signed) if name not in digests),
        *(f"{name!r} is not signed" for name in sorted(digests) if name not in signed),
    ]
    if len(differences) > _MOST_NAMED:
        differences[_MOST_NAMED:] = [f"and {len(differences) - _MOST_NAMED} more"]
    return f"{other}: {', '.join(differences)}" if differences else other


def _missing(name: str) -> str:
    if any(part.startswith(".") for part in name.split("/")):
        return f"{name!r} is a hidden file, which is neither packed nor looked at"
    return f"{name!r} is missing"
