import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.residual import WHOLE_ROW, ResidualFormat

BAD_FIELDS = [
    ("bits", 7, r"bits is 7, expected one of \(8, 6, 5, 4, 3, 2, 1\)"),
    ("bits", 0, "bits is 0"),
    ("bits", 16, "bits is 16"),
    ("bits", "8", "bits is '8'"),
    ("bits", None, "bits is None"),
    ("bits", True, "bits is True"),
    ("bits", 4.0, r"bits is 4\.0"),
    ("group_size", 0, "group_size is 0, expected 8 or more columns"),
    ("group_size", 7, "group_size is 7"),
    ("group_size", -2, "group_size is -2, .* or -1 for the whole row"),
    ("group_size", 64.0, r"group_size is 64\.0"),
    ("group_size", "64", "group_size is '64'"),
    ("group_size", None, "group_size is None"),
    ("rounding", "up", r"rounding is 'up', expected one of \('nearest', 'stochastic', 'dithered', 'feedback'\)"),
    ("rounding", None, "rounding is None"),
    ("rounding", ["nearest"], "rounding is "),
    ("density", 0.0, r"density is 0\.0, expected above 0 and at most 1"),
    ("density", -0.5, r"density is -0\.5"),
    ("density", 1.5, r"density is 1\.5"),
    ("density", float("nan"), "density is nan"),
    ("density", "0.5", r"density is '0\.5'"),
    ("density", None, "density is None"),
    ("scale_dtype", "float16", r"scale_dtype is 'float16', expected one of \('bfloat16', 'float32'\)"),
    ("scale_dtype", torch.float32, r"scale_dtype is torch\.float32"),
    ("scale_dtype", ["float32"], "scale_dtype is "),
    ("seed", -1, r"seed is -1, expected a whole number from 0 to 2\*\*63 - 1"),
    ("seed", 2**63, "seed is 9223372036854775808"),
    ("seed", 1.0, r"seed is 1\.0"),
    ("seed", None, "seed is None"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS, ids=lambda part: repr(part)[:24])
def test_a_bad_field_is_named_with_its_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResidualFormat(**{field: value})


def test_the_error_is_a_value_error_and_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SRDError)


def test_the_defaults_are_the_name_of_the_method() -> None:
    assert ResidualFormat().to_dict() == {
        "bits": 8,
        "group_size": 64,
        "rounding": "nearest",
        "density": 1.0,
        "scale_dtype": "bfloat16",
        "seed": 0,
    }


@pytest.mark.parametrize(
    "values",
    [{}, {"bits": 3, "density": 1}, {"group_size": 8, "seed": 2**63 - 1}, {"group_size": -1, "scale_dtype": "float32"}],
)
def test_dict_round_trip_through_json(values: dict[str, Any]) -> None:
    fmt = ResidualFormat.from_dict(values)
    assert ResidualFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


def test_from_dict_names_the_unknown_key_and_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown residual setting 'groupsize'; known are \['bits', 'density'"):
        ResidualFormat.from_dict({"bits": 8, "groupsize": 64})


def test_from_dict_checks_the_values_too() -> None:
    with pytest.raises(ConfigError, match="bits is 7"):
        ResidualFormat.from_dict({"bits": 7})


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        ResidualFormat().bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        ResidualFormat(8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("group_size", "in_features", "columns", "groups"),
    [(64, 128, 64, 2), (64, 129, 64, 3), (64, 63, 64, 1), (64, 1, 64, 1), (8, 17, 8, 3), (WHOLE_ROW, 4097, 4097, 1)],
)
def test_groups(group_size: int, in_features: int, columns: int, groups: int) -> None:
    fmt = ResidualFormat(group_size=group_size)
    assert fmt.columns_per_group(in_features) == columns
    assert fmt.groups(in_features) == groups


@pytest.mark.parametrize(
    ("density", "kept"), [(1.0, 1000), (0.5, 500), (0.1, 100), (0.0014, 1), (0.0016, 2), (1e-9, 1), (0.9999, 1000)]
)
def test_kept_is_the_rounded_share_and_at_least_one(density: float, kept: int) -> None:
    assert ResidualFormat(density=density).kept(10, 100) == kept


def test_only_a_density_below_one_is_sparse() -> None:
    assert not ResidualFormat(density=1.0).sparse
    assert not ResidualFormat(density=1).sparse
    assert ResidualFormat(density=0.999).sparse


@pytest.mark.parametrize(
    ("settings", "codes", "scale", "mask"),
    [
        ({}, (torch.int8, (5, 100)), (torch.bfloat16, (5, 2)), None),
        ({"scale_dtype": "float32", "group_size": 32}, (torch.int8, (5, 100)), (torch.float32, (5, 4)), None),
        ({"bits": 4}, (torch.uint8, (5, 50)), (torch.bfloat16, (5, 2)), None),
        ({"bits": 3, "group_size": -1}, (torch.uint8, (5, 38)), (torch.bfloat16, (5, 1)), None),
        ({"bits": 2}, (torch.uint8, (5, 25)), (torch.bfloat16, (5, 2)), None),
        ({"bits": 6}, (torch.uint8, (5, 75)), (torch.bfloat16, (5, 2)), None),
        ({"bits": 5}, (torch.uint8, (5, 63)), (torch.bfloat16, (5, 2)), None),
        ({"bits": 1}, (torch.uint8, (5, 13)), (torch.bfloat16, (5, 2)), None),
        ({"density": 0.1}, (torch.int8, (1, 50)), (torch.bfloat16, (5, 2)), (torch.uint8, (5, 13))),
        ({"density": 0.1, "bits": 3}, (torch.uint8, (1, 19)), (torch.bfloat16, (5, 2)), (torch.uint8, (5, 13))),
    ],
    ids=str,
)
def test_layout_of_5_by_100(settings: dict[str, Any], codes: object, scale: object, mask: object) -> None:
    expected = {"weight_d8": codes, "weight_d8_scale": scale} | ({"weight_d8_mask": mask} if mask else {})
    assert ResidualFormat(**settings).layout(5, 100) == expected


@pytest.mark.parametrize(
    ("settings", "bits_per_weight"),
    [
        ({}, 8.25),
        ({"scale_dtype": "float32"}, 8.5),
        ({"bits": 4}, 4.25),
        ({"bits": 2, "group_size": 128}, 2.125),
        ({"bits": 1, "group_size": 32}, 1.5),
        ({"bits": 4, "density": 0.25}, 2.25),
    ],
    ids=str,
)
def test_bytes_per_weight(settings: dict[str, Any], bits_per_weight: float) -> None:
    assert ResidualFormat(**settings).bytes(1024, 4096) * 8 == bits_per_weight * 1024 * 4096
