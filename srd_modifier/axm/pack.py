"""Packing: every file is read once, hashed and copied on all cores, and the container appears whole or not at all."""

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from srd_modifier.axm.header import Header
from srd_modifier.axm.keys import Key
from srd_modifier.axm.layout import Layout
from srd_modifier.axm.manifest import FileRecord, Manifest, in_order
from srd_modifier.axm.names import HEADER, MANIFEST, POLICY
from srd_modifier.axm.sources import SIGNATURE, find_sources
from srd_modifier.axm.streams import Advance, Digests, Progress, digest_file, in_parallel, write_at
from srd_modifier.checkpoint.atomic import new_file, refuse_existing_file
from srd_modifier.errors import CheckpointError

_NO_DIGEST = "0" * 64


def pack(
    sources: Sequence[Path], output: Path, key: Key, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Pack a checkpoint directory, a GGUF file, or both, into a container.

    A policy file is built where there is none. The same files, key and version of this package give the same bytes.

    Args:
        sources: at most one directory, and GGUF files, which stand beside the directory's files.
        output: the container to make.
        key: what it is authenticated with.
        overwrite: replace an existing container; nothing else is ever replaced.
        progress: called with (done, of all) in bytes.

    Raises:
        CheckpointError: a source is damaged or cannot be packed, the output is in the way, or the disk is full. The
            output is untouched.
    """
    refuse_existing(output, overwrite=overwrite)
    files = find_sources(sources)
    built = {} if POLICY in files else {POLICY: _policy(sources, files)}
    _check_checkpoint(sources, files)
    with new_file(output) as target:
        return _write(files, built, target.fileno(), key, progress)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if something is at `output` that may not be replaced by a container."""
    refuse_existing_file(output, overwrite=overwrite)
    if output.exists() and (not output.is_file() or _first_bytes(output) != b"PK\3\4"):
        raise CheckpointError(f"{output} is not a container and is not overwritten; remove it yourself")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _check_checkpoint(sources: Sequence[Path], files: Mapping[str, Path]) -> None:
    """Open what is packed as its readers will: a container of a damaged checkpoint would carry our word for it."""
    from srd_modifier.checkpoint.base import BaseCheckpoint
    from srd_modifier.checkpoint.config import read_srd_config
    from srd_modifier.checkpoint.sidecar import Sidecar

    for directory in (path for path in sources if path.is_dir()):
        if "config.json" not in files:
            if not any(name.endswith(".gguf") for name in files):
                raise CheckpointError(f"{directory} has neither config.json nor a GGUF file, so it is not a model")
        elif read_srd_config(directory) is not None:
            Sidecar.open(directory)
        else:
            BaseCheckpoint(directory)


def _policy(sources: Sequence[Path], files: Mapping[str, Path]) -> bytes:
    from srd_modifier.met import build_met, encode_met

    if SIGNATURE in files:
        raise CheckpointError(
            f"{files[SIGNATURE]} signs the files beside it, and met.json would come to them; run `srd met` on the "
            "directory with --output met.json in it, and sign it again"
        )
    directories = [path for path in sources if path.is_dir() and (path / "config.json").is_file()]
    described = directories[0] if directories else next(path for name, path in files.items() if name.endswith(".gguf"))
    return encode_met(build_met(described))


def _write(
    files: Mapping[str, Path], built: Mapping[str, bytes], target: int, key: Key, progress: Progress | None
) -> Manifest:
    paths = in_order([*files, *built])
    sizes = [len(built[path]) if path in built else files[path].stat().st_size for path in paths]
    # digests have a fixed width, so that the places of all files are known before the first is read
    blank = Manifest(
        tuple(FileRecord(path, size, _NO_DIGEST, 0, _NO_DIGEST) for path, size in zip(paths, sizes, strict=True))
    )
    own = [(HEADER, len(Header.of(blank, key).encode())), (MANIFEST, len(blank.encode()))]
    layout = Layout([*own, *zip(paths, sizes, strict=True)])
    places = layout.entries[len(own) :]
    os.truncate(target, layout.size)
    records: list[FileRecord | None] = [None] * len(paths)

    def copy(number: int, advance: Advance) -> None:
        path, place = paths[number], places[number]
        if path in built:
            write_at(target, built[path], place.data)
            found = Digests(hashlib.sha256(built[path]).hexdigest(), zlib.crc32(built[path]))
            advance(place.size)
        else:
            found = digest_file(files[path], place.size, "packed", copy_to=(target, place.data), advance=advance)
        records[number] = FileRecord(path, place.size, found.sha256, found.crc32, _NO_DIGEST).signed(key)

    in_parallel(copy, sizes, progress)
    manifest = Manifest(tuple(record for record in records if record is not None))
    encoded = [Header.of(manifest, key).encode(), manifest.encode()]
    for place, data in zip(layout.entries, encoded, strict=False):
        write_at(target, data, place.data)
    checksums = [*map(zlib.crc32, encoded), *(record.crc32 for record in manifest.files)]
    for place, checksum in zip(layout.entries, checksums, strict=True):
        write_at(target, layout.local_header(place, checksum), place.start)
    write_at(target, layout.tail(checksums), layout.central)
    return manifest
