import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from srd_modifier.errors import ConfigError
from srd_modifier.qat import distillation
from srd_modifier.qat.data import Collator
from srd_modifier.qat.distillation import DistillationTrainer, distillation_loss

IGNORED = -100


def small(seed: int, **changes: Any) -> Any:
    return make_llama(seed=seed, vocab_size=64, hidden_size=32, intermediate_size=48, **changes)


@pytest.fixture
def student() -> Any:
    return small(1)


@pytest.fixture
def teacher() -> Any:
    return small(2, initializer_range=0.3)


def features(lengths: tuple[int, ...] = (9, 4, 7, 2)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 64, (length,), generator=generator)} for length in lengths]


def make_trainer(model: nn.Module, output: Path, **settings: Any) -> DistillationTrainer:
    own = {name: settings.pop(name) for name in ("teacher", "temperature", "weight") if name in settings}
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return DistillationTrainer(
        model,
        TrainingArguments(str(output), **arguments),
        data_collator=Collator(0),
        train_dataset=features(),
        eval_dataset=features(),
        **own,
    )


def plain_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, normalizer: float) -> Tensor:
    """By torch's own functions, in float64."""
    log_q, log_p = ((logits[mask].double() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / normalizer


def reference(model: Any, teacher: Any, *, temperature: float, weight: float) -> Tensor:
    """The loss of `features()` as one batch."""
    batch = Collator(0)(features())
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, length in enumerate((9, 4, 7, 2)):
        mask[row, : length - 1] = True
    with torch.no_grad():
        target = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    outputs = model(**batch)
    return weight * plain_loss(outputs.logits, target, mask, temperature, 18) + (1 - weight) * outputs.loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# the function


def some_logits(dtype: torch.dtype = torch.float32, *, vocabulary: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(3, 5, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 5, generator=generator) < 0.6
    assert 0 < mask.sum() < mask.numel()
    return student.to(dtype).requires_grad_(), teacher.to(dtype), mask


@pytest.mark.parametrize("chunk", [1, 60, 1 << 22], ids=["row by row", "few rows", "at once"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_and_its_gradient_are_those_of_torch(monkeypatch, chunk, temperature, dtype):
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    student, teacher, mask = some_logits(dtype)
    loss = distillation_loss(student, teacher, mask, temperature=temperature, normalizer=7.0)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = plain_loss(student, teacher, mask, temperature, 7.0)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert loss.dtype == gradient.dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)
    assert (gradient[~mask] == 0).all()


def test_the_gradient_passes_the_finite_difference_check():
    student, teacher, mask = some_logits(torch.float64)
    assert torch.autograd.gradcheck(
        lambda logits: distillation_loss(logits, teacher, mask, temperature=2.0, normalizer=torch.tensor(3.0)), student
    )


def test_narrow_logits_are_widened():
    student, teacher, mask = some_logits(torch.bfloat16)
    loss = distillation_loss(student, teacher, mask, normalizer=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = plain_loss(exact, teacher, mask, 1.0, 1.0)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-6)


def test_only_one_tensor_of_the_logits_dtype_is_kept_for_the_backward_pass():
    student, teacher, mask = some_logits(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        distillation_loss(student, teacher, mask, temperature=2.0, normalizer=1.0)
    large = [tensor for tensor in kept if tensor.numel() > 1]
    assert [(tensor.shape, tensor.dtype) for tensor in large] == [(student.shape, torch.bfloat16)]


def test_equal_distributions_have_no_divergence():
    student, _, mask = some_logits()
    loss = distillation_loss(student, student.detach() + 5, mask, normalizer=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_a_mask_of_nothing_gives_zero():
    student, teacher, mask = some_logits()
    loss = distillation_loss(student, teacher, torch.zeros_like(mask), normalizer=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_logits_of_two_vocabularies_are_refused():
    student, teacher, mask = some_logits()
    with pytest.raises(ConfigError, match=r"the teacher's logits are \[3, 5, 22\], the student's \[3, 5, 23\]"):
        distillation_loss(student, teacher[..., 1:], mask, normalizer=1.0)


# the trainer


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.25)])
@pytest.mark.parametrize("batch", [4, 2, 1])
def test_a_batch_in_one_step_or_in_parts_has_the_same_gradient(student, teacher, tmp_path, batch, temperature, weight):
    trainer = make_trainer(
        student,
        tmp_path,
        teacher=teacher,
        temperature=temperature,
        weight=weight,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
    )
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    expected = small(1)
    loss = reference(expected, teacher, temperature=temperature, weight=weight)
    loss.backward()
    result = trainer.train()
    for name, gradient in gradients(expected).items():  # plain descent by a rate of 1
        torch.testing.assert_close(before[name] - student.get_parameter(name).detach(), gradient, rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in gradients(expected).values()) > 1e-2
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_evaluation_has_the_same_loss(student, teacher, tmp_path, weight):
    trainer = make_trainer(student, tmp_path, teacher=teacher, weight=weight, temperature=2.0)
    expected = reference(student, teacher, temperature=2.0, weight=weight).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"weight": 0.0}], ids=["no teacher", "weight 0"])
def test_without_distillation_it_is_a_plain_trainer(student, teacher, tmp_path, settings):
    trainer = make_trainer(student, tmp_path, teacher=teacher if settings else None, **settings)
    other = small(1)
    plain = Trainer(other, trainer.args, data_collator=Collator(0), train_dataset=features())
    assert trainer.train().training_loss == plain.train().training_loss
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name)), name


