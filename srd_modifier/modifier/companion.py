"""The GGUF file that a recipe asks for beside its checkpoint.

It is not made of the W4 codes, whose errors it would add to its own, but of the original model, as `srd export gguf`
makes it, calibrated on the recipe's own data. Transforms of the recipe (AWQ, SmoothQuant) have no part in it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from srd_modifier._extras import require
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.distributed import Ranks, in_order
from srd_modifier.errors import ConfigError, RecipeError, SRDError
from srd_modifier.gguf.mixture import FileType
from srd_modifier.selection.budget import Budget, parse_budget

# a model's worth of second moments is settled by fewer tokens than a recipe may have
_MOST_TOKENS = 2**16

_SETTINGS = ("type", "budget")


@dataclass(frozen=True)
class CompanionFile:
    """What a recipe says of its GGUF file.

    Attributes:
        file_type: the rule for its tensors' types.
        budget: what it may take, or None.
    """

    file_type: FileType = FileType.Q4_K_M
    budget: Budget | None = None

    @classmethod
    def parse(cls, value: Any) -> "CompanionFile | None":
        """The file that a setting asks for: None, a type, or a mapping of `type` and `budget`.

        Raises:
            ConfigError: naming the field and what is accepted.
        """
        if value is None:
            return None
        settings = value if isinstance(value, Mapping) else {"type": value}
        unknown = sorted(str(name) for name in settings if name not in _SETTINGS)
        if unknown:
            raise ConfigError(f"gguf has {unknown[0]!r}, expected only {_SETTINGS}")
        types = [own.value for own in FileType if own.is_quantized]
        name = settings.get("type", FileType.Q4_K_M.value)
        if name not in types:
            raise ConfigError(f"gguf.type is {name!r}, expected one of {', '.join(types)}")
        budget = settings.get("budget")
        return cls(FileType(name), None if budget is None else parse_budget("budget", budget, field="gguf.budget"))

    def check(self, model: Any) -> Path:
        """Find the original model, and make sure before calibration that it can be exported.

        Raises:
            RecipeError: the model was not loaded from anywhere.
            SRDError: llama.cpp has no such architecture or tokenizer.
            ConfigError: no types are small enough for the budget.
            MissingExtraError: a library of the `gguf` extra is missing.
        """
        from srd_modifier.gguf.export import check_budget
        from srd_modifier.gguf.plan import plan_export

        for library in ("gguf", "xllamacpp", "accelerate"):
            require(library, extra="gguf")
        name = getattr(model.config, "_name_or_path", "")
        try:
            if not name:
                raise SRDError("it was not loaded from anywhere")
            directory = find_model(name, fetch_weights=True)
        except SRDError as error:
            raise RecipeError(
                f"gguf makes a file of the original model, which is not on disk ({error}); load it from a directory or "
                "a hub id, or leave gguf out and run srd export gguf later"
            ) from error
        plan = plan_export(directory, file_type=self.file_type, calibrated=True)
        if self.budget is not None:
            check_budget(self.budget, plan)
        return directory

    def write(self, original: Path, batches: Iterable[Mapping[str, Tensor]], directory: Path) -> None:
        """Make the file in a directory, calibrated on batches as a data loader gives them."""
        from srd_modifier.gguf.calibration.text import Calibration
        from srd_modifier.gguf.export import export_gguf

        calibration = Calibration("the recipe's data", samples=_samples(batches))
        summary = export_gguf(
            original,
            directory,
            file_type=self.file_type,
            calibration=calibration,
            budget=self.budget,
            overwrite=True,
        )
        logger.info(
            f"SRD wrote {summary.path.name}: {summary.bytes:,} bytes, predicted divergence {summary.predicted_kld:.3g}"
        )


def every_batch(batches: Iterable[Mapping[str, Tensor]], ranks: Ranks) -> Iterable[Mapping[str, Tensor]]:
    """The recipe's batches, or those of all processes among which they were divided, as far as a file needs them."""
    if ranks.size == 1:
        return batches
    samples: list[list[int]] = []
    with ranks.together():
        samples = _samples(batches)
    return [{"input_ids": torch.tensor([sample])} for sample in in_order(ranks.gather(samples), len)]


def _samples(batches: Iterable[Mapping[str, Tensor]]) -> list[list[int]]:
    """Token ids without padding, up to `_MOST_TOKENS`."""
    samples: list[list[int]] = []
    tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        for row, ids in enumerate(batch["input_ids"]):
            sample = (ids if mask is None else ids[mask[row].bool()]).tolist()
            samples.append(sample)
            tokens += len(sample)
            if tokens >= _MOST_TOKENS:
                return samples
    return samples
