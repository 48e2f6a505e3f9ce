"""What is scored of a container: the checkpoint in it, or else its GGUF file."""

import threading
from pathlib import Path

from srd_modifier.axm.entries import SUFFIX, EntryPath, open_root
from srd_modifier.axm.extract import extract_files
from srd_modifier.axm.scratch import private_directory
from srd_modifier.errors import CheckpointError, SRDError

_LOCK = threading.Lock()
_COPIES: dict[EntryPath, Path] = {}


def names_container(name: str) -> bool:
    """Whether a name is meant for a container, be there one or not."""
    return Path(name).suffix == SUFFIX and not Path(name).is_dir()


def open_container(name: str) -> Path:
    """The model in a container, all of which is verified before.

    Returns:
        Its root, which is read in place, where it holds a checkpoint. Where it holds a GGUF file alone, a verified copy
        of that: llama.cpp, which reads the vocabulary, opens files by their names only. The copy lies in a private
        temporary directory until the process ends.

    Raises:
        CheckpointError: the container is missing, was changed, or was packed with another key than that in the
            environment.
        SRDError: it holds no model, or several GGUF files.
    """
    root = open_root(Path(name))
    if (root / "config.json").is_file():
        return root
    files = list(root.rglob("*.gguf"))
    if not files:
        raise SRDError(f"{name} holds no model: it has neither config.json nor a GGUF file")
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(root)) for file in files)
        raise SRDError(f"{name} holds {len(files)} GGUF files ({names}); unpack it and name one of them")
    return _copy(files[0], root)


def _copy(file: EntryPath, root: EntryPath) -> Path:
    with _LOCK:
        if file not in _COPIES:
            container, name = root.container, file.relative_to(root).as_posix()
            folder = private_directory()
            try:
                extract_files(container, [record for record in container.manifest.files if record.path == name], folder)
            except OSError as error:
                raise CheckpointError(
                    f"cannot copy {name} of {container.path} to {folder}: {error.strerror or error}"
                ) from error
            _COPIES[file] = folder / name
        return _COPIES[file]
