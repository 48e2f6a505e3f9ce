"""A whole training, from a model and a text to its exports: what `srd qat` does.

OUTPUT/
  training.json       settings, data, versions, and the loss and the width at every logged step
  loss.png            the same as a picture
  samples.npy         the token ids that it is trained on, so that nothing but this is read to resume
  checkpoints/        of the Trainer, to resume from
  start.gguf          the blocks of a training for a GGUF type
  bf16/ w4a16/ srd/ NAME-Q4_K_M.gguf      the exports
"""

import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from srd_modifier._extras import require
from srd_modifier.calibration import SELF
from srd_modifier.checkpoint.atomic import new_file, write_json
from srd_modifier.checkpoint.config import read_json, read_model_config
from srd_modifier.checkpoint.locate import find_model
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.comparison.environment import library_versions
from srd_modifier.evaluation.load import load, resolve_device
from srd_modifier.qat.callback import ScheduledQATCallback
from srd_modifier.qat.checkpoints import last_checkpoint
from srd_modifier.qat.curve import draw_curve
from srd_modifier.qat.data import Collator, Samples, check_length, from_data_set, from_model, from_text
from srd_modifier.qat.distillation import DistillationTrainer
from srd_modifier.qat.exports.destination import Destination, TrainedModel
from srd_modifier.qat.gguf_start import calibrated_gguf, gguf_file
from srd_modifier.qat.schedule import QATSchedule
from srd_modifier.qat.settings import STARTS, W4A16, TrainingSettings, gguf_type
from srd_modifier.qat.start import Start, calibrated_w4, nearest_w4, w4_checkpoint

RECORD = "training.json"
CURVE = "loss.png"
_CHECKPOINTS = "checkpoints"
_SAMPLES = "samples.npy"

# samples of the training text that a calibrated start reads
_CALIBRATION_SAMPLES = 64

# checkpoints that are kept, and how many of them a training writes unless it is told
_KEPT, _CHECKPOINTS_OF_A_RUN = 2, 10
_LOGGED_OF_A_RUN = 200

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Data:
    """What to train on, one of the two.

    Attributes:
        text: a text or JSON file, or a folder of texts.
        dataset: `NAME[:CONFIG[:SPLIT]]` of the hub, a data set's directory, or `self` for text that the model writes.
    """

    text: Path | None = None
    dataset: str | None = None

    def __str__(self) -> str:
        """What the record calls it."""
        return str(self.text if self.text is not None else self.dataset)


@dataclass(frozen=True)
class Trained:
    """What a training has come to.

    Attributes:
        output: its directory.
        steps: optimizer steps.
        samples: that it was trained on, each once in an epoch.
        loss: the last logged one.
        exports: the files and directories that were written.
        notes: what the user should know about them.
    """

    output: Path
    steps: int
    samples: int
    loss: float
    exports: tuple[Path, ...]
    notes: tuple[str, ...]


def train(
    model_name: str,
    data: Data,
    settings: TrainingSettings,
    output: Path,
    *,
    exports: Sequence[Destination] = (),
    device: str = "auto",
    save_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Trained:
    """Train a model into its export format, and export it.

    Args:
        model_name: a directory or hub id of an unquantized model; it is trained in float32, on CUDA with bfloat16
            products.
        data: to train on.
        settings: of the training.
        output: directory to make and fill.
        exports: what to write at the end.
        device: `cpu`, `cuda` or `auto`.
        save_steps: optimizer steps between two checkpoints; None is a tenth of the training.
        resume: go on from the last checkpoint in `output`; model, data and settings have to be those it was begun with.
        overwrite: begin anew in an existing output directory of a training.
        progress: called with the title of a piece of work; gives what is called with (done, of all).
        say: called with a line for every step of the work.

    Raises:
        MissingExtraError: a library is not installed.
        DivergedError: the loss or its gradient is no longer finite; the last good checkpoint stays.
        SRDError: model, data, settings or output are at fault.
    """
    require("accelerate", extra="qat")
    require("matplotlib", extra="qat")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a training in several processes is started by a script of its own: run examples/train_qat.py with "
            "torchrun or accelerate launch"
        )
    record: dict[str, Any] = {"model": model_name, "data": str(data), "settings": settings.as_dict()}
    _check_output(output, record, resume=resume, overwrite=overwrite)
    _check_start(settings)
    for destination in exports:
        destination.check(settings, model_name)
    with _contained():
        return _train(
            model_name,
            data,
            settings,
            output,
            record=record,
            exports=exports,
            device=resolve_device(device),
            save_steps=save_steps,
            resume=resume,
            progress=progress,
            tell=say or (lambda line: None),
        )


