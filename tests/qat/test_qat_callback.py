"""The schedule in the Trainer of Transformers, in one process."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from srd_modifier.errors import ConfigError
from srd_modifier.qat.callback import DivergedError, ScheduledQATCallback
from srd_modifier.qat.data import Collator
from srd_modifier.qat.distillation import DistillationTrainer
from srd_modifier.qat.linear import FakeQuantizedLinear, fake_quantized_modules
from srd_modifier.qat.schedule import QATSchedule

STEPS = 8
WIDTHS = [QATSchedule.linear().width(step, STEPS) for step in range(STEPS)]
TOKENS = torch.arange(1, 25).view(2, 12)


def small(seed: int = 1, **changes: Any) -> Any:
    return make_llama(seed=seed, **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, **changes})


def samples(count: int = 4 * STEPS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 64, (16,), generator=generator)} for _ in range(count)]


class Seen(TrainerCallback):
    """Notes the width that every step computes with."""

    def __init__(self) -> None:
        self.widths: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        (width,) = {module.fake_quantizer.width for module in fake_quantized_modules(model).values()}
        self.widths.append(width)


def make_trainer(
    output: Path | None,
    model: Any = None,
    *,
    schedule: QATSchedule | str = "linear",
    learned_scales: bool = False,
    ignore: Any = (),
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer_class: type[Trainer] = Trainer,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    callback = ScheduledQATCallback(schedule, group_size=32, ignore=ignore, learned_scales=learned_scales)
    return trainer_class(
        small() if model is None and "model_init" not in (more or {}) else model,
        TrainingArguments(None if output is None else str(output), **arguments),
        train_dataset=samples(),
        eval_dataset=samples(4),
        data_collator=Collator(0),
        callbacks=[callback, *callbacks],
        **(more or {}),
    )


def callback_of(trainer: Trainer) -> ScheduledQATCallback:
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, ScheduledQATCallback))
    return callback


def check_finished(trainer: Trainer) -> None:
    """The model is an ordinary one, on its grids."""
    model, grids = trainer.model, callback_of(trainer).grids
    assert {*model.state_dict()} == {*small().state_dict()}
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    assert len(grids) == 14
    for name, grid in grids.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear
        assert torch.equal(grid.nearest(module.weight), module.weight), name
        assert module.weight.unique().numel() > 16


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_step_has_the_width_of_the_schedule(tmp_path, accumulation):
    seen = Seen()
    batch = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, callbacks=(seen,), **batch)
    assert trainer.train().global_step == STEPS
    assert seen.widths == WIDTHS
    assert WIDTHS[0] == 16
    assert WIDTHS[-1] == 4
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["bits"] for entry in logged] == WIDTHS
    assert not any("bits" in entry for entry in trainer.state.log_history if "loss" not in entry)
    check_finished(trainer)


def test_steps_that_are_logged_together_have_the_width_of_the_last(tmp_path, capsys):
    trainer = make_trainer(tmp_path, logging_steps=4)
    trainer.train()
    assert [entry["bits"] for entry in trainer.state.log_history if "loss" in entry] == [WIDTHS[3], WIDTHS[7]]
    assert "'bits': '11.07'" in capsys.readouterr().out


def test_a_trained_model_is_saved_as_an_ordinary_one(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert "quantiz" not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, trainer.model.eval()(TOKENS).logits)


def test_a_checkpoint_holds_the_weights_as_they_are_trained(tmp_path):
    latent: dict[str, Tensor] = {}

    class Remember(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            if state.global_step == 6:
                latent.update({name: value.clone() for name, value in model.state_dict().items()})

    trainer = make_trainer(tmp_path, callbacks=(Remember(),), save_strategy="steps", save_steps=6)
    trainer.train()
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not loading["missing_keys"]
    assert {*loading["unexpected_keys"]} == {f"{name}.fake_quantizer.scale" for name in callback_of(trainer).grids}
    for name, tensor in model.state_dict().items():
        assert torch.equal(latent[name], tensor), name
    name, grid = next(iter(callback_of(trainer).grids.items()))
    weight = model.get_submodule(name).weight
    assert not torch.equal(grid.nearest(weight), weight)


@pytest.mark.parametrize("learned_scales", [False, True])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_resumed_training_ends_at_the_same_weights(tmp_path, at, learned_scales):
    settings = {"save_strategy": "steps", "save_steps": 1, "learned_scales": learned_scales}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    seen = Seen()
    resumed = make_trainer(tmp_path, callbacks=(seen,), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert seen.widths == WIDTHS[at:]
    check_equal(resumed.model, whole.model)
    for name, grid in callback_of(whole).grids.items():
        assert torch.equal(callback_of(resumed).grids[name].scale, grid.scale)
    check_finished(resumed)


def test_scales_are_learned(tmp_path):
    fixed, learned = (make_trainer(tmp_path, learned_scales=learned) for learned in (False, True))
    fixed.train()
    learned.train()
    check_finished(learned)
    pairs = [(grid.scale, callback_of(learned).grids[name].scale) for name, grid in callback_of(fixed).grids.items()]
    assert any(not torch.equal(one, other) for one, other in pairs)
    for _, scale in pairs:
        assert torch.equal(scale.bfloat16().float(), scale)


def test_checkpointed_activations_change_nothing(tmp_path):
    plain, checkpointed = make_trainer(tmp_path), make_trainer(tmp_path, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    check_equal(checkpointed.model, plain.model)
    check_finished(checkpointed)


def test_products_may_be_in_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    check_finished(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_is_trained_alike(tmp_path):
    plain = make_trainer(tmp_path, schedule="constant")
    compiled = make_trainer(tmp_path, schedule="constant", torch_compile=True, torch_compile_backend="aot_eager")
    plain.train()
    compiled.train()
    check_finished(compiled)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_evaluation_is_of_the_model_as_it_would_be_exported(tmp_path):
    """At a learning rate of 0 all evaluations are of the same model, whatever the width of the step before."""
    trainer = make_trainer(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == STEPS + 1
    assert len({*losses}) == 1
    assert trainer.evaluate()["eval_loss"] == losses[0]


def test_the_best_model_is_the_best_on_the_grid(tmp_path):
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=0.5,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    check_finished(trainer)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses)
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_the_loss_falls_in_distillation(tmp_path):
    trainer = make_trainer(
        tmp_path,
        small(initializer_range=0.2),
        trainer_class=DistillationTrainer,
        more={"teacher": small(initializer_range=0.2)},
        schedule="constant",
        num_train_epochs=12,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-STEPS:]) < 0.8 * sum(losses[:STEPS])
    check_finished(trainer)


def test_a_training_needs_no_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(None)
    trainer.train()
    check_finished(trainer)


def test_a_training_that_is_stopped_is_finished_with_a_warning(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path, callbacks=(Stop(),))
    with pytest.warns(UserWarning, match="training was stopped after 3 of 8 steps, before its schedule"):
        trainer.train()
    check_finished(trainer)


def test_a_whole_training_warns_of_nothing_of_ours(tmp_path):
    trainer = make_trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training was stopped")
        trainer.train()


# refusals


def test_a_second_training_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trained = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError, match="is not fake-quantized any more, because it was trained to its end or"):
        trainer.train()
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in trained.items())


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fake-quantized already: load it anew, .* one ScheduledQATCallback"):
        make_trainer(tmp_path, callbacks=(ScheduledQATCallback(group_size=32),))


def test_a_callback_that_comes_late_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    late = Trainer(small(), trainer.args, train_dataset=samples(), data_collator=Collator(0))
    late.add_callback(ScheduledQATCallback(group_size=32))
    with pytest.raises(ConfigError, match="make the Trainer with ScheduledQATCallback in `callbacks`"):
        late.train()


def test_a_model_that_is_made_anew_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, more={"model_init": lambda: small()})
    with pytest.raises(ConfigError, match="`model_init` made it anew: make another Trainer, with a model"):
        trainer.train()


def test_a_model_in_bfloat16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="float32"):
        make_trainer(tmp_path, small().bfloat16())


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no Linear module"):
        make_trainer(tmp_path, ignore="re:.*")


def test_a_group_size_that_divides_no_columns_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="group"):
        make_trainer(tmp_path, small(hidden_size=48, num_attention_heads=4, head_dim=12))


@pytest.mark.parametrize("schedule", [QATSchedule.linear(3), "0:16,0.9:8", "constant=0:4"])
def test_a_schedule_that_is_none_for_the_grid_is_refused(tmp_path, schedule):
    with pytest.raises(ConfigError, match="schedule"):
        make_trainer(tmp_path, schedule=schedule)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("saving", [True, False])
def test_a_divergence_stops_before_it_spoils_the_weights(tmp_path, saving, max_grad_norm, factor):
    class Diverging(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * factor if self.state.global_step == 5 else loss

    trainer = make_trainer(
        tmp_path,
        trainer_class=Diverging,
        max_grad_norm=max_grad_norm,
        save_strategy="steps" if saving else "no",
        save_steps=2,
    )
    (tmp_path / "checkpoint-5").mkdir(parents=True)  # of a run that was killed while it wrote
    kept = f"the last good checkpoint is {tmp_path / 'checkpoint-4'}" if saving else "there is no checkpoint yet"
    with pytest.raises(DivergedError) as refused:
        trainer.train()
    assert str(refused.value).startswith("training diverged at step 6 of 8: the loss or its gradient is not finite; ")
    assert kept in str(refused.value)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_training_goes_on_from_the_checkpoint_before_a_divergence(tmp_path):
    class DivergingOnce(Trainer):
        diverges = True

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if self.diverges and self.state.global_step == 5 else loss

    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = make_trainer(tmp_path / "whole", **saving)
    expected.train()
    trainer = make_trainer(tmp_path / "run", trainer_class=DivergingOnce, **saving)
    with pytest.raises(DivergedError):
        trainer.train()
    trainer.diverges = False
    trainer.train(resume_from_checkpoint=True)
    check_finished(trainer)
    check_equal(trainer.model, expected.model)
