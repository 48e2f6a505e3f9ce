"""The directory of a checkpoint on this machine, the sidecar fetched from the hub if need be."""

from pathlib import Path

from srd_modifier.checkpoint.config import SIDECAR_INDEX, read_json
from srd_modifier.errors import CheckpointError

_SIDECAR_FILES = "srd/*"


def checkpoint_directory(checkpoint_file: str | Path) -> Path:
    """The directory that holds a checkpoint's weights, with its sidecar beside them.

    Transformers fetches from a hub only the files that its own index names. The sidecar is fetched here, into the
    same snapshot of the cache, with the same revision. For a file that stands for one in a container it is the
    directory in the container.

    Raises:
        CheckpointError: the sidecar is not in the cache and cannot be fetched.
    """
    # here, because every import of Transformers would otherwise import what reads containers
    from srd_modifier.transformers.containers import entry_of

    entry = entry_of(checkpoint_file)
    if entry is not None:
        return entry.parent
    directory = Path(checkpoint_file).parent
    snapshot = _hub_snapshot(directory)
    if snapshot is None or _complete(directory):
        return directory  # what a local directory lacks is for `Sidecar.open` to name
    repository, revision, cache = snapshot
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=_SIDECAR_FILES)
    except Exception as error:  # the hub's client has no common base for what may go wrong on the way
        raise CheckpointError(
            f"the residual of {repository} at {revision} could not be fetched ({type(error).__name__}: {error}); "
            f"download it with `hf download {repository} --include '{_SIDECAR_FILES}'`"
        ) from error
    return directory


def _complete(directory: Path) -> bool:
    if not (directory / SIDECAR_INDEX).exists():
        return False
    weight_map = read_json(directory / SIDECAR_INDEX).get("weight_map", {})
    return all((directory / SIDECAR_INDEX).with_name(file).exists() for file in set(weight_map.values()))


def _hub_snapshot(directory: Path) -> tuple[str, str, Path] | None:
    """Repository, revision and cache of a directory `CACHE/models--OWNER--NAME/snapshots/REVISION`."""
    if directory.parent.name != "snapshots" or not directory.parents[1].name.startswith("models--"):
        return None
    repository = directory.parents[1].name.removeprefix("models--").replace("--", "/")
    return repository, directory.name, directory.parents[2]
