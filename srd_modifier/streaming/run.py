"""A model and a recipe without data to a checkpoint, one decoder layer in memory at a time."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier.checkpoint.atomic import link_or_copy, new_directory
from srd_modifier.checkpoint.base import BaseCheckpoint
from srd_modifier.checkpoint.base_writer import BaseWriter
from srd_modifier.checkpoint.save import attach_sidecar
from srd_modifier.checkpoint.writer import ResidualEntry, SidecarWriter
from srd_modifier.errors import RecipeError
from srd_modifier.planning.modules import saved_layout
from srd_modifier.planning.skeleton import build_skeleton
from srd_modifier.planning.source import ModelSource
from srd_modifier.resuming.task import task_of
from srd_modifier.resuming.workplace import Workplace, workplace
from srd_modifier.streaming.layers import Step, steps_of
from srd_modifier.streaming.originals import Originals
from srd_modifier.streaming.pipeline import LayerByLayer, life_cycle
from srd_modifier.streaming.record import Record
from srd_modifier.streaming.suitable import why_model_unsuitable, why_recipe_unsuitable

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

    from srd_modifier.modifier.capture import ResidualCapture

_RESIDUAL = "residual"


class StreamedModel:
    """A model that a recipe can be streamed to.

    Args:
        source: its config and its files, on this machine.
        recipe: without data.
    """

    def __init__(self, source: ModelSource, recipe: "Recipe") -> None:
        self._directory = source.directory
        self._recipe = recipe
        self.unsuitable = why_recipe_unsuitable(recipe)
        if self.unsuitable is None:
            self._files = BaseCheckpoint(source.directory)
            self._model = build_skeleton(source)
            _read_generation_config(self._model, source.directory)
            self._originals = Originals(self._files, self._model)
            self.unsuitable = why_model_unsuitable(self._model, self._originals)

    def quantize(self, output: Path, tokenizer: Any, *, overwrite: bool, resume: bool) -> None:
        """Write the checkpoint.

        Args:
            output: the directory to make.
            tokenizer: saved with it.
            overwrite: replace an existing model directory, and throw away an unfinished one unless `resume`.
            resume: go on where an unfinished quantization to the same directory stopped.

        Raises:
            SRDError: recipe, model or output are at fault.
        """
        task = task_of(self._directory, self._recipe)
        with workplace(output, task, Record.parse, overwrite=overwrite, resume=resume) as place:
            if not place.is_moved:
                with life_cycle(self._model, self._recipe):
                    self._write(place, output, tokenizer, overwrite=overwrite)

    def _write(self, place: Workplace[Record], output: Path, tokenizer: Any, *, overwrite: bool) -> None:
        keep = bool(place.done)
        capture = _capture(self._recipe)
        steps = steps_of(self._model)
        buffers = {name for name, _ in self._model.named_buffers()}
        base = BaseWriter(place.directory, saved_layout(self._model), buffers=buffers, keep=keep)
        formats = {} if capture is None else {c.name: c.format for c in capture.modules.values()}
        sidecar = None
        try:
            if capture is not None:
                entries = {
                    c.name: ResidualEntry(c.module.out_features, c.module.in_features, c.format)
                    for c in capture.modules.values()
                }
                sidecar = SidecarWriter(place.directory / _RESIDUAL, entries, keep=keep)
            layers = LayerByLayer(self._originals, base, sidecar, formats, place.journal)
            layers.run(steps, place.done, partial(_bar, total=len(steps)))
            if formats and not layers.lost:
                raise RecipeError(
                    f"{next(iter(formats))}: round-to-nearest lost nothing, its weights were on the 4-bit grid before; "
                    "start from the original model"
                )
            files = base.finish()
            if sidecar is not None and capture is not None:
                sidecar.finish(capture.format)
        finally:
            base.close()
            if sidecar is not None:
                sidecar.close()
        with new_directory(output, overwrite=overwrite) as staging:
            place.note_staging(staging)
            self._save_settings(staging)
            for file in files:
                link_or_copy(file, staging / file.name)
            if capture is not None:
                attach_sidecar(
                    staging,
                    sorted((place.directory / _RESIDUAL).iterdir()),
                    modules=list(formats),
                    fmt=capture.format,
                    alpha=capture.alpha,
                    layer_alphas=capture.layer_alphas,
                    base_digests=layers.digests,
                )
            tokenizer.save_pretrained(str(staging))

    def _save_settings(self, staging: Path) -> None:
        """Save all but the weights, as llm-compressor's `save_pretrained` does: it would compare weights, too."""
        from compressed_tensors import ModelCompressor
        from llmcompressor.pytorch.model_load.helpers import copy_python_files_from_model_cache
        from llmcompressor.transformers.compression.compressed_tensors_utils import (
            resave_config,
            update_and_save_recipe,
        )

        compressor = ModelCompressor.from_pretrained_model(self._model)
        compressor.compress_model(self._model, skip_compressed=True)
        self._model.save_pretrained(str(staging), state_dict={})
        for file in staging.glob("model*.safetensors*"):
            file.unlink()
        resave_config(self._model.config, str(staging))
        compressor.update_config(str(staging))
        update_and_save_recipe(self._model.name_or_path, str(staging))
        copy_python_files_from_model_cache(self._model, str(staging))


def _read_generation_config(model: Any, directory: Path) -> None:
    """Take the model's own generation_config.json, as `from_pretrained` does and `from_config` does not."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except OSError:  # there is none
        model.generation_config = GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True
        )


def _capture(recipe: "Recipe") -> "ResidualCapture | None":
    """What the recipe's SRDModifiers planned together."""
    from srd_modifier.modifier import SRDModifier

    return next((modifier._capture for modifier in recipe.modifiers if isinstance(modifier, SRDModifier)), None)


def _bar(steps: list[Step], *, total: int) -> Iterable[Step]:
    """The steps that are left of all, with a progress bar."""
    from tqdm import tqdm

    return tqdm(steps, desc="Quantizing", initial=total - len(steps), total=total, disable=not sys.stderr.isatty())
