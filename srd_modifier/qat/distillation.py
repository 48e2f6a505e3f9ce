"""Distillation: the student learns the distribution of a teacher, which is the model before it was quantized."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Trainer

from srd_modifier.errors import ConfigError

_IGNORED = -100  # the label that no loss counts

# logits that are widened at a time: as many as a processor's cache holds, or enough to keep an accelerator busy
_CHUNK, _ACCELERATOR_CHUNK = 1 << 18, 1 << 24


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    normalizer: float | Tensor,
) -> Tensor:
    """The divergence of the student's distribution from the teacher's, both at a temperature.

    It is `T^2 * sum KL(softmax(teacher / T) || softmax(student / T)) / normalizer` over the positions of the mask. The
    factor `T^2` keeps the gradients as large as those of cross-entropy, whatever the temperature (Hinton, Vinyals and
    Dean 2015, arXiv:1503.02531, section 2).

    Logits are widened to float32 a few rows at a time, and the gradient, `T * (softmax(student / T) - softmax(teacher
    / T))`, is written while the probabilities are at hand. So the loss adds one tensor of the logits' size, in the
    student's dtype, where autograd would keep several in float32.

    Args:
        student_logits: `[..., vocabulary]`; the result has a gradient for these.
        teacher_logits: of the same shape; any floating dtype.
        mask: bool `[...]`, the positions that count.
        temperature: above 1 for softer distributions.
        normalizer: above 0, usually the number of positions in the whole batch.

    Returns:
        A scalar, float32 or float64 as the student's logits are.

    Raises:
        ConfigError: the shapes differ, or the temperature is not a positive number.
    """
    _check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            f"the teacher's logits are {list(teacher_logits.shape)}, the student's {list(student_logits.shape)}; "
            "teacher and student must have the same vocabulary"
        )
    total: Tensor = _Divergence.apply(student_logits, teacher_logits, mask, temperature)
    return total / normalizer


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is `weight` parts distillation from a teacher and the rest cross-entropy on the labels.

    Positions that predict a label count, divided as cross-entropy is: by their number in the whole batch, over all
    steps of gradient accumulation and all processes. The teacher belongs to the trainer alone: it is neither wrapped
    nor saved nor optimized, and every process has all of it.

    Args:
        teacher: a causal language model with the student's vocabulary, or None for a plain `Trainer`. It is moved to
            the trainer's device unless it was dispatched to devices already, and keeps its dtype.
        temperature: of both distributions.
        weight: from 0 to 1. At 1 no cross-entropy is computed.
        args: as `Trainer` takes them, and so are all others.

    Raises:
        ConfigError: the teacher has another vocabulary or shares parameters with the student, a number is out of
            range, or one process has several GPUs.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, temperature: float = 1.0, weight: float = 1.0, **kwargs: Any
    ) -> None:
        _check_temperature(temperature)
        if not 0 <= weight <= 1:
            raise ConfigError(f"the weight of distillation is {weight}; expected a number from 0 to 1")
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.temperature = temperature
        self.distillation_weight = weight
        if teacher is None:
            return
        _check_teacher(self.model, teacher)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"distillation needs one process for each GPU, but this one has {self.args.n_gpu}; "
                "start it with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        teacher.requires_grad_(False).eval()
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.args.device)
        if weight == 1:
            # the loss is ours and takes the number of items, whatever the model's own loss does
            self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forward pass, and the student's outputs if they are asked for.

        Args:
            model: the student, wrapped or not.
            inputs: with `labels`, int64 `[batch, tokens]`.
            return_outputs: whether to return `(loss, outputs)`.
            num_items_in_batch: what to divide by; None for the positions of this pass.

        Raises:
            ConfigError: there are no labels.
        """
        if self.teacher is None or self.distillation_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ConfigError("the batch has no labels, which say what positions to distil")
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        cross_entropy = None
        if self.distillation_weight == 1:
            outputs = model(**unlabelled)
        else:
            labelled = {**inputs, "use_cache": False}
            cross_entropy, outputs = super().compute_loss(model, labelled, True, num_items_in_batch)
        with torch.no_grad():
            teacher_logits = self.teacher.eval()(**unlabelled).logits
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0 if cross_entropy is None else 1]
        mask = _predicting(inputs["labels"])
        loss = distillation_loss(
            logits,
            teacher_logits.to(logits.device),
            mask,
            temperature=self.temperature,
            normalizer=_at_least_one(mask.sum() if num_items_in_batch is None else num_items_in_batch, logits.device),
        ) * self._share(num_items_in_batch)
        if cross_entropy is not None:
            loss = self.distillation_weight * loss + (1 - self.distillation_weight) * cross_entropy
        return (loss, outputs) if return_outputs else loss

    def _share(self, num_items_in_batch: Tensor | int | None) -> int:
        """What a sum over all processes' items is multiplied with, as gradients are averaged over processes."""
        counted = self.args.average_tokens_across_devices and num_items_in_batch is not None
        if not (counted and (self.model_accepts_loss_kwargs or self.compute_loss_func)):
            return 1
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return self.accelerator.num_processes // (1 if parallelism is None else parallelism.tp_size)


class _Divergence(torch.autograd.Function):
    """`T^2 * sum KL` over the positions of a mask, and its gradient from the same pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        student_rows, teacher_rows = student.flatten(0, -2), teacher.flatten(0, -2)
        gradient = torch.zeros_like(student_rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=dtype, device=student.device)
        chunk = _CHUNK if student.device.type == "cpu" else _ACCELERATOR_CHUNK
        for rows in mask.flatten().nonzero().squeeze(-1).split(max(1, chunk // student.shape[-1])):
            # index_select copies, so the division may be in place
            log_q = student_rows.index_select(0, rows).to(dtype).div_(temperature).log_softmax(-1)
            log_p = teacher_rows.index_select(0, rows).to(dtype).div_(temperature).log_softmax(-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if gradient is not None:
                gradient.index_copy_(0, rows, log_q.exp_().sub_(p).mul_(temperature).to(gradient.dtype))
        if gradient is not None:
            ctx.save_for_backward(gradient.view(student.shape))
        return total.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # not in place: the graph may be walked twice
        return gradient * upstream, None, None, None


def _predicting(labels: Tensor) -> Tensor:
    """The positions whose next token has a label, bool `[batch, tokens]`."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[..., :-1] = labels[..., 1:] != _IGNORED
    return mask


def _at_least_one(count: Tensor | int, device: torch.device) -> Tensor:
    """A batch that predicts nothing has a loss of 0."""
    return torch.as_tensor(count, device=device).clamp(min=1)


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"the temperature of distillation is {temperature}; expected a positive number")


def _check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    sizes = [_vocabulary(teacher), _vocabulary(student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher's vocabulary has {sizes[0]} tokens, the student's {sizes[1]}; they must be the same"
        )
    own = {id(parameter) for parameter in student.parameters()}
    shared = next((name for name, parameter in teacher.named_parameters() if id(parameter) in own), None)
    if shared is not None:
        raise ConfigError(f"teacher and student share {shared}, which training would change; load the teacher anew")


def _vocabulary(model: Any) -> int | None:
    """How many tokens a model says that it has."""
    return model.config.get_text_config().vocab_size if hasattr(model, "config") else None
