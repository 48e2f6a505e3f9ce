"""Module names and patterns, with the rule of compressed-tensors: a name is itself, `re:` starts a regex."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from srd_modifier.errors import ConfigError


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is `name`, or is `re:` followed by a regular expression that matches from its start."""
    if pattern.startswith("re:"):
        return _compiled(pattern).match(name) is not None
    return pattern == name


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches."""
    return any(matches(name, pattern) for pattern in patterns)


def pattern_value(name: str, values: Mapping[str, float], default: float) -> float:
    """The value of the first pattern that matches `name`, else the default."""
    return next((value for pattern, value in values.items() if matches(name, pattern)), default)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
