"""The settings of a training, as a recipe, the command line and a run's own record hold them."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from srd_modifier.errors import ConfigError
from srd_modifier.gguf.mixture import FileType
from srd_modifier.qat.schedule import QATSchedule

W4A16 = "w4a16"
GGUF = "gguf:"
STARTS = ("calibrated", "nearest")
SCALES = ("searched", "learned")
TRAINED = ("linear", "all")
PRODUCTS = ("auto", "float32", "bfloat16")
ALL = "all"
"""The word for a `num_samples` of None, which has no other on a command line."""

_POSITIVE = ("group_size", "temperature", "epochs", "learning_rate", "batch_size", "micro_batch_size", "num_samples")
_KINDS = {str: "text", int: "a whole number", float: "a number", tuple: "a list of texts"}
_W4_BITS = 4


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained: by default at the published sizes and rates, in the way that recovers most.

    Published were a linear schedule, cross-entropy and all weights (recipes/qat/smollm2_1_7b.yaml); docs/qat.md has the
    figures that decide.

    Attributes:
        grid: what the weights are trained for: `w4a16`, or `gguf:` and a type of llama.cpp's, as `gguf:Q4_K_M`.
        schedule: as `QATSchedule.parse` takes it; by name it ends at the grid's width.
        start: the first levels and the scales: `calibrated`, those of a quantizer that compensates its errors on
            training samples; `nearest`; or the path of a symmetric W4A16 checkpoint or GGUF file of the model.
        group_size: columns per scale of `w4a16`.
        ignore: names or `re:` patterns of Linear modules that stay in full precision, besides the head.
        scales: `searched` stay as they began, `learned` are trained too.
        train: `linear`, only the weights that are quantized; or `all`.
        distill: share of the loss that is the divergence from the original model; the rest is cross-entropy.
        temperature: of the distillation.
        epochs: passes over the samples.
        learning_rate: of AdamW, falling to 0 along a cosine.
        weight_decay: of AdamW.
        batch_size: samples per optimizer step.
        micro_batch_size: samples that are computed at once; gradients are summed up to `batch_size`.
        num_samples: at most so many; None for all, in a recipe also the word `all`.
        max_seq_length: tokens per sample.
        products: what matrices are multiplied in: `float32`, `bfloat16`, or `auto`, which is bfloat16 on CUDA. Weights,
            their rounding and the optimizer are float32 in any case.
        seed: of the choice and order of samples.
    """

    grid: str = W4A16
    schedule: str = "constant"
    start: str = "calibrated"
    group_size: int = 64
    ignore: tuple[str, ...] = ()
    scales: str = "searched"
    train: str = "linear"
    distill: float = 1.0
    temperature: float = 1.0
    epochs: float = 1.0
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    batch_size: int = 64
    micro_batch_size: int = 8
    num_samples: int | None = 4000
    max_seq_length: int = 512
    products: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; expected more than 0")
        if self.max_seq_length < 2:
            raise ConfigError(f"max_seq_length is {self.max_seq_length}; a sample needs at least 2 tokens")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill is {self.distill}; expected a share from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        for name, known in (("scales", SCALES), ("train", TRAINED), ("products", PRODUCTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")
        self._check_grid()

    def _check_grid(self) -> None:
        if self.grid == W4A16:
            QATSchedule.parse(self.schedule, bits=_W4_BITS).check_ends_at(_W4_BITS, W4A16)
            return
        if not self.grid.startswith(GGUF):
            raise ConfigError(f"grid is {self.grid!r}; expected {W4A16}, or {GGUF} and a type, as {GGUF}Q4_K_M")
        if not gguf_type(self.grid).is_quantized:
            raise ConfigError(f"grid is {self.grid}, which is not quantized, so there is nothing to train for")
        if self.scales == "learned":
            raise ConfigError(
                f"scales are learned on the {W4A16} grid only: those of {self.grid} are codes themselves; set scales "
                "to searched"
            )
        QATSchedule.parse(self.schedule)

    @classmethod
    def read(cls, recipe: Path | None, **given: Any) -> "TrainingSettings":
        """A recipe's settings, with those that are given (not None) in their place.

        Args:
            recipe: a YAML file whose keys are attributes of this class; None for the defaults.
            given: by attribute.

        Raises:
            ConfigError: the file is missing or no such recipe, or a setting is out of range.
        """
        values = {} if recipe is None else _read_recipe(recipe)
        values |= {name: value for name, value in given.items() if value is not None}
        if isinstance(values.get("ignore"), str):
            values["ignore"] = [values["ignore"]]
        if isinstance(values.get("ignore"), list):
            values["ignore"] = tuple(values["ignore"])
        if values.get("num_samples") == ALL:
            values["num_samples"] = None
        for field in fields(cls):
            if isinstance(field.default, float) and isinstance(values.get(field.name), str):
                values[field.name] = _number(values[field.name])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """In values that JSON has."""
        return {**asdict(self), "ignore": list(self.ignore)}


def gguf_type(text: str) -> FileType:
    """The type after `gguf:`.

    Raises:
        ConfigError: there is no such type.
    """
    name = text.removeprefix(GGUF)
    if name not in FileType.__members__:
        raise ConfigError(f"there is no GGUF type {name!r}; there are {', '.join(FileType.__members__)}")
    return FileType[name]


def _check_type(name: str, value: Any, kind: type) -> None:
    if name == "num_samples":
        kind = int
        if value is None:
            return
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if kind is tuple:
        fits = fits and all(isinstance(entry, str) for entry in value)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{name} is {value!r}; expected {_KINDS[kind]}")


def _number(text: str) -> float | str:
    """YAML takes 2e-5, which has no point, for text."""
    try:
        return float(text)
    except ValueError:
        return text


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ConfigError(f"{path}: there is no such recipe")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    known = [field.name for field in fields(TrainingSettings)]
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a training recipe, which is a mapping of {', '.join(known)}")
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: {name} is no setting of a training; there are {', '.join(known)}")
    return values