def _train(
    model_name: str,
    data: Data,
    settings: TrainingSettings,
    output: Path,
    *,
    record: Mapping[str, Any],
    exports: Sequence[Destination],
    device: torch.device,
    save_steps: int | None,
    resume: bool,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> Trained:
    """`train`, once it is known that it may."""
    set_seed(settings.seed)
    model, tokenizer = _load(model_name, torch.float32, device)
    stored = _stored_samples(output) if resume else None
    samples = _samples(data, model, tokenizer, settings) if stored is None else stored
    # nothing is lost before model and data have been found good
    if not resume:
        _begin(output, model_name, data, settings)
    write_json(output / RECORD, record)
    if stored is None:
        with new_file(output / _SAMPLES) as file:
            np.save(file, samples.token_ids)
    tell(f"training on {len(samples):,} samples of {samples.token_ids.shape[1]} tokens from {data}")
    checkpoint = last_checkpoint(output / _CHECKPOINTS) if resume else None
    if checkpoint is None:
        tell(f"choosing the first levels: {settings.start}")
    else:
        tell(f"going on from {checkpoint}")
    start = _start(model_name, model, samples, settings, output, resumed=checkpoint is not None)
    if settings.train == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in start.grids)
    trainer, callback = _trainer(model_name, model, samples, tokenizer, start, settings, output, device, save_steps)
    if progress is not None:
        trainer.add_callback(_ProgressCallback(progress("training")))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    history = trainer.state.log_history
    finished = {"steps": trainer.state.max_steps, "samples": len(samples), "versions": library_versions()}
    write_json(output / RECORD, {**record, **finished, "history": history})
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        title = f"{Path(model_name).resolve().name}, {settings.grid}, {settings.schedule}"
        draw_curve(history, output / CURVE, title=title)
    trained = TrainedModel(model, callback.grids, start, model_name, tokenizer)
    written = []
    for destination in exports:
        tell(f"exporting {destination}")
        written.append(destination.write(trained, output))
    notes = tuple(note for destination in exports if (note := destination.note(settings)))
    return Trained(
        output, trainer.state.max_steps, len(samples), losses[-1] if losses else math.nan, tuple(written), notes
    )


@contextmanager
def _contained() -> Iterator[None]:
    """Gives back to the process what a training takes from it: its random numbers, and its devices to Accelerate.

    Accelerate keeps the devices of the first who asked for all who come later. The Trainer itself forgets them when it
    begins.
    """
    from accelerate.state import AcceleratorState

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        AcceleratorState._reset_state(reset_partial_state=True)


