"""What a policy file says twice: totals, the split of the layers, budgets; computed here, and checked here.

memory   pinned + base of every chunk + residual of the intent's chunks
load     memory / speed of the storage, nothing cached
hydrate  residual of the intent's chunks / speed of the storage, the base in memory already
active   memory, but of the experts only the share that one token uses; all of it for a dense model
"""

from collections.abc import Iterator
from typing import Any

from srd_modifier.errors import CheckpointError
from srd_modifier.met.schema import check_schema
from srd_modifier.selection.depth import CHUNKS, chunk_of

_DIGITS = 6  # of a second


def layer_chunks(layers: int) -> list[str]:
    """The chunk of each of so many decoder layers, from the first."""
    return [chunk for layer in range(layers) if (chunk := chunk_of(f"layers.{layer}", layers)) is not None]


def budgets(met: dict[str, Any]) -> dict[str, dict[str, int | float]]:
    """Memory in bytes and time in seconds of every intent, from the rest of a policy file."""
    chunks, speed, experts = met["chunks"], met["storage"]["bytes_per_second"], met["model"]["experts"]
    base = met["pinned"]["bytes"] + sum(chunk["base_bytes"] for chunk in chunks.values())
    expert_base = sum(chunk["expert_base_bytes"] for chunk in chunks.values())
    found = {}
    for intent, names in met["hydration"].items():
        residual = sum(chunks[name]["residual_bytes"] for name in names)
        memory = base + residual
        used = expert_bytes = expert_base + sum(chunks[name]["expert_residual_bytes"] for name in names)
        if experts is not None:
            used = -(-expert_bytes * experts["active"] // experts["count"])
        found[intent] = {
            "memory_bytes": memory,
            "residual_bytes": residual,
            "load_seconds": round(memory / speed, _DIGITS),
            "hydrate_seconds": round(residual / speed, _DIGITS),
            "active_bytes_per_token": memory - expert_bytes + used,
        }
    return found


def check_met(met: Any, where: str) -> None:
    """Refuse a policy file whose schema is not kept or whose figures contradict each other.

    Args:
        met: a parsed `met.json`.
        where: what an error calls it, such as the file's name.

    Raises:
        CheckpointError: naming the first field that is wrong.
    """
    check_schema(met, where)
    for name, found, expected in _said_twice(met):
        if found != expected:
            raise CheckpointError(f"{where}: {name} is {found}, expected {expected} from the other fields")


def _said_twice(met: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and what the value must be, of every field that others determine."""
    model, chunks, files, experts = met["model"], met["chunks"], met["files"], met["model"]["experts"]
    yield "number of entries in layers", len(met["layers"]), model["layers"]
    yield "layers", met["layers"], layer_chunks(model["layers"])
    for name, chunk in chunks.items():
        members = [layer for layer, own in enumerate(met["layers"]) if own == name]
        yield f"chunks.{name}.layers", chunk["layers"], members
        yield f"chunks.{name}.depth", chunk["depth"], list(CHUNKS[name])
        for part in ("base_bytes", "residual_bytes"):
            most = chunk[part] if experts is not None else 0
            yield f"chunks.{name}.expert_{part}", chunk[f"expert_{part}"], min(chunk[f"expert_{part}"], most)
    for part, pinned in (("base_bytes", "bytes"), ("residual_bytes", "residual_bytes")):
        total = met["pinned"][pinned] + sum(chunk[part] for chunk in chunks.values())
        yield f"files.{part}", files[part], total
    total = files["base_bytes"] + files["residual_bytes"] + files["header_bytes"]
    yield "files.total_bytes", files["total_bytes"], total
    estimated = met["source"]["kind"] == "config"
    yield "measured", met["measured"], not estimated
    yield "source.assumed is given", met["source"]["assumed"] is not None, estimated
    on_disk = sum(met["source"]["files"].values())
    yield "sum of source.files", on_disk, 0 if estimated else files["total_bytes"]
    if experts is not None:
        yield "model.experts.active_fraction", experts["active_fraction"], experts["active"] / experts["count"]
    expected = budgets(met)
    yield "set of intents in budgets", sorted(met["budgets"]), sorted(expected)
    for intent, figures in expected.items():
        for name, figure in figures.items():
            yield f"budgets.{intent}.{name}", met["budgets"][intent][name], figure
