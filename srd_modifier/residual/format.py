"""The settings of one module's residual, and what they cost in bytes."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from srd_modifier.errors import ConfigError

WHOLE_ROW = -1
"""Group size of one scale per output row."""

BITS = (8, 6, 5, 4, 3, 2, 1)
ROUNDINGS = ("nearest", "stochastic", "dithered", "feedback")

# float16 is left out on purpose: S8 is about S4 / 250, below float16's normal range for real models, where its step is
# a fixed 6e-8. With weights of standard deviation 0.02 it adds 0.3 % to the residual's error and bfloat16 1.2 %, but
# at 0.0002 it adds 11 % and at 0.00002 it doubles the error, while bfloat16 stays at 1.2 % everywhere
# (tests/residual/test_codec.py).
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ResidualFormat:
    """How the residual of one Linear weight `[out_features, in_features]` is stored.

    Attributes:
        bits: width of a code, 8 or 6 to 1. 8-bit codes are whole numbers of the scale from -127 to 127;
            narrower ones are half-integers, symmetric around zero, of which every one is used.
        group_size: columns that share a scale; the last group of a row may be shorter. `WHOLE_ROW` (-1) is
            one scale per row.
        rounding: `nearest` has the least error. `stochastic` is unbiased. `dithered` adds uniform noise
            before rounding and removes it on decoding, so that the error is independent of the residual.
            `feedback` is an encoder's choice and decodes exactly like `nearest`: codes and scales are chosen
            by what they do to the layer's output, which takes the layer's Hessian (`encode_calibrated`).
        density: share of entries that are kept, in (0, 1]; below 1 a bitmask says which.
        scale_dtype: `bfloat16` or `float32`.
        seed: of the noise of `stochastic` and `dithered`; the module's name is mixed in.

    Raises:
        ConfigError: naming the field, the value and what is accepted.
    """

    bits: int = 8
    group_size: int = 64
    rounding: str = "nearest"
    density: float = 1.0
    scale_dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        _require("bits", self.bits, type(self.bits) is int and self.bits in BITS, f"one of {BITS}")
        _require(
            "group_size",
            self.group_size,
            type(self.group_size) is int and (self.group_size >= 8 or self.group_size == WHOLE_ROW),
            "8 or more columns (32, 64 and 128 are usual), or -1 for the whole row",
        )
        _require("rounding", self.rounding, self.rounding in ROUNDINGS, f"one of {ROUNDINGS}")
        _require(
            "density", self.density, _is_number(self.density) and 0.0 < self.density <= 1.0, "above 0 and at most 1"
        )
        _require(
            "scale_dtype", self.scale_dtype, self.scale_dtype in tuple(SCALE_DTYPES), f"one of {tuple(SCALE_DTYPES)}"
        )
        _require(
            "seed",
            self.seed,
            type(self.seed) is int and 0 <= self.seed < 2**63,
            "a whole number from 0 to 2**63 - 1",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ResidualFormat":
        """The format with these fields; a key that is not one of them is an error."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"unknown residual setting {unknown[0]!r}; known are {sorted(cls.__dataclass_fields__)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch knows it."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def label(self) -> str:
        """In a few words, for people."""
        group = "one scale per row" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        kept = f", {self.density:.0%} of the entries" if self.sparse else ""
        return f"{self.bits}-bit, {group}, {self.rounding}, {self.scale_dtype} scales{kept}"

    @property
    def sparse(self) -> bool:
        """Whether a bitmask says which entries are kept."""
        return self.density < 1.0

    @property
    def rows_are_independent(self) -> bool:
        """Whether `encode` of some rows on their own gives the same codes: no noise to draw, no entries to choose.

        False for `feedback`, which `encode` cannot do at all.
        """
        return self.rounding == "nearest" and not self.sparse

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share a scale in a weight of this width."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def groups(self, in_features: int) -> int:
        """Scales per row: `ceil(in_features / group_size)`."""
        return math.ceil(in_features / self.columns_per_group(in_features))

    def kept(self, out_features: int, in_features: int) -> int:
        """Entries that are kept in a weight of this shape; at least one."""
        return max(1, round(self.density * out_features * in_features))

    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every stored tensor, by its suffix in the sidecar.

        Dense 8-bit codes are int8 `[out, in]`; narrower ones are packed per row into uint8
        `[out, ceil(in * bits / 8)]`. Sparse codes are one row of the kept entries in row-major order, with a
        uint8 mask `[out, ceil(in / 8)]`, least significant bit first.
        """
        rows, columns = (1, self.kept(out_features, in_features)) if self.sparse else (out_features, in_features)
        code_dtype = torch.int8 if self.bits == 8 else torch.uint8
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_d8": (code_dtype, (rows, math.ceil(columns * self.bits / 8))),
            "weight_d8_scale": (self.torch_scale_dtype, (out_features, self.groups(in_features))),
        }
        if self.sparse:
            layout["weight_d8_mask"] = (torch.uint8, (out_features, math.ceil(in_features / 8)))
        return layout

    def bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the residual's tensors on disk: codes, scales and mask."""
        return sum(
            dtype.itemsize * math.prod(shape) for dtype, shape in self.layout(out_features, in_features).values()
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(field: str, value: object, accepted: bool, expected: str) -> None:
    if not accepted:
        raise ConfigError(f"{field} is {value!r}, expected {expected}")
