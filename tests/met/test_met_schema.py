import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from srd_modifier.errors import CheckpointError
from srd_modifier.met import Policy, build_met, estimate_met
from srd_modifier.met.schema import _KEYWORDS, check_schema, schema
from srd_modifier.met.sums import check_met
from srd_modifier.selection.depth import CHUNKS

VALUES = [None, True, -1, 0, 1, 1.0, 1.5, 2**64, "", " ", "x", "early", [], [0], ["early"], ["early"] * 2, {}, {"x": 1}]


@pytest.fixture(scope="module")
def mixed(mixture_checkpoint) -> dict[str, Any]:
    """The policy file of a mixture, with one intent."""
    return build_met(mixture_checkpoint, policy=Policy({"AUDIT": ("early", "governance")}))


@pytest.fixture(scope="module")
def estimated(tiny_llama) -> dict[str, Any]:
    return estimate_met(tiny_llama, group_size=64, policy=Policy({"AUDIT": ("early",)}))


def places(value: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """Where every value is, of a list only the first entry."""
    yield above
    members = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, member in members:
        yield from places(member, *above, name)


def follow(value: Any, place: Any) -> Any:
    for step in place:
        value = value[step]
    return value


def changed(met: dict[str, Any]) -> Iterator[Any]:
    """The file with one value replaced, removed or added, in every place."""
    for *above, name in filter(None, places(met)):
        for value in [*VALUES, ...]:
            other = copy.deepcopy(met)
            holder = other
            for step in above:
                holder = holder[step]
            if value is ...:
                del holder[name]
            else:
                holder[name] = value
            yield other
            if isinstance(holder, dict) and value is ...:
                yield {**met, name: 1}


@pytest.mark.parametrize("file", ["mixed", "estimated"])
def test_the_check_says_what_an_independent_one_says(file, request):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    met = request.getfixturevalue(file)
    verdicts = {True: 0, False: 0}
    for other in [met, None, [], *changed(met)]:
        try:
            check_schema(other, "met.json")
            valid = True
        except CheckpointError:
            valid = False
        assert valid is validator.is_valid(other), json.dumps(other)
        verdicts[valid] += 1
    assert min(verdicts.values()) > 100  # both happen


def test_no_changed_figure_is_taken(mixture_checkpoint):
    """Whatever the schema lets through, no number of bytes, no time and no layer can be another."""
    met = build_met(mixture_checkpoint, policy=Policy({"AUDIT": ("early",), "HARM": tuple(CHUNKS)}))
    figures = [place for place in places(met) if place and isinstance(follow(met, place), int | float)]
    assert len(figures) > 40
    for *above, name in figures:
        other = copy.deepcopy(met)
        follow(other, above)[name] = 2 * follow(met, above)[name] + 7  # less is lost in rounding
        with pytest.raises(CheckpointError):
            check_met(other, "met.json")


def test_the_schema_uses_no_keyword_that_is_not_checked():
    def keywords(rules: dict[str, Any]) -> Iterator[str]:
        yield from rules
        for name in ("properties", "$defs"):
            for inner in rules.get(name, {}).values():
                yield from keywords(inner)
        for name in ("items", "propertyNames", "additionalProperties"):
            if isinstance(rules.get(name), dict):
                yield from keywords(rules[name])

    assert set(keywords(schema())) <= _KEYWORDS.keys()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), None, 'met.json is not a hydration policy: its format is not "srd-met"'),
        (("format",), "other", 'met.json is not a hydration policy: its format is not "srd-met"'),
        (("version",), 2, "met.json: version is 2, this srd-modifier reads 1; upgrade srd-modifier"),
        (("version",), "1", 'met.json: version is "1", this srd-modifier reads 1; write it anew: srd met'),
        (("version",), 0, "met.json: version is 0, this srd-modifier reads 1; write it anew: srd met"),
        (("measured",), 1, "met.json: measured is 1, expected boolean"),
        (("extra",), 1, "met.json: extra is unknown, expected one of format, version, measured, source"),
        (("chunks", "early", "base_bytes"), -1, "met.json: chunks.early.base_bytes is -1, expected 0 or more"),
        (("chunks", "late"), {}, "met.json: chunks.late is unknown, expected one of early, factual"),
        (("layers", 3), "late", 'met.json: layers[3] is "late", expected one of early, factual, reasoning, governance'),
        (
            ("hydration", "AUDIT"),
            ["early"] * 2,
            'met.json: hydration.AUDIT is ["early", "early"], expected no entry tw',
        ),
        (("hydration",), {}, "met.json: hydration is {}, expected 1 or more names"),
        (("hydration", " "), [], "met.json: hydration has the name ' ', which says nothing"),
        (("chunks", "early", "depth"), [0.0], "met.json: chunks.early.depth is [0.0], expected 2 entries or more"),
        (("model", "experts"), {"count": 1}, "met.json: model.experts.active is missing"),
        (
            ("pinned",),
            [*range(30)],
            "met.json: pinned is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1..., exp",
        ),
        (("storage", "bytes_per_second"), 10**30, "met.json: storage.bytes_per_second is 1000000000000000000000000"),
    ],
)
def test_a_fault_is_named_with_its_field(place, value, message, mixed):
    met = copy.deepcopy(mixed)
    if place:
        follow(met, place[:-1])[place[-1]] = value
    else:
        met = value
    with pytest.raises(CheckpointError) as caught:
        check_schema(met, "met.json")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.layers", 10**15, "met.json: number of entries in layers is 10, expected 1000000000000000 from the oth"),
        ("layers", ["early"] * 10, "met.json: layers is ['early', 'early', "),
        (
            "chunks.early.layers",
            [1, 0],
            "met.json: chunks.early.layers is [1, 0], expected [0, 1] from the other fields",
        ),
        ("chunks.early.depth", [0.0, 0.5], "met.json: chunks.early.depth is [0.0, 0.5], expected [0.0, 0.2]"),
        (
            "chunks.early.expert_base_bytes",
            2**60,
            "met.json: chunks.early.expert_base_bytes is 1152921504606846976, exp",
        ),
        ("pinned.bytes", 0, "met.json: files.base_bytes is "),
        ("files.header_bytes", 0, "met.json: files.total_bytes is "),
        ("measured", False, "met.json: measured is False, expected True from the other fields"),
        ("source.assumed", None, "met.json: source.assumed is given is False, expected True"),
        ("source.files", {}, "met.json: sum of source.files is 0, expected "),
        (
            "model.experts.active_fraction",
            0.5,
            "met.json: model.experts.active_fraction is 0.5, expected 0.3333333333333",
        ),
        ("hydration.AUDIT", [], "met.json: budgets.AUDIT.memory_bytes is "),
        ("hydration.OTHER", [], "met.json: set of intents in budgets is ['AUDIT'], expected ['AUDIT', 'OTHER']"),
        ("budgets.AUDIT.load_seconds", 0, "met.json: budgets.AUDIT.load_seconds is 0, expected 0.00"),
    ],
)
def test_a_contradiction_is_named(place, value, message, mixed, estimated):
    met = copy.deepcopy(estimated if place == "source.assumed" else mixed)
    *above, name = place.split(".")
    follow(met, above)[name] = value
    with pytest.raises(CheckpointError) as caught:
        check_met(met, "met.json")
    assert str(caught.value).startswith(message)


def test_experts_without_a_mixture_are_a_contradiction(mixed):
    met = copy.deepcopy(mixed)
    met["model"]["experts"] = None
    with pytest.raises(CheckpointError, match=r"chunks\.early\.expert_base_bytes is \d+, expected 0"):
        check_met(met, "met.json")
