import pytest

from srd_modifier.errors import ConfigError
from srd_modifier.met.speed import parse_speed


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("2GB/s", 2_000_000_000),
        ("500MB/s", 500_000_000),
        (" 1.5 GiB / s ", 1_610_612_736),
        ("7 bytes/s", 7),
        ("3gb/S", 3_000_000_000),
    ],
)
def test_a_speed(text, speed):
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["", "2GB", "2/s", "fast", "0MB/s", "-1MB/s", "2GB/m", "4bpw/s", "1e3GB/s", "GB/s"])
def test_what_is_no_speed_is_refused(text):
    with pytest.raises(ConfigError, match="expected bytes per second such as 2GB/s or 500MB/s"):
        parse_speed(text)
