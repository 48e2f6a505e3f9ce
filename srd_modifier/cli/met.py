"""`srd met`: which residual is loaded for which intent, and what that costs."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from srd_modifier.met import Policy
    from srd_modifier.transformers.measure import Measured


class DtypeName(str, Enum):
    """What the model computes in while hydration is measured."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def met(
    model: Annotated[
        str | None, typer.Argument(metavar="DIR|FILE.gguf", help="Checkpoint directory, hub id, or GGUF file.")
    ] = None,
    estimate: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Instead of a model: compute the bytes from a config.json or its folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Policy file to make.", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="P.yaml", help="Chunks of each intent, instead of the default policy.")
    ] = None,
    storage_speed: Annotated[
        str, typer.Option(help="What the load times are for, such as 500MB/s.", metavar="SPEED")
    ] = "2GB/s",
    group_size: Annotated[
        int, typer.Option(help="With --estimate: columns per scale of the 4-bit weights, -1 for the row.")
    ] = 128,
    residual_bits: Annotated[int, typer.Option(help="With --estimate: width of the residual, 0 for none.")] = 8,
    residual_group_size: Annotated[
        int, typer.Option(help="With --estimate: columns per scale of the residual, -1 for the row.")
    ] = 64,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and hydrate it for each intent: memory and time.")
    ] = False,
    intent: Annotated[list[str] | None, typer.Option(help="With --measure: only this intent; repeat for more.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="With --measure: what the weights become.")] = DtypeName.bfloat16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Write the hydration policy of a model, with memory and load time of every intent."""
    _check_usage(model, estimate, intent, measure=measure, shown=as_json or output is not None)
    from srd_modifier.met.policy import Policy
    from srd_modifier.met.speed import parse_speed

    speed = parse_speed(storage_speed)
    given = None if policy is None else Policy.from_yaml(policy)
    if output is not None:
        from srd_modifier.checkpoint.atomic import refuse_existing_file

        refuse_existing_file(output, overwrite=overwrite)
    measured: list[Measured] | None = None
    if model is None:
        assert estimate is not None
        values = _estimate(
            estimate, given, speed, group_size=group_size, bits=residual_bits, residual_group_size=residual_group_size
        )
    else:
        from srd_modifier.met.document import build_met

        path = _find(model)
        if measure:
            measured, given = _measure(path, given, intent, dtype)
        values = build_met(path, policy=given, storage_speed=speed)
    if output is not None:
        from srd_modifier.checkpoint.atomic import write_text
        from srd_modifier.met.document import encode_met

        write_text(output, encode_met(values).decode())
    if as_json:
        printed = values if measured is None else {"met": values, "hydration": [asdict(one) for one in measured]}
        typer.echo(json.dumps(printed, indent=2))
        return
    console = Console()
    for table in (_chunk_table(values), _intent_table(values)):
        console.print(table)
    if measured is not None:
        console.print(_measured_table(measured, dtype))
    if output is not None:
        console.print(f"wrote {output}", soft_wrap=True)


def _check_usage(
    model: str | None, estimate: Path | None, intent: list[str] | None, *, measure: bool, shown: bool
) -> None:
    if (model is None) == (estimate is None):
        raise typer.BadParameter("give either a checkpoint or GGUF file, or --estimate a config")
    if measure and model is None:
        raise typer.BadParameter("--measure loads a checkpoint: give its directory instead of --estimate")
    if intent and not measure:
        raise typer.BadParameter("--intent chooses what --measure does: give --measure too")
    if not shown and not measure:
        raise typer.BadParameter("give --output a file, or --json or --measure to print only")


def _find(model: str) -> Path:
    if model.endswith(".gguf"):
        return Path(model)
    from srd_modifier.checkpoint.locate import find_model

    return find_model(model, fetch_weights=True)


def _estimate(
    config: Path, policy: "Policy | None", speed: int, *, group_size: int, bits: int, residual_group_size: int
) -> dict[str, Any]:
    from srd_modifier.met.document import estimate_met
    from srd_modifier.residual import ResidualFormat

    residual = ResidualFormat(bits=bits, group_size=residual_group_size) if bits else None
    return estimate_met(config, group_size=group_size, residual=residual, policy=policy, storage_speed=speed)


def _measure(
    path: Path, given: "Policy | None", intents: list[str] | None, dtype: DtypeName
) -> "tuple[list[Measured], Policy]":
    """What hydrating takes, for all intents or those asked for, and the policy: that given, else the checkpoint's."""
    import torch

    from srd_modifier.errors import ConfigError
    from srd_modifier.met.policy import Policy, policy_of

    if not path.is_dir():
        raise ConfigError(f"{path} is a GGUF file, which has no residual to hydrate; --measure takes an SRD checkpoint")
    policy = given or policy_of(path)
    chosen = policy if not intents else Policy({name: policy.chunks(name) for name in intents})
    from srd_modifier.cli._quiet import hide_bars
    from srd_modifier.transformers.measure import measure_hydration

    hide_bars()
    return measure_hydration(path, chosen, dtype=getattr(torch, dtype.value)), policy


def _chunk_table(met: dict[str, Any]) -> Table:
    """One row for each chunk and for what is always in memory, and their total."""
    model, files, experts = met["model"], met["files"], met["model"]["experts"]
    kind = f"{model['architecture']}, {model['layers']} layers"
    if experts is not None:
        kind += f", {experts['active']} of {experts['count']} experts to a token"
    table = Table(
        title=f"{kind}: {_origin(met)}",
        caption=_note(met),
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("chunk", "depth", "layers", "base bytes", "residual bytes"):
        table.add_column(heading, justify="right" if "bytes" in heading else "left")
    if experts is not None:
        table.add_column("of these experts", justify="right")
    for name, chunk in met["chunks"].items():
        start, end = chunk["depth"]
        expert = chunk["expert_base_bytes"] + chunk["expert_residual_bytes"]
        table.add_row(
            name,
            f"{start:.0%} - {end:.0%}",
            _span(chunk["layers"]),
            f"{chunk['base_bytes']:,}",
            f"{chunk['residual_bytes']:,}",
            *([] if experts is None else [f"{expert:,}"]),
        )
    pinned = met["pinned"]
    table.add_row("pinned", "", "outside", f"{pinned['bytes']:,}", f"{pinned['residual_bytes']:,}")
    table.add_section()
    table.add_row("all", "", str(model["layers"]), f"{files['base_bytes']:,}", f"{files['residual_bytes']:,}")
    return table


def _origin(met: dict[str, Any]) -> str:
    assumed = met["source"]["assumed"]
    if assumed is None:
        return "measured"
    residual = assumed["residual"]
    text = f"ESTIMATE from a config, W4A16 in groups of {assumed['group_size']}"
    if residual is None:
        return f"{text}, no residual"
    return f"{text}, {residual['bits']}-bit residual in groups of {residual['group_size']}"


def _note(met: dict[str, Any]) -> str:
    if not met["measured"]:
        note = "estimated from shapes, headers left out; measure the checkpoint once it is there"
        left = met["source"]["assumed"]["undivided"]
        return (
            f"{note}; the group does not divide the columns of {left} weights, which stay as they are" if left else note
        )
    files = met["files"]
    note = f"with {files['header_bytes']:,} bytes of headers and indexes, {files['total_bytes']:,} bytes on disk"
    if met["source"]["kind"] == "gguf":
        return f"{note}; a GGUF file has no residual, so every intent takes the same"
    return note if files["residual_bytes"] else f"{note}; there is no residual, so every intent takes the same"


def _span(layers: list[int]) -> str:
    if not layers:
        return "none"
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} - {layers[-1]}"


def _intent_table(met: dict[str, Any]) -> Table:
    speed = met["storage"]["bytes_per_second"]
    prefix = "" if met["measured"] else "ESTIMATE: "
    table = Table(
        title=f"{prefix}memory and time of each intent, from a storage of {speed / 1e6:,.0f} MB/s",
        caption="memory as stored; load: all of it, cold; hydrate: the residual over a base in memory",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("intent", overflow="fold")
    table.add_column("chunks", overflow="fold")
    for heading in ("memory bytes", "residual bytes", "load", "hydrate"):
        table.add_column(heading, justify="right")
    mixture = met["model"]["experts"] is not None
    if mixture:
        table.add_column("bytes to a token", justify="right")
    for intent, names in met["hydration"].items():
        budget = met["budgets"][intent]
        table.add_row(
            intent,
            _names(names, met["chunks"]),
            f"{budget['memory_bytes']:,}",
            f"{budget['residual_bytes']:,}",
            _time(budget["load_seconds"]),
            _time(budget["hydrate_seconds"]),
            *([f"{budget['active_bytes_per_token']:,}"] if mixture else []),
        )
    return table


def _measured_table(measured: "list[Measured]", dtype: DtypeName) -> Table:
    from srd_modifier.selection.depth import CHUNKS

    table = Table(
        title=f"measured while hydrating, in {dtype.value}",
        caption="time: from plain W4, files in the page cache; before, peak, after: resident MB",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("intent", overflow="fold")
    table.add_column("chunks", overflow="fold")
    for heading in ("residual bytes", "time", "before", "peak", "after"):
        table.add_column(heading, justify="right")
    for one in measured:
        memory = (one.resident_bytes_before, one.resident_bytes_peak, one.resident_bytes_after)
        table.add_row(
            one.intent,
            _names([*one.chunks], CHUNKS),
            f"{one.residual_bytes:,}",
            _time(one.seconds),
            *("-" if resident is None else f"{resident / 1e6:,.1f}" for resident in memory),
        )
    return table


def _names(chunks: list[str], every: dict[str, Any]) -> str:
    return "all" if len(chunks) == len(every) else ", ".join(chunks) or "none"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1000:,.2f} ms"
