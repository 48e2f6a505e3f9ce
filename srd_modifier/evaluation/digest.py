"""What identifies a model: a SHA-256 over the files that decide what it computes and which tokens it reads."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from srd_modifier.axm.entries import EntryPath
from srd_modifier.errors import SRDError

# Neither the card, the recipe nor a GGUF file beside the checkpoint changes what the directory loads as.
_PATTERNS = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "adapter_config.json"),
    "generation_config.json",  # says what ends a text
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "chat_template*",
    ),
)
_FOLDERS = ("srd", "adapter")
_BLOCK = 1 << 22


def model_digest(path: Path) -> str:
    """The digest of a model, hexadecimal.

    Args:
        path: A directory, of which weights, configuration, tokenizer and the files of the sidecar count, by name and
            content, and nothing else does; or a file, whose digest is that of its bytes.

    Raises:
        SRDError: A file cannot be read, or the directory holds none that counts.
    """
    if path.is_file():
        return file_digest(path)
    files = _files(path)
    if not files:
        raise SRDError(f"{path}: there are no files of a model")
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashlib lets other threads run
        digests = pool.map(file_digest, (path / name for name in files))
    listing = "".join(f"{digest}  {name}\n" for name, digest in zip(files, digests, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal; that of one in a container is in its manifest, and not made again."""
    if isinstance(path, EntryPath):
        return path.sha256
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise SRDError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _files(directory: Path) -> list[str]:
    """Names of the files that count, relative to the directory, sorted."""
    own = [path.name for path in directory.iterdir() if path.is_file() and _counts(path.name)]
    inside = [
        str(path.relative_to(directory).as_posix())
        for folder in _FOLDERS
        if (directory / folder).is_dir()
        for path in (directory / folder).iterdir()
        if path.is_file()
    ]
    return sorted(own + inside)


def _counts(name: str) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in _PATTERNS)
