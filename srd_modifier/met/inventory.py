"""What the tensors of a model take, by layer: all that a policy file is computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A tensor of the base, or the residual of a module.

    Attributes:
        name: as the files have it.
        layer: the decoder layer, from 0; None outside the layers.
        bytes: as stored.
        expert: whether it is of a layer's routed experts, of which a token uses only some.
    """

    name: str
    layer: int | None
    bytes: int
    expert: bool = False


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: how many there are, and how many a token uses."""

    count: int
    active: int


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Everything that a model's files hold.

    Attributes:
        kind: `checkpoint`, `gguf` or `config`.
        architecture: the class that config.json names, or a GGUF file's own name for it.
        layers: decoder layers.
        experts: None for a dense model.
        base: the tensors that are always in memory.
        residual: the residual of each corrected module.
        files: bytes of every file by its name; none where nothing was measured.
        assumed: how an estimate takes the weights to be quantized; None where they were measured.
    """

    kind: str
    architecture: str
    layers: int
    experts: Experts | None
    base: tuple[Part, ...]
    residual: tuple[Part, ...] = ()
    files: dict[str, int] = field(default_factory=dict)
    assumed: dict[str, Any] | None = None

    @property
    def header_bytes(self) -> int:
        """What the files hold besides tensors; 0 where nothing was measured."""
        tensors = sum(part.bytes for part in (*self.base, *self.residual))
        return sum(self.files.values()) - tensors if self.files else 0


# how the configurations of different families spell the two numbers
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")


def read_experts(config: Mapping[str, Any]) -> Experts | None:
    """The experts that a config.json tells of, in itself or in its `text_config`; None if it tells of none."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        count, active = (
            next((values[name] for name in names if values.get(name)), None) for names in (_COUNTS, _ACTIVE)
        )
        if type(count) is int and type(active) is int and 0 < active <= count:
            return Experts(count, active)
    return None


def architecture(config: Mapping[str, Any]) -> str:
    """The model class that a config.json names, else its `model_type`."""
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    return named if isinstance(named, str) else "unknown"
