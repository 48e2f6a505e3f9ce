import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.selection.patterns import matches, matches_any, pattern_value

NAME = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NAME, True),
        ("re:.*down_proj", True),
        ("re:.*down_proj$", True),
        (r"re:model\.layers\.3\.", True),
        ("re:", True),
        ("down_proj", False),
        ("re:down_proj", False),
        ("re:.*mlp$", False),
        (".*down_proj", False),
        ("Linear", False),
        ("", False),
        ("RE:.*", False),
    ],
)
def test_a_name_is_itself_and_a_regex_matches_from_the_start(pattern: str, expected: bool) -> None:
    assert matches(NAME, pattern) is expected


def test_the_dots_of_a_plain_name_are_not_wildcards() -> None:
    assert not matches("modelXlayers", "model.layers")


def test_matches_any() -> None:
    assert matches_any(NAME, ["lm_head", "re:.*down_proj"])
    assert not matches_any(NAME, ["lm_head", "re:.*up_proj"])
    assert not matches_any(NAME, [])


def test_pattern_value_takes_the_first_match_in_order() -> None:
    values = {"re:.*down_proj": 0.25, NAME: 0.75}
    assert pattern_value(NAME, values, 1.0) == 0.25
    assert pattern_value(NAME, dict(reversed(values.items())), 1.0) == 0.75


def test_pattern_value_of_zero_is_a_value() -> None:
    assert pattern_value(NAME, {NAME: 0.0}, 1.0) == 0.0


def test_pattern_value_falls_back_to_the_default() -> None:
    assert pattern_value("lm_head", {"re:.*down_proj": 0.25}, 0.5) == 0.5
    assert pattern_value("lm_head", {}, 0.5) == 0.5


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the pattern 're:\(' is not a regular expression: missing \)"):
        matches(NAME, "re:(")
