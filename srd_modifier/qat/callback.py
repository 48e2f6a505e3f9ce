"""The schedule as a callback of the Hugging Face Trainer."""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.qat.checkpoints import last_checkpoint
from srd_modifier.qat.grid import Grid
from srd_modifier.qat.linear import fake_quantize, fake_quantized_modules, finish, set_width
from srd_modifier.qat.schedule import QATSchedule
from srd_modifier.qat.start import Start, nearest_w4


class DivergedError(SRDError):
    """The gradients are no longer finite."""


class ScheduledQATCallback(TrainerCallback):
    """Trains a model into a 4-bit grid, at a width that falls as training goes on.

        trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[ScheduledQATCallback("linear")])
        trainer.train()
        trainer.save_model("out/model")  # an ordinary model whose weights lie on the grid

    The model is fake-quantized when the Trainer is made, so that its optimizer, DDP and FSDP find it that way, and
    finished when training ends. Every checkpoint in between holds the weights as they are trained, under their own
    names, and the scales; to resume, make Trainer and callback with the same arguments and call
    `train(resume_from_checkpoint=True)`: the width follows from the step.

    Only training computes at the schedule's width. Evaluations are of the model as it would be exported then, on its
    grid, so that their losses can be compared and `load_best_model_at_end` finds the one that is best there.

    Weights have to be float32 (with `bf16=True` for speed): a learning rate of 2e-5 changes nothing in bfloat16.
    torch.compile compiles a model anew for every width, and gives up after eight: it is for schedules of few widths.

    Attributes:
        grids: by module name, once training has ended: what `qat.exports` takes.
    """

    def __init__(
        self,
        schedule: QATSchedule | str = "linear",
        *,
        start: Start | None = None,
        group_size: int = 64,
        ignore: Iterable[str] = (),
        learned_scales: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            schedule: or its name or milestones, see `QATSchedule.parse`.
            start: the grids and where on them to begin; None is W4A16 in groups, rounded to nearest.
            group_size: columns per scale, where `start` does not say.
            ignore: names or `re:` patterns of Linear modules that stay in full precision, where `start` does not say.
                The output head always does.
            learned_scales: train the scales too.

        Raises:
            ConfigError: the schedule is none.
        """
        self.schedule = QATSchedule.parse(schedule) if isinstance(schedule, str) else schedule
        self.grids: dict[str, Grid] = {}
        self._start = start
        self._group_size = group_size
        self._ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self._learned_scales = learned_scales
        self._bits: float | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Fake-quantize the model.

        Raises:
            ConfigError: the schedule does not end at the grid's width, the model does not fit the grid, or cannot be
                trained on it as FSDP is set.
        """
        if fake_quantized_modules(model):
            raise ConfigError(
                "the model is fake-quantized already: load it anew, and give its Trainer one ScheduledQATCallback"
            )
        _prepare_fsdp(learned_scales=self._learned_scales)
        start = self._start or nearest_w4(model, group_size=self._group_size, ignore=self._ignore)
        self.schedule.check_ends_at(start.bits, "the grid")
        start.apply(model)
        fake_quantize(model, start.grids, learned_scales=self._learned_scales)
        self._bits = start.bits
        self._start = None  # it holds a copy of every level

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Refuse a model that is not, or no longer, fake-quantized.

        Raises:
            ConfigError: it was finished by an earlier run, or is another than the Trainer was made with.
        """
        if self._bits is None:
            raise ConfigError(
                "the model was not fake-quantized: make the Trainer with ScheduledQATCallback in `callbacks`"
            )
        if not fake_quantized_modules(model):
            raise ConfigError(
                "the model is not fake-quantized any more, because it was trained to its end or `model_init` made it "
                "anew: make another Trainer, with a model"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Set the step's width."""
        set_width(model, self.schedule.width(min(state.global_step, state.max_steps - 1), state.max_steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Set the width of the export, for an evaluation."""
        assert self._bits is not None
        set_width(model, self._bits)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Stop before a step that would spoil the weights.

        Raises:
            DivergedError: a gradient is NaN or infinite, in this process or another.
        """
        if args.fp16 or _finite_gradients(model, args.device):  # with fp16, the scaler skips such a step and goes on
            return
        last = last_checkpoint(Path(args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet (save_steps)"
        raise DivergedError(
            f"training diverged at step {state.global_step + 1} of {state.max_steps}: the loss or its gradient is not "
            f"finite; {kept}; lower the learning rate"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the width of the last step beside the loss, into the history and what is printed."""
        for entry in (state.log_history[-1] if state.log_history else {}, logs or {}):
            if "loss" in entry:
                entry["bits"] = self.schedule.width(min(state.global_step, state.max_steps) - 1, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Put the weights on their grids."""
        if state.global_step < state.max_steps:
            warnings.warn(
                f"training was stopped after {state.global_step} of {state.max_steps} steps, before its schedule came "
                "to its end; the weights are rounded as they are",
                stacklevel=2,
            )
        self.grids = finish(model)


def _prepare_fsdp(*, learned_scales: bool) -> None:
    """Refuse settings of FSDP that would spoil the scales, or keep FSDP from doing so."""
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    if plugin is None:
        return
    if learned_scales:
        raise ConfigError("scales cannot be learned under FSDP: leave learned_scales out")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "cpu_ram_efficient_loading leaves all processes but one without weights to choose their grids from: set it "
            "to false in the configuration of FSDP"
        )
    policy = plugin.mixed_precision_policy
    if getattr(policy, "buffer_dtype", None) is not None:
        # FSDP 1 would round the scales; only FSDP 2 leaves buffers as they are
        plugin.mixed_precision_policy = dataclasses.replace(policy, buffer_dtype=None)


def _finite_gradients(model: nn.Module, device: torch.device) -> bool:
    gradients: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients.append(gradient.to_local() if hasattr(gradient, "to_local") else gradient)
    norm = nn.utils.get_total_norm(gradients)
    finite = norm.to(device).isfinite().float()
    if distributed.is_available() and distributed.is_initialized():
        # a part that FSDP has sharded may be finite where another is not; all processes stop, or none
        distributed.all_reduce(finite, op=distributed.ReduceOp.MIN)
    return bool(finite)
