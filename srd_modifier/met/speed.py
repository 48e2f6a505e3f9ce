"""How fast a storage is: what the load times of a policy are for."""

import re

from srd_modifier.errors import ConfigError
from srd_modifier.selection.budget import parse_budget

DEFAULT_SPEED = 2 * 10**9
"""Bytes per second of an ordinary NVMe disk."""

_SPEED = re.compile(r"\s*(.*[a-z])\s*/\s*s\s*", re.IGNORECASE)


def parse_speed(text: str) -> int:
    """Bytes per second, of a text such as `2GB/s`, `500MB/s` or `1.5 GiB/s`.

    Raises:
        ConfigError: it is none.

    >>> parse_speed("500MB/s")
    500000000
    """
    found = _SPEED.fullmatch(text)
    try:
        size = parse_budget("budget", found[1]).bytes if found else None
    except ConfigError:
        size = None
    if size is None:
        raise ConfigError(f"storage speed is {text!r}, expected bytes per second such as 2GB/s or 500MB/s")
    return size
