"""ggml's quantized blocks taken apart and put together: codes, scales and mins instead of bytes.

`unpack` and `pack` are each other's inverse, for the types whose codes can be chosen by something else than ggml's own
search. The layouts are those of ggml's `block_q4_0` and so on; the tests hold them against `gguf`'s numpy code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srd_modifier.gguf.ggml import GGMLType


@dataclass(frozen=True)
class BlockLayout:
    """What a type's codes can be.

    Attributes:
        block: weights per block.
        group: weights that share a scale; a block of the K-quants has several groups.
        low: least level.
        high: greatest level.
        scale_codes: least and greatest code of a group's scale in units of the block's; None where a block is one
            group, whose scale is the block's.
        has_min: whether a group has a min, which is subtracted.
    """

    block: int
    group: int
    low: int
    high: int
    scale_codes: tuple[int, int] | None = None
    has_min: bool = False

    @property
    def groups_per_block(self) -> int:
        """Groups of a block."""
        return self.block // self.group


LAYOUTS = {
    GGMLType.Q4_0: BlockLayout(32, 32, -8, 7),
    GGMLType.Q4_1: BlockLayout(32, 32, 0, 15, has_min=True),
    GGMLType.Q5_0: BlockLayout(32, 32, -16, 15),
    GGMLType.Q5_1: BlockLayout(32, 32, 0, 31, has_min=True),
    GGMLType.Q8_0: BlockLayout(32, 32, -127, 127),
    GGMLType.Q4_K: BlockLayout(256, 32, 0, 15, (0, 63), has_min=True),
    GGMLType.Q5_K: BlockLayout(256, 32, 0, 31, (0, 63), has_min=True),
    GGMLType.Q6_K: BlockLayout(256, 16, -32, 31, (-128, 127)),
}
"""The types that can be packed here."""


@dataclass(frozen=True)
class Blocks:
    """A matrix in the numbers of its blocks: `weight = scale * scale_code * level - min * min_code`.

    Attributes:
        levels: int8 `[out, in]`, from the layout's `low` to its `high`.
        scale: float16 `[out, in / block]`.
        scale_codes: int16 `[out, in / group]`, or None if a block is one group: all 1.
        min: float16 `[out, in / block]`, or None if the type has no mins.
        min_codes: int16 `[out, in / group]`; None as `scale_codes` and `min`.
    """

    levels: Tensor
    scale: Tensor
    scale_codes: Tensor | None = None
    min: Tensor | None = None
    min_codes: Tensor | None = None

    def group_scales(self) -> Tensor:
        """Float32 `[out, in / group]`: what a level of 1 stands for."""
        return _per_group(self.scale, self.scale_codes)

    def group_mins(self) -> Tensor:
        """Float32 `[out, in / group]`: what is subtracted; 0 where the type has no mins."""
        if self.min is None:
            return torch.zeros_like(self.group_scales())
        return _per_group(self.min, self.min_codes)

    def dequantize(self) -> Tensor:
        """Float32 `[out, in]`, in the order of ggml's operations."""
        scale, low = self.group_scales(), self.group_mins()
        columns = self.levels.shape[1] // scale.shape[1]
        return self.levels * scale.repeat_interleave(columns, dim=1) - low.repeat_interleave(columns, dim=1)

    def to(self, device: torch.device) -> "Blocks":
        """The same numbers on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, rows: slice) -> "Blocks":
        """Some rows of the matrix."""
        return self._map(lambda tensor: tensor[rows])

    @classmethod
    def stack(cls, parts: Sequence["Blocks"]) -> "Blocks":
        """The matrix that has the rows of all parts, one after the other."""
        names = [name for name, tensor in vars(parts[0]).items() if tensor is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Blocks":
        return Blocks(**{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})


def pack(blocks: Blocks, ggml_type: GGMLType) -> Tensor:
    """The bytes of `blocks`, uint8 `[out, row_bytes]` on their device.

    Raises:
        ValueError: a level or a code is outside of what the type can hold, there are no mins where it takes some or
            the other way round, or it is none of `LAYOUTS`.
    """
    layout = _layout(ggml_type)
    _check(blocks, ggml_type, layout)
    rows = len(blocks.levels)
    # unsigned, as stored
    codes = (blocks.levels.to(torch.int16) - min(layout.low, 0)).view(rows, -1, layout.block)
    scale = _bytes_of(blocks.scale)
    if ggml_type is GGMLType.Q8_0:
        parts = [scale, blocks.levels.view(torch.uint8).view(rows, -1, 32)]
    elif ggml_type is GGMLType.Q4_0:
        parts = [scale, _join_nibbles(codes, 16)]
    elif ggml_type is GGMLType.Q4_1:
        assert blocks.min is not None
        parts = [scale, _bytes_of(-blocks.min), _join_nibbles(codes, 16)]
    elif ggml_type in (GGMLType.Q5_0, GGMLType.Q5_1):
        low = [] if blocks.min is None else [_bytes_of(-blocks.min)]
        parts = [scale, *low, _join_bits((codes >> 4).unflatten(-1, (4, 8))), _join_nibbles(codes & 15, 16)]
    elif ggml_type in (GGMLType.Q4_K, GGMLType.Q5_K):
        assert blocks.scale_codes is not None
        assert blocks.min is not None
        assert blocks.min_codes is not None
        parts = [scale, _bytes_of(blocks.min), _join_six_bits(blocks.scale_codes, blocks.min_codes)]
        if ggml_type is GGMLType.Q5_K:
            # bit j of byte i is the fifth bit of the i-th weight of group j
            parts.append(_join_bits((codes >> 4).unflatten(-1, (8, 32)).transpose(-1, -2)))
        parts.append(_join_nibbles(codes & 15, 32))
    else:
        assert blocks.scale_codes is not None
        high = (codes >> 4).unflatten(-1, (2, 4, 32))
        parts = [
            _join_nibbles(codes & 15, 64),
            (high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6).flatten(-2),
            blocks.scale_codes.to(torch.int8).view(torch.uint8).view(rows, -1, 16),
            scale,
        ]
    return torch.cat([part.to(torch.uint8) for part in parts], dim=-1).flatten(1)


def unpack(data: Tensor, ggml_type: GGMLType) -> Blocks:
    """The numbers in `data` uint8 `[out, row_bytes]`.

    Raises:
        ValueError: the rows are not whole blocks, or the type is none of `LAYOUTS`.
    """
    layout = _layout(ggml_type)
    if data.dim() != 2 or data.dtype != torch.uint8 or data.shape[1] % ggml_type.block_bytes:
        raise ValueError(f"expected rows of whole {ggml_type.value} blocks, got {data.dtype} {tuple(data.shape)}")
    block = data.view(len(data), -1, ggml_type.block_bytes)
    if ggml_type is GGMLType.Q6_K:
        low, high, scale_codes, scale = block.split([128, 64, 16, 2], dim=-1)
        high = high.unflatten(-1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], device=data.device).to(torch.uint8)[:, None]
        codes = _split_nibbles(low, 64) | (high & 3).flatten(-3) << 4
        return Blocks(
            _levels(codes, layout), _halves(scale), scale_codes.contiguous().view(torch.int8).flatten(1).to(torch.int16)
        )
    if ggml_type is GGMLType.Q8_0:
        scale, levels = block.split([2, 32], dim=-1)
        return Blocks(levels.contiguous().view(torch.int8).flatten(1), _halves(scale))
    if ggml_type is GGMLType.Q4_0:
        scale, low = block.split([2, 16], dim=-1)
        return Blocks(_levels(_split_nibbles(low, 16), layout), _halves(scale))
    if ggml_type is GGMLType.Q4_1:
        scale, minimum, low = block.split([2, 2, 16], dim=-1)
        return Blocks(_levels(_split_nibbles(low, 16), layout), _halves(scale), min=-_halves(minimum))
    if ggml_type is GGMLType.Q5_0:
        scale, high, low = block.split([2, 4, 16], dim=-1)
        return Blocks(_levels(_split_nibbles(low, 16) | _split_bits(high).flatten(-2) << 4, layout), _halves(scale))
    if ggml_type is GGMLType.Q5_1:
        scale, minimum, high, low = block.split([2, 2, 4, 16], dim=-1)
        codes = _split_nibbles(low, 16) | _split_bits(high).flatten(-2) << 4
        return Blocks(_levels(codes, layout), _halves(scale), min=-_halves(minimum))
    five = ggml_type is GGMLType.Q5_K
    scale, minimum, packed, high, low = block.split([2, 2, 12, 32 if five else 0, 128], dim=-1)
    codes = _split_nibbles(low, 32)
    if five:
        codes = codes | _split_bits(high).transpose(-1, -2).flatten(-2) << 4
    scale_codes, min_codes = _split_six_bits(packed)
    return Blocks(_levels(codes, layout), _halves(scale), scale_codes, _halves(minimum), min_codes)


def _layout(ggml_type: GGMLType) -> BlockLayout:
    if ggml_type not in LAYOUTS:
        known = ", ".join(known.value for known in LAYOUTS)
        raise ValueError(f"{ggml_type.value} blocks cannot be packed here, only {known}")
    return LAYOUTS[ggml_type]


def _check(blocks: Blocks, ggml_type: GGMLType, layout: BlockLayout) -> None:
    if blocks.levels.shape[1] % layout.block:
        raise ValueError(f"rows of {blocks.levels.shape[1]} weights are not whole {ggml_type.value} blocks")
    if layout.has_min != (blocks.min is not None):
        raise ValueError(f"{ggml_type.value} {'needs' if layout.has_min else 'has no'} mins")
    checks: list[tuple[str, Tensor | None, tuple[int, int]]] = [("levels", blocks.levels, (layout.low, layout.high))]
    if layout.scale_codes is not None:
        checks.append(("scale codes", blocks.scale_codes, layout.scale_codes))
        if layout.has_min:
            checks.append(("min codes", blocks.min_codes, layout.scale_codes))
    for name, values, (low, high) in checks:
        if values is None:
            raise ValueError(f"{ggml_type.value} needs {name}")
        least, most = (int(extreme) for extreme in values.aminmax())
        if least < low or most > high:
            raise ValueError(f"{ggml_type.value} holds {name} from {low} to {high}, got {least} to {most}")


def _per_group(block_values: Tensor, codes: Tensor | None) -> Tensor:
    values = block_values.float()
    if codes is None:
        return values
    return values.repeat_interleave(codes.shape[1] // values.shape[1], dim=1) * codes


def _levels(codes: Tensor, layout: BlockLayout) -> Tensor:
    """Stored codes `[out, blocks, block]` as signed levels `[out, in]`."""
    return (codes.to(torch.int16) + min(layout.low, 0)).to(torch.int8).flatten(1)


def _bytes_of(halves: Tensor) -> Tensor:
    """Float16 `[out, blocks]` as bytes `[out, blocks, 2]`."""
    # a copy: in a contiguous tensor a dimension of size 1 may have any stride, which a view as bytes does not take
    return halves.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(len(halves), -1, 2)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).squeeze(-1)


def _join_nibbles(codes: Tensor, half: int) -> Tensor:
    """Every `2 * half` codes of 4 bits become `half` bytes; the first half is in the low nibbles."""
    pairs = codes.unflatten(-1, (-1, 2, half))
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)


def _split_nibbles(data: Tensor, half: int) -> Tensor:
    data = data.unflatten(-1, (-1, half))
    return torch.stack([data & 15, data >> 4], dim=-2).flatten(-3)


def _join_bits(bits: Tensor) -> Tensor:
    """`[..., 8]` of 0 and 1 become `[...]`, the first in the lowest bit."""
    return (bits << torch.arange(8, dtype=bits.dtype, device=bits.device)).sum(dim=-1, dtype=torch.int16)


def _split_bits(data: Tensor) -> Tensor:
    return data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1


def _join_six_bits(scale_codes: Tensor, min_codes: Tensor) -> Tensor:
    """8 scale codes and 8 min codes of 6 bits as 12 bytes `[out, blocks, 12]`.

    Bytes 0 to 3 and 4 to 7 hold the first four scales and mins, bytes 8 to 11 the low nibbles of the last four
    of both, whose upper two bits are in the upper two bits of the first eight bytes.
    """
    scales, mins = (codes.view(len(codes), -1, 2, 4) for codes in (scale_codes, min_codes))
    first = [codes[..., 0, :] | codes[..., 1, :] >> 4 << 6 for codes in (scales, mins)]
    return torch.cat([*first, scales[..., 1, :] & 15 | (mins[..., 1, :] & 15) << 4], dim=-1)


def _split_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    scales, mins, last = data.to(torch.int16).split(4, dim=-1)
    first = [part & 63 for part in (scales, mins)]
    second = [part >> 6 << 4 | low for part, low in ((scales, last & 15), (mins, last >> 4))]
    joined = [torch.cat(pair, dim=-1).flatten(1) for pair in zip(first, second, strict=True)]
    return joined[0], joined[1]
