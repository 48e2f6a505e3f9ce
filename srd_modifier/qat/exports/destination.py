"""What a training is asked to write at its end: the words for it, whether it can be, and where it goes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier._extras import require
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import ConfigError
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.plan import plan_export
from srd_modifier.gguf.weights import ModelWeights
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.settings import GGUF, W4A16, TrainingSettings, gguf_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srd_modifier.qat.start import Start

DENSE, SRD = "bf16", "srd"
_FOLDERS = (DENSE, W4A16, SRD)


@dataclass(frozen=True)
class TrainedModel:
    """A finished model and what its exports need to know.

    Attributes:
        model: finished, in float32.
        grids: of its modules.
        start: what it was trained from.
        model_name: directory or hub id of the original.
        tokenizer: of the model.
    """

    model: "PreTrainedModel"
    grids: dict[str, Grid]
    start: "Start"
    model_name: str
    tokenizer: Any


@dataclass(frozen=True)
class Destination:
    """One thing to write.

    Attributes:
        form: `bf16`, `w4a16`, `srd`, or `gguf`.
        file_type: of a GGUF file, else None.
    """

    form: str
    file_type: FileType | None = None

    @classmethod
    def parse(cls, text: str) -> "Destination":
        """`bf16`, `w4a16`, `srd`, or `gguf:` and a type, as `gguf:Q4_K_M`.

        Raises:
            ConfigError: it is none of these.
        """
        text = text.strip()
        if text in _FOLDERS:
            return cls(text)
        if text.startswith(GGUF):
            return cls(GGUF.rstrip(":"), gguf_type(text))
        raise ConfigError(f"there is no export {text!r}: give {', '.join(_FOLDERS)}, or {GGUF} and a type")

    def __str__(self) -> str:
        """As `parse` takes it."""
        return self.form if self.file_type is None else f"{GGUF}{self.file_type.value}"

    def check(self, settings: TrainingSettings, model_name: str) -> None:
        """Refuse, before hours of training, what cannot be written after them.

        Args:
            settings: of the training.
            model_name: directory or hub id of the original.

        Raises:
            ConfigError: the training is for another format.
            SRDError: the model, or its vocabulary, cannot be written as GGUF.
            MissingExtraError: a library is not installed.
        """
        if self.form in (W4A16, SRD) and settings.grid != W4A16:
            raise ConfigError(f"{self} cannot hold weights that were trained for {settings.grid}: set grid to {W4A16}")
        if self.form == SRD and settings.train != "linear":
            raise ConfigError(
                f"the residual of {self} leads back to the original model, of which nothing but the quantized weights "
                "may then be trained: set train to linear"
            )
        if self.file_type is not None:
            require("gguf", extra="gguf")
            require("xllamacpp", extra="gguf")
            plan_export(find_model(model_name, fetch_weights=True), file_type=self.file_type, use_importance=False)

    def note(self, settings: TrainingSettings) -> str | None:
        """What the user should know about it; None for nothing."""
        if self.file_type is None or str(self) == settings.grid:
            return None
        return f"{self} is rounded by ggml from the trained model, which was trained for {settings.grid}"

    def path(self, output: Path, model_name: str) -> Path:
        """The file or directory below a training's output."""
        if self.file_type is None:
            return output / self.form
        return output / f"{Path(model_name).resolve().name}-{self.file_type.value}.gguf"

    def write(self, trained: TrainedModel, output: Path) -> Path:
        """Write it, in the place of one of an interrupted run.

        Raises:
            SRDError: the disk refused it, or the model cannot be written in this form.
        """
        path = self.path(output, trained.model_name)
        if self.form == DENSE:
            from srd_modifier.qat.exports.dense import export_dense

            export_dense(trained.model, trained.tokenizer, path, overwrite=True)
        elif self.form == W4A16:
            from srd_modifier.qat.exports.w4a16 import export_w4a16

            export_w4a16(trained.model, trained.grids, trained.tokenizer, path, overwrite=True)
        elif self.form == SRD:
            from srd_modifier.qat.exports.srd import export_srd

            weights = ModelWeights.open(trained.model_name)
            export_srd(
                trained.model,
                trained.grids,
                lambda module: weights.tensor(f"{module}.weight"),
                trained.tokenizer,
                path,
                overwrite=True,
            )
        else:
            _write_gguf(trained, self.file_type, path)
        return path


def _write_gguf(trained: TrainedModel, file_type: FileType | None, path: Path) -> None:
    from srd_modifier.gguf.reader import GGUFFile
    from srd_modifier.qat.exports.gguf import export_converted_gguf, export_trained_gguf
    from srd_modifier.qat.gguf_start import GGUFStart, file_type_of

    assert file_type is not None
    start = trained.start
    if isinstance(start, GGUFStart) and file_type_of(GGUFFile(start.path)) is file_type:
        export_trained_gguf(trained.model, start, path, overwrite=True)
    else:
        export_converted_gguf(trained.model, trained.tokenizer, path, file_type, overwrite=True)
