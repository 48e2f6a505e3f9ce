"""The shape of `met.json`: its schema, `met.schema.json` beside this module, and what checks a file by it.

Loading a policy takes no further library: the check here knows the keywords that this one schema uses. It stops at
the first field that is wrong. What no schema can say, that the sums close, `sums` checks.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from srd_modifier.errors import CheckpointError

MET_NAME = "met.json"
FORMAT = "srd-met"
VERSION = 1

_MAX_SHOWN = 60  # characters of a wrong value that an error repeats


def check_schema(values: Any, where: str) -> None:
    """Refuse what the schema refuses.

    Args:
        values: a parsed `met.json`.
        where: what an error calls it, such as the file's name.

    Raises:
        CheckpointError: a field is missing, unknown or out of range, or the version is not this one.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f'{where} is not a hydration policy: its format is not "{FORMAT}"')
    version = values.get("version")
    if version != VERSION or isinstance(version, bool):
        remedy = "upgrade srd-modifier" if isinstance(version, int) and version > VERSION else "write it anew: srd met"
        raise CheckpointError(f"{where}: version is {_shown(version)}, this srd-modifier reads {VERSION}; {remedy}")
    fault = _fault(values, schema(), "")
    if fault is not None:
        raise CheckpointError(f"{where}: {fault}")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12)."""
    return json.loads((Path(__file__).parent / "met.schema.json").read_text(encoding="utf-8"))


def _fault(value: Any, rules: Mapping[str, Any], at: str) -> str | None:
    """What is wrong with a value, beginning with the field's name; None if nothing is."""
    for keyword, argument in rules.items():
        fault = _KEYWORDS[keyword](value, argument, at)
        if fault is not None:
            return fault
    if isinstance(value, dict):
        return _object_fault(value, rules, at)
    if isinstance(value, list) and "items" in rules:
        faults = (_fault(item, rules["items"], f"{at}[{number}]") for number, item in enumerate(value))
        return next(filter(None, faults), None)
    return None


def _object_fault(value: dict[str, Any], rules: Mapping[str, Any], at: str) -> str | None:
    known, others = rules.get("properties", {}), rules.get("additionalProperties", {})
    for name, member in value.items():
        place = f"{at}.{name}" if at else name
        if "propertyNames" in rules and _fault(name, rules["propertyNames"], place):
            return f"{at} has the name {name!r}, which says nothing"
        if name not in known and others is False:
            return f"{place} is unknown, expected one of {', '.join(known)}"
        fault = _fault(member, known.get(name, others), place)
        if fault is not None:
            return fault
    return None


def _type(value: Any, names: str | list[str], at: str) -> str | None:
    expected = [names] if isinstance(names, str) else names
    return None if any(_TYPES[name](value) for name in expected) else _wrong(at, value, " or ".join(expected))


def _reference(value: Any, reference: str, at: str) -> str | None:
    return _fault(value, schema()["$defs"][reference.rpartition("/")[2]], at)


def _required(value: Any, names: list[str], at: str) -> str | None:
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    return f"{f'{at}.{missing[0]}' if at else missing[0]} is missing" if missing else None


def _unique(value: Any, wanted: bool, at: str) -> str | None:
    repeated = wanted and isinstance(value, list) and len({*map(_key, value)}) < len(value)
    return _wrong(at, value, "no entry twice") if repeated else None


def _key(value: Any) -> Any:
    """JSON tells `true` from 1, Python does not."""
    return value if _is_number(value) else json.dumps(value, sort_keys=True)


def _equal(value: Any, expected: Any) -> bool:
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _wrong(at: str, value: Any, expected: str) -> str:
    return f"{at or 'the whole'} is {_shown(value)}, expected {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _limit(kind: Callable[[Any], bool], holds: Callable[[Any, Any], bool], expected: str) -> Callable[..., str | None]:
    """A rule that compares values of one kind with a limit; it has nothing to say about others."""

    def rule(value: Any, limit: Any, at: str) -> str | None:
        return _wrong(at, value, expected.format(limit)) if kind(value) and not holds(value, limit) else None

    return rule


def _nothing(value: Any, argument: Any, at: str) -> None:
    """Of words for people, and of what is looked at together with the members of an object or a list."""


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": _is_integer,
}
_KEYWORDS: dict[str, Callable[[Any, Any, str], str | None]] = {
    "type": _type,
    "$ref": _reference,
    "required": _required,
    "uniqueItems": _unique,
    "const": lambda value, wanted, at: None if _equal(value, wanted) else _wrong(at, value, json.dumps(wanted)),
    "enum": lambda value, wanted, at: (
        None
        if any(_equal(value, one) for one in wanted)
        else _wrong(at, value, f"one of {', '.join(map(str, wanted))}")
    ),
    "pattern": _limit(_TYPES["string"], lambda value, limit: bool(re.search(limit, value)), "text like {}"),
    "minimum": _limit(_is_number, lambda value, limit: value >= limit, "{} or more"),
    "maximum": _limit(_is_number, lambda value, limit: value <= limit, "{} or less"),
    "exclusiveMinimum": _limit(_is_number, lambda value, limit: value > limit, "more than {}"),
    "minItems": _limit(_TYPES["array"], lambda value, limit: len(value) >= limit, "{} entries or more"),
    "maxItems": _limit(_TYPES["array"], lambda value, limit: len(value) <= limit, "{} entries or fewer"),
    "minProperties": _limit(_TYPES["object"], lambda value, limit: len(value) >= limit, "{} or more names"),
    **dict.fromkeys(("properties", "additionalProperties", "propertyNames", "items"), _nothing),
    **dict.fromkeys(("$schema", "$defs", "title", "description"), _nothing),
}