def test_a_student_comes_nearer_to_its_teacher(student, teacher, tmp_path):
    trainer = make_trainer(student, tmp_path, teacher=teacher, max_steps=30, optim="adamw_torch", learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 4


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_cross_entropy_is_only_computed_where_it_counts(student, teacher, tmp_path, monkeypatch, weight):
    calls = []
    original = type(student).loss_function.fget(student)
    monkeypatch.setattr(
        type(student), "loss_function", property(lambda _: lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    )
    make_trainer(student, tmp_path, teacher=teacher, weight=weight).train()
    assert len(calls) == (0 if weight == 1 else 1)


def test_the_teacher_is_neither_changed_nor_saved_nor_trained(student, teacher, tmp_path):
    teacher = teacher.bfloat16().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer(student, tmp_path, teacher=teacher, optim="adamw_torch", save_strategy="steps", save_steps=1)
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in student.parameters()}
    saved = type(student).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in small(1).state_dict().items()
    }


def test_a_model_that_takes_no_number_of_items_is_accumulated_all_the_same(student, teacher, tmp_path):
    student.accepts_loss_kwargs = False
    trainer = make_trainer(
        student, tmp_path, teacher=teacher, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    expected = reference(small(1), teacher, temperature=1.0, weight=1.0).item()
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


def test_a_batch_that_predicts_nothing_has_a_loss_of_zero(student, teacher, tmp_path):
    trainer = make_trainer(student, tmp_path, teacher=teacher)
    batch = Collator(0)(features((1, 1)))
    assert trainer.compute_loss(student, batch).item() == 0
    assert trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(0)).item() == 0


def test_a_batch_needs_labels(student, teacher, tmp_path):
    trainer = make_trainer(student, tmp_path, teacher=teacher)
    with pytest.raises(ConfigError, match="the batch has no labels"):
        trainer.compute_loss(student, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_positive_and_finite(student, teacher, tmp_path, temperature):
    with pytest.raises(ConfigError, match=rf"the temperature of distillation is {temperature}; expected a positive"):
        make_trainer(student, tmp_path, teacher=teacher, temperature=temperature)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_is_a_share(student, teacher, tmp_path, weight):
    with pytest.raises(ConfigError, match=rf"the weight of distillation is {weight}; expected a number from 0 to 1"):
        make_trainer(student, tmp_path, teacher=teacher, weight=weight)


def test_a_teacher_of_another_vocabulary_is_refused(student, tmp_path):
    with pytest.raises(ConfigError, match="the teacher's vocabulary has 80 tokens, the student's 64"):
        make_trainer(student, tmp_path, teacher=make_llama(vocab_size=80))


def test_a_teacher_must_not_be_the_student(student, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher and student share model\.embed_tokens\.weight"):
        make_trainer(student, tmp_path, teacher=student)


def test_one_process_with_several_gpus_is_refused(student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ConfigError, match="one process for each GPU, but this one has 2; start it with torchrun"):
        make_trainer(student, tmp_path, teacher=teacher)


PROCESS = """
import sys
from pathlib import Path
import torch
from test_distillation import make_trainer, small
model = small(1)
trainer = make_trainer(
    model, Path(sys.argv[1]), teacher=small(2, initializer_range=0.3), temperature=2.0, weight=float(sys.argv[2]),
    per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo", logging_steps=1,
)
trainer.train()
loss = trainer.state.log_history[0]["loss"]  # of all processes
if trainer.is_world_process_zero():
    torch.save({"loss": loss, "state": model.state_dict()}, Path(sys.argv[1]) / "result.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_two_processes_make_the_step_that_one_makes(student, teacher, tmp_path, weight):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent / "helpers"), str(here.parents[1])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(weight)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    result = torch.load(tmp_path / "result.pt")
    trained = make_trainer(student, tmp_path / "one", teacher=teacher, temperature=2.0, weight=weight).train()
    assert result["loss"] == pytest.approx(trained.training_loss, rel=1e-5)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(result["state"][name], tensor, rtol=0, atol=1e-6, msg=name)