def _check_output(output: Path, record: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that may not be filled, or whose training was another."""
    stored = output / RECORD
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file, expected a directory that does not exist yet")
    if resume:
        if not stored.is_file():
            raise CheckpointError(f"{output} holds no training to resume: there is no {RECORD}")
        _check_same(stored, record)
    elif output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{output} already exists; choose another directory, or pass --resume or --overwrite")
        if not stored.is_file():
            raise CheckpointError(
                f"{output} is not the directory of a training and is not overwritten; remove it yourself"
            )


def _check_same(stored: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with a training that was begun otherwise."""
    before = read_json(stored)
    for name, value in {**record, **record["settings"]}.items():
        was = before.get("settings", {}).get(name) if name in record["settings"] else before.get(name)
        if name != "settings" and was != value:
            raise ConfigError(
                f"{stored}: the training was begun with {name} {was!r}, not {value!r}; resume it with what it was "
                "begun with, or begin another"
            )


def _check_start(settings: TrainingSettings) -> None:
    """Refuse a start that is not there, or whose libraries are not."""
    if settings.grid != W4A16:
        require("gguf", extra="gguf")
        require("xllamacpp", extra="gguf")
    elif settings.start == "calibrated":
        require("llmcompressor", extra="quantize")
    if settings.start not in STARTS and not Path(settings.start).exists():
        raise ConfigError(
            f"start is {settings.start!r}; expected {', '.join(STARTS)}, or a W4A16 checkpoint or GGUF file that exists"
        )


def _begin(output: Path, model_name: str, data: Data, settings: TrainingSettings) -> None:
    """An empty directory, in the place of an earlier training."""
    if output.is_dir():
        for needed in (model_name, data.text or "", data.dataset or "", settings.start):
            if needed and Path(needed).exists() and Path(needed).resolve().is_relative_to(output.resolve()):
                raise CheckpointError(f"{needed} is in {output}, which would be overwritten; choose another directory")
        shutil.rmtree(output)
    output.mkdir(parents=True)


def _load(model_name: str, dtype: torch.dtype | None, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer; without a dtype in the checkpoint's own."""
    directory = find_model(model_name, fetch_weights=True)
    config = read_model_config(directory)
    if config.get("quantization_config") is not None:
        raise SRDError(f"{model_name} is quantized already; start from the original model")
    loaded = load(
        str(directory),
        dtype=dtype or getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32")),
        device=device.type,
    )
    return loaded.model, loaded.tokenizer


def _stored_samples(output: Path) -> Samples | None:
    """Those that a training was begun with; None if it was stopped before it had them."""
    path = output / _SAMPLES
    return Samples(np.load(path)) if path.is_file() else None


def _samples(data: Data, model: Any, tokenizer: Any, settings: TrainingSettings) -> Samples:
    check_length(settings.max_seq_length, model.config)
    sizes: dict[str, Any] = {"max_seq_length": settings.max_seq_length, "num_samples": settings.num_samples}
    sizes["seed"] = settings.seed
    if data.text is not None:
        return from_text(data.text, tokenizer, **sizes)
    if data.dataset == SELF:
        return from_model(model, tokenizer, **sizes)
    if data.dataset is None:
        raise ConfigError("there is nothing to train on: give a text or a data set")
    return from_data_set(data.dataset, tokenizer, **sizes)


def _start(
    model_name: str, model: Any, samples: Samples, settings: TrainingSettings, output: Path, *, resumed: bool
) -> Start:
    """The grids and first levels; a training that is resumed has both in its checkpoint, but for a GGUF file's."""
    ignore, calibration = settings.ignore, None
    if settings.start == "calibrated":
        calibration = samples.token_ids[:_CALIBRATION_SAMPLES].tolist()
    if settings.grid == W4A16:
        w4: dict[str, Any] = {"group_size": settings.group_size, "ignore": ignore}
        if settings.start not in STARTS:
            return w4_checkpoint(Path(settings.start))
        if calibration is None or resumed:
            return nearest_w4(model, **w4)
        return calibrated_w4(model_name, calibration, **w4, seed=settings.seed, folder=output)
    if settings.start not in STARTS:
        return gguf_file(Path(settings.start), model_name, ignore=ignore)
    if (output / "start.gguf").is_file():  # whole, or it would not be there
        return gguf_file(output / "start.gguf", model_name, ignore=ignore)
    return calibrated_gguf(model_name, calibration, gguf_type(settings.grid), output, ignore=ignore)


def _trainer(
    model_name: str,
    model: Any,
    samples: Samples,
    tokenizer: Any,
    start: Start,
    settings: TrainingSettings,
    output: Path,
    device: torch.device,
    save_steps: int | None,
) -> tuple[DistillationTrainer, ScheduledQATCallback]:
    steps = math.ceil(math.ceil(len(samples) / settings.batch_size) * settings.epochs)
    on_cuda = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(output / _CHECKPOINTS),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        seed=settings.seed,
        save_steps=save_steps or max(1, steps // _CHECKPOINTS_OF_A_RUN),
        save_total_limit=_KEPT,
        logging_steps=max(1, steps // _LOGGED_OF_A_RUN),
        use_cpu=not on_cuda,
        bf16=settings.products == "bfloat16" or (settings.products == "auto" and on_cuda),
        dataloader_pin_memory=on_cuda,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:  # a Trainer would share every batch out among them
        raise ConfigError(
            f"a training in one process is on one GPU, and this one sees {arguments.n_gpu}: set CUDA_VISIBLE_DEVICES "
            "to one of them, or run examples/train_qat.py with torchrun or accelerate launch"
        )
    teacher = None
    if settings.distill > 0:
        # on CUDA in the checkpoint's own dtype, which is what it was made to be run in
        teacher, _ = _load(model_name, None if on_cuda else torch.float32, device)
    callback = ScheduledQATCallback(
        QATSchedule.parse(settings.schedule, bits=start.bits),
        start=start,
        learned_scales=settings.scales == "learned",
    )
    end = tokenizer.eos_token_id
    trainer = DistillationTrainer(
        model,
        arguments,
        train_dataset=samples,
        data_collator=Collator(0 if end is None else end),
        callbacks=[callback],
        teacher=teacher,
        temperature=settings.temperature,
        weight=settings.distill,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, callback


class _ProgressCallback(TrainerCallback):
    """Shows the optimizer steps."""

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self._show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state.global_step, state.max_steps)
