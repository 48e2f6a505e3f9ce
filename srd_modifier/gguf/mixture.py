"""Which type each tensor of a GGUF file gets: llama.cpp's own mixtures.

A file type such as Q4_K_M is a rule that gives a few tensors more bits than the rest. The rule here is the one that
`llama-quantize` follows, tensor by tensor, fall-backs for awkward widths included, for the file types of `FileType`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from importlib import import_module

from srd_modifier._extras import require
from srd_modifier.errors import ConfigError
from srd_modifier.gguf.ggml import GGMLType

# a pattern of tensor names, and the type that they get
Override = tuple[str, GGMLType]

_SMALLER_BLOCKS = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q5_K: GGMLType.Q5_1, GGMLType.Q6_K: GGMLType.Q8_0}

# matrices that are as sensitive as they are small, by a part of their name
_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "per_layer_model_proj",
    "altup",
    "laurel",
    "position_embd",
    "token_types",
)


class FileType(str, Enum):
    """A rule for the types of a file's tensors, by llama.cpp's name."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_0 = "Q4_0"

    @property
    def number(self) -> int:
        """The value of `general.file_type`."""
        require("gguf", extra="gguf")
        names = import_module("gguf").LlamaFileType
        return int(names["ALL_F32" if self is FileType.F32 else f"MOSTLY_{self.name}"])

    @property
    def main_type(self) -> GGMLType:
        """The type of the tensors that the rule does not single out."""
        return GGMLType(self.value.removesuffix("_M").removesuffix("_S"))

    @property
    def is_quantized(self) -> bool:
        """Whether tensors are stored in blocks with scales."""
        return self not in (FileType.F32, FileType.F16, FileType.BF16)


@dataclass(frozen=True)
class ModelShape:
    """What the rules ask about a model.

    Attributes:
        architecture: gguf's name, as in `general.architecture`.
        layers: decoder layers.
        experts: experts of a layer, 0 in a dense model.
        heads: query heads of the first layer.
        kv_heads: key and value heads of the first layer.
    """

    architecture: str
    layers: int
    experts: int
    heads: int
    kv_heads: int

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls it a 70B, whose value projections are an eighth of the queries' size."""
        grouped = self.architecture == "llama" and self.heads != self.kv_heads
        return self.layers == 80 and (grouped or self.architecture == "qwen2")


def tensor_types(
    tensors: Mapping[str, tuple[int, ...]],
    file_type: FileType,
    shape: ModelShape,
    overrides: Sequence[Override] = (),
    *,
    weighted: bool = False,
) -> dict[str, GGMLType]:
    """The type of each tensor of a file, as `llama-quantize` chooses it.

    Tensors that it leaves as it finds them (norms, biases, routers) are F32 here, as its converter stores them; only
    `per_layer_model_proj`, which is large, is BF16 in a quantized file.

    Args:
        tensors: GGUF names and torch shapes, in any order: the rules count layers in their own order, as
            llama.cpp's loader does.
        file_type: The rule.
        shape: The model.
        overrides: Regular expressions, searched for in the names of tensors that may be quantized, and the type that
            the first to be found gives. As in `llama-quantize`, a tensor that is overridden is not counted by the
            rule either: which later layers get more bits may change.
        weighted: Whether the weights will be quantized with importance, which Q4_0 takes into account.

    Returns:
        A type per name, in the order of `tensors`.

    Raises:
        ConfigError: an override is no regular expression, matches no tensor, or is for a file type that is not
            quantized.
    """
    patterns = _compiled(overrides, file_type, [name for name, shape_ in tensors.items() if _quantizes(name, shape_)])
    rule = _Rule(file_type, shape, tensors, weighted)
    types = {}
    for name in sorted(tensors, key=lambda name: (_layer(name), name)):
        if not _quantizes(name, tensors[name]):
            types[name] = _kept(name, file_type)
        elif not file_type.is_quantized:
            types[name] = file_type.main_type
        else:
            given = next((ggml_type for pattern, ggml_type in patterns if pattern.search(name)), None)
            types[name] = fall_back(given or rule.next(name), tensors[name][-1])
    return {name: types[name] for name in tensors}


def read_override(text: str) -> Override:
    """An override from `PATTERN=TYPE`, as `llama-quantize --tensor-type` reads it: `attn_v=q6_k`.

    Raises:
        ConfigError: it has another form, or the type is not one that can be written.
    """
    pattern, _, type_name = text.rpartition("=") if text.count("=") == 1 else ("", "", "")
    if not pattern or type_name.upper() not in GGMLType.__members__:
        known = ", ".join(GGMLType.__members__)
        raise ConfigError(f"tensor type {text!r} is not PATTERN=TYPE, as in attn_v=Q6_K, with a type among {known}")
    return pattern.lower(), GGMLType[type_name.upper()]


def allowed(ggml_type: GGMLType, columns: int) -> bool:
    """Whether rows of `columns` weights are whole blocks."""
    return columns % ggml_type.block_weights == 0


