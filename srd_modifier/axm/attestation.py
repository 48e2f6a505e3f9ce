"""An attestation: a small JSON that says which files a container holds, and what they were made of and with.

It is a statement to be sent or published beside a container, and is as good as the way on which it came: it is neither
encrypted nor signed by itself.
"""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srd_modifier.axm.container import Container
from srd_modifier.axm.manifest import ManifestFault, fingerprint_of, is_digest, read_object
from srd_modifier.errors import CheckpointError

FORMAT, VERSION = "srd-axm-attestation", 1
_FIELDS = (
    *("format", "version", "fingerprint", "key_id", "container", "base_digest", "recipe", "packed_with"),
    *("attested_with", "files"),
)
_TOOLS = ("srd-modifier", "torch", "safetensors", "transformers", "compressed-tensors", "llmcompressor", "gguf")
_RECIPE = "recipe.yaml"


def attest(container: Container) -> dict[str, Any]:
    """The attestation of a container whose contents are verified.

    Raises:
        CheckpointError: its config.json is damaged.
    """
    config, recipe = container.read("config.json"), container.read(_RECIPE)
    settings = None if config is None else _settings(container, config)
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": container.fingerprint,
        "key_id": container.header.key_id,
        "container": {"name": container.path.name, "size": container.size},
        "base_digest": settings.get("base_digest") if isinstance(settings, dict) else None,
        "recipe": None if recipe is None else recipe.decode(errors="replace"),
        "packed_with": container.header.tools,
        "attested_with": _versions(),
        "files": [
            {"path": record.path, "size": record.size, "sha256": record.sha256} for record in container.manifest.files
        ],
    }


def check_attestation(container: Container, path: Path) -> None:
    """Compare a container whose contents are verified with an attestation.

    Raises:
        CheckpointError: the attestation is damaged, or is of another container; the message names the difference.
    """
    stated = _read(path)
    actual = attest(container)
    for field, name in (
        ("fingerprint", "fingerprint"),
        ("key_id", "key id"),
        ("base_digest", "base digest"),
        ("recipe", "recipe"),
        ("packed_with", "version of srd-modifier"),
    ):
        if stated[field] != actual[field]:
            difference = _difference(stated, actual) if field == "fingerprint" else f"the {name} differs"
            raise CheckpointError(f"{path} is the attestation of another container than {container.path}: {difference}")


@dataclass(frozen=True)
class _Listed:
    path: str
    size: int
    sha256: str


def _read(path: Path) -> dict[str, Any]:
    # here and not above: it takes torch along, which nobody needs who only verifies
    from srd_modifier.checkpoint.config import read_json

    stated = read_json(path)
    if stated.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an attestation: its format is {stated.get('format')!r}")
    if stated.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is an attestation of version {stated.get('version')!r}, this srd-modifier reads {VERSION}"
        )
    missing = [field for field in _FIELDS if field not in stated]
    if missing or not is_digest(stated["fingerprint"]):
        raise CheckpointError(f"{path} is damaged: {missing[0] if missing else 'fingerprint'} is missing or malformed")
    if fingerprint_of((file.path, file.size, file.sha256) for file in _files(path, stated)) != stated["fingerprint"]:
        raise CheckpointError(f"{path} is damaged: its files do not have its fingerprint")
    return stated


def _files(path: Path, stated: dict[str, Any]) -> list[_Listed]:
    try:
        files = [_Listed(file["path"], file["size"], file["sha256"]) for file in stated["files"]]
    except (KeyError, TypeError):
        files = [_Listed("", -1, "")]
    for file in files:
        if type(file.size) is not int or not is_digest(file.sha256) or not _is_text(file.path):
            raise CheckpointError(f"{path} is damaged: files is malformed")
    return files


def _is_text(value: Any) -> bool:
    # JSON can spell half a surrogate pair, which is no text
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _difference(stated: dict[str, Any], actual: dict[str, Any]) -> str:
    ours, theirs = ({file["path"]: file for file in values["files"]} for values in (actual, stated))
    for name in theirs:
        if name not in ours:
            return f"the container has no {name}"
        if theirs[name] != ours[name]:
            return f"{name} differs"
    return f"the container has {next(name for name in ours if name not in theirs)}, the attestation does not"


def _settings(container: Container, config: bytes) -> Any:
    from srd_modifier.checkpoint.config import CONFIG_KEY

    try:
        return read_object(config).get(CONFIG_KEY)
    except ManifestFault as fault:
        raise CheckpointError(f"{container.path}: config.json {fault}") from None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _TOOLS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional library that is not installed had no part in this
    return found


def encode_attestation(values: dict[str, Any]) -> str:
    """As it is written."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
