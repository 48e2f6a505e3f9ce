"""What a GGUF file says of itself: `general.*`, which model pages show, and `srd.*`, how its weights were chosen.

    srd.version              1, the version of these keys
    srd.library              version of this package
    srd.method               conversion, weight-error, output-error or training, see `Method`
    srd.mixture              the rule or the budget that gave each tensor its type
    srd.importance           SHA-256 of the importance that was used, absent if none was
    srd.calibration.text     name, SHA-256 and number of tokens of the calibration text, absent if there was none
    srd.calibration.sha256
    srd.calibration.tokens
    srd.base_digest          of an SRD checkpoint's base, as in its config.json
    srd.alpha                share of an SRD checkpoint's residual; `mixed` if modules differ
    srd.padding              spaces, see `_padding`

There are no dates: the same input gives the same bytes.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from srd_modifier._version import __version__
from srd_modifier.errors import CheckpointError

if TYPE_CHECKING:
    from srd_modifier.gguf.weights import ModelWeights

VERSION = 1
PADDED_BYTES = 1024

_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


class Method(str, Enum):
    """What was minimised when the weights were rounded."""

    CONVERSION = "conversion"
    """Nothing: the weights were only converted."""

    WEIGHT_ERROR = "weight-error"
    """ggml's own rounding: the error of the weights, with importance where there is some."""

    OUTPUT_ERROR = "output-error"
    """The error of each layer's output on calibration data."""

    TRAINED = "training"
    """The loss of a training on the grid of the blocks, whose scales were there before."""


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Where calibration data is from: the text's name, the SHA-256 of its bytes in hexadecimal, tokens read of it."""

    name: str
    sha256: str
    tokens: int


def add_general(
    writer: Any,
    *,
    weights: "ModelWeights",
    shapes: Mapping[str, tuple[int, ...]],
    method: Method,
    mixture: str,
    importance: Mapping[str, Tensor] | None = None,
    calibration: CalibrationText | None = None,
) -> None:
    """Add the keys, but for the file type and the version of the quantization, which `write_plan` adds.

    Name, licence, base models, languages and tags are those of the model card, README.md, where there is one. What
    it does not say is taken from the directory's name or the hub id, as llama.cpp's converter does.

    Args:
        writer: A `gguf.GGUFWriter`.
        weights: The model.
        shapes: Of the file's tensors, by GGUF name.
        method: How its weights were rounded.
        mixture: The file type's name, or the budget as the user gave it.
        importance: By GGUF tensor name, what was used of it.
        calibration: The text that importance or calibration are from.

    Raises:
        CheckpointError: README.md begins with something that is no model card's front matter.
    """
    writer.add_type("model")
    _metadata(weights.directory, shapes).set_gguf_meta_model(writer)
    values: dict[str, str] = {
        "library": __version__,
        "method": method.value,
        "mixture": mixture,
    }
    if importance:
        values["importance"] = _digest(importance)
    if calibration is not None:
        values["calibration.text"] = calibration.name
        values["calibration.sha256"] = calibration.sha256
        values["calibration.tokens"] = str(calibration.tokens)
    if weights.srd_config is not None:
        values["base_digest"] = weights.srd_config.base_digest
        alphas = {*weights.alphas.values()}
        values["alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "mixed"
    writer.add_uint32("srd.version", VERSION)
    for key, value in values.items():
        writer.add_string(f"srd.{key}", value)
    writer.add_string("srd.padding", _padding(values))


def _padding(values: Mapping[str, str]) -> str:
    """Spaces that bring the keys of `srd.*` to a fixed size, or the next multiple of it.

    Files of one model and mixture then have the same size to the byte, whatever was calibrated on which text, and are
    compared fairly.
    """
    # a string costs its key and itself, both with 8 bytes of length, and 4 of type
    taken = sum(len(f"srd.{key}") + len(value.encode()) + 20 for key, value in values.items())
    return " " * (-taken % PADDED_BYTES)


def _digest(importance: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(importance):
        total.update(name.encode())
        total.update(importance[name].detach().float().cpu().contiguous().numpy().tobytes())
    return "sha256:" + total.hexdigest()


def _metadata(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """What gguf makes of the model card and of the model's name."""
    gguf = import_module("gguf")
    card = _card(directory)
    name = model_id(directory)
    total = sum(prod(shape) for shape in shapes.values())
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, {"_name_or_path": name}, Path(name), total)
    if metadata.size_label is None:
        stacked = [shape for name, shape in shapes.items() if "_exps." in name and len(shape) == 3]
        experts = stacked[0][0] if stacked else 0
        of_one = sum(prod(shape[1:]) for shape in stacked)
        metadata.size_label = gguf.size_label(total, total - experts * of_one, of_one, experts)
    if metadata.source_repo_url is None and "/" in name:
        metadata.source_repo_url = f"https://huggingface.co/{name}"
    metadata.quantized_by = "srd-modifier"
    for field in fields(metadata):
        # YAML reads `version: 1.0` as a number, and a date as a date
        value = getattr(metadata, field.name)
        if field.name in ("tags", "languages") and value is not None:
            setattr(metadata, field.name, [str(entry) for entry in value])
        elif value is not None and not isinstance(value, str | list):
            setattr(metadata, field.name, str(value))
    return metadata


def _card(directory: Path) -> dict[str, Any]:
    """The front matter of README.md; empty where there is none."""
    yaml = import_module("yaml")
    try:
        return import_module("gguf").Metadata.load_model_card(directory)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{directory / 'README.md'}: the front matter of the model card cannot be read: {reason}"
        ) from error


def model_id(directory: Path) -> str:
    """The hub id of a snapshot in the hub's cache, else the directory's name.

    >>> model_id(Path("hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f"))
    'HuggingFaceTB/SmolLM2-135M'
    """
    directory = directory.resolve()
    cached = _SNAPSHOT.fullmatch(directory.parent.parent.name)
    return f"{cached[1]}/{cached[2]}" if cached and directory.parent.name == "snapshots" else directory.name