def fall_back(ggml_type: GGMLType, columns: int) -> GGMLType:
    """`ggml_type` if rows of `columns` weights allow it, else what llama.cpp takes instead."""
    if allowed(ggml_type, columns):
        return ggml_type
    smaller = _SMALLER_BLOCKS.get(ggml_type, GGMLType.F16)
    return smaller if allowed(smaller, columns) else GGMLType.F16


class _Role(Enum):
    """What a tensor is to the rules."""

    OUTPUT = auto()
    EMBEDDING = auto()
    ATTENTION_VALUE = auto()
    ATTENTION_KEY = auto()
    ATTENTION_OUTPUT = auto()
    FFN_DOWN = auto()
    OTHER = auto()


# the first part that is found in a name decides
_ROLES = {
    "attn_qkv.weight": _Role.ATTENTION_VALUE,
    "attn_kv_b.weight": _Role.ATTENTION_VALUE,
    "attn_v.weight": _Role.ATTENTION_VALUE,
    "attn_k.weight": _Role.ATTENTION_KEY,
    "attn_output.weight": _Role.ATTENTION_OUTPUT,
    "ffn_down": _Role.FFN_DOWN,
}


class _Rule:
    """A file type's choice for one tensor after the other.

    Layers are told by counting, not by name, except for the down projections of a mixture of experts: so a model
    whose layers do not all have a value projection counts only those that do.
    """

    def __init__(
        self, file_type: FileType, shape: ModelShape, tensors: Mapping[str, tuple[int, ...]], weighted: bool
    ) -> None:
        self._file_type = file_type
        self._shape = shape
        self._weighted = weighted
        self._tied = "output.weight" not in tensors
        self._value_count = sum(_role(name) is _Role.ATTENTION_VALUE for name in tensors)
        self._values_seen = 0
        self._downs_seen = 0

    def next(self, name: str) -> GGMLType:
        """The type of a tensor that is quantized. To be asked once for each, in llama.cpp's order."""
        role = _role(name)
        if role is _Role.OUTPUT or (role is _Role.EMBEDDING and self._tied):
            return GGMLType.Q8_0 if self._file_type is FileType.Q8_0 else GGMLType.Q6_K
        if role is _Role.ATTENTION_VALUE:
            self._values_seen += 1
            return self._value(self._values_seen - 1)
        if role is _Role.ATTENTION_KEY and self._shape.experts == 8:
            return GGMLType.Q8_0
        if role is _Role.FFN_DOWN:
            self._downs_seen += 1
            return self._down(_layer(name) if self._shape.experts > 1 else self._downs_seen - 1)
        if role is _Role.ATTENTION_OUTPUT and self._shape.experts == 8 and self._file_type.main_type is GGMLType.Q4_K:
            return GGMLType.Q5_K
        return self._file_type.main_type

    def _value(self, layer: int) -> GGMLType:
        if self._shape.experts == 8:
            return GGMLType.Q8_0
        if self._is_medium and _gets_more_bits(layer, self._value_count):
            return GGMLType.Q6_K
        if self._file_type is FileType.Q4_K_S and layer < 4:
            return GGMLType.Q5_K
        if self._file_type.main_type is GGMLType.Q4_K and self._shape.is_70b:
            return GGMLType.Q5_K
        return self._file_type.main_type

    def _down(self, layer: int) -> GGMLType:
        if self._is_medium and _gets_more_bits(layer, self._shape.layers):
            return GGMLType.Q6_K
        if layer < self._shape.layers // 8:
            if self._file_type is FileType.Q4_K_S:
                return GGMLType.Q5_K
            if self._file_type is FileType.Q4_0 and self._weighted:
                return GGMLType.Q4_1
        return self._file_type.main_type

    @property
    def _is_medium(self) -> bool:
        return self._file_type in (FileType.Q4_K_M, FileType.Q5_K_M)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _quantizes(name: str, shape: tuple[int, ...]) -> bool:
    # a matrix of one row is a vector to ggml, which drops leading axes of one
    dimensions = len(shape) - next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return dimensions > 1 and name.endswith("weight") and not any(part in name for part in _NEVER_QUANTIZED)


def _kept(name: str, file_type: FileType) -> GGMLType:
    """The type of a tensor that is not quantized."""
    if "per_layer_model_proj" not in name:
        return GGMLType.F32
    return GGMLType.BF16 if file_type.is_quantized else file_type.main_type


def _role(name: str) -> _Role:
    if name == "output.weight":
        return _Role.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return _Role.EMBEDDING
    return next((role for part, role in _ROLES.items() if part in name), _Role.OTHER)


def _layer(name: str) -> int:
    """The layer in a tensor's name, -1 if it belongs to none."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _compiled(
    overrides: Sequence[Override], file_type: FileType, names: Sequence[str]
) -> list[tuple[re.Pattern[str], GGMLType]]:
    if overrides and not file_type.is_quantized:
        raise ConfigError(
            f"tensor types can be overridden in quantized files only; {file_type.value} stores every matrix alike"
        )
    patterns = []
    for text, ggml_type in overrides:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ConfigError(f"the tensor name pattern {text!r} is no regular expression: {error}") from error
        if not any(pattern.search(name) for name in names):
            raise ConfigError(f"the tensor name pattern {text!r} matches no tensor that is quantized in this model")
        patterns.append((pattern, ggml_type))
    return patterns
