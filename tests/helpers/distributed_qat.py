"""One of the processes that train a small model together, and what they come to; run by `test_qat_distributed.py`.

    python distributed_qat.py ddp|fsdp1|fsdp2 DIRECTORY

Accelerate takes FSDP for accelerators alone: of a CPU it makes DDP without a word. torch shards on a CPU all the same,
so `shard_on_cpu` takes the limit away; all else is the Trainer's own way.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from random_models import make_llama
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from srd_modifier.errors import ConfigError
from srd_modifier.qat.callback import DivergedError, ScheduledQATCallback
from srd_modifier.qat.data import Collator
from srd_modifier.qat.distillation import DistillationTrainer
from srd_modifier.qat.linear import fake_quantize, fake_quantized_modules, finish
from srd_modifier.qat.start import nearest_w4

BATCH, SAVED_AT = 4, 4
WRAPPED = "_fsdp_wrapped_module."


def small(seed: int = 1) -> Any:
    return make_llama(seed=seed, vocab_size=64, hidden_size=32, intermediate_size=64)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 64, (16,), generator=generator)} for _ in range(8 * BATCH)]


class Diverging(DistillationTrainer):
    """Has a loss that is no number, in one process and one step."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 5 and self.args.process_index == 1 else loss


class Widths(ScheduledQATCallback):
    """Notes the width that each step computes with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("linear", group_size=32, **settings)
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        (width,) = {module.fake_quantizer.width for module in fake_quantized_modules(model).values()}
        self.seen.append(width)
        super().on_pre_optimizer_step(*args, model=model, **kwargs)


def make_trainer(
    output: Path,
    *,
    processes: int = 1,
    trainer_class: type[DistillationTrainer] = DistillationTrainer,
    teacher: nn.Module | None = None,
    learned_scales: bool = False,
    **settings: Any,
) -> tuple[DistillationTrainer, Widths]:
    callback = Widths(learned_scales=learned_scales)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": BATCH // processes,
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,  # what is rounding in a gradient stays rounding in the step
        "logging_steps": 1,
        "save_steps": SAVED_AT,
        "use_cpu": True,
        "ddp_timeout": 60,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    trainer = trainer_class(
        small(),
        TrainingArguments(str(output), **arguments),
        train_dataset=samples(),
        data_collator=Collator(0),
        callbacks=[callback],
        teacher=teacher,
    )
    return trainer, callback


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            # FSDP 1 knows no numbered CPU
            self.device = PartialState._shared_state["device"] = torch.device("cpu")
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def sharded(version: int, **config: Any) -> dict[str, Any]:
    """Arguments of a Trainer that shards every layer."""
    config |= {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if version == 1:
        config["sync_module_states"] = False  # is done on accelerators only
    return {"fsdp": True, "fsdp_config": config}


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    with FullyShardedDataParallel.summon_full_params(model):
        yield


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model, gathered, by their own names."""
    with gathered(model):
        return {
            name.replace(WRAPPED, ""): (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.named_parameters()
        }


def refusal(output: Path, **settings: Any) -> str:
    try:
        make_trainer(output, processes=2, **settings)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def divergence(output: Path, **settings: Any) -> str:
    trainer, _ = make_trainer(output, processes=2, trainer_class=Diverging, **settings)
    try:
        trainer.train()
    except DivergedError as error:
        return str(error)
    return "nothing was refused"


def report(trainer: DistillationTrainer, callback: Widths) -> dict[str, Any]:
    return {
        "widths": callback.seen,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "bits": [entry["bits"] for entry in trainer.state.log_history if "loss" in entry],
        "grids": {name: (grid.scale, grid.low, grid.high) for name, grid in callback.grids.items()},
        "state": whole_state(trainer.model),
        "left": len(fake_quantized_modules(trainer.model)),
    }


def run_ddp(folder: Path) -> dict[str, Any]:
    found = {}
    trainer, callback = make_trainer(folder / "plain", processes=2)
    trainer.train()
    found["plain"] = report(trainer, callback)
    trainer, callback = make_trainer(folder / "distilled", processes=2, teacher=small(2), gradient_accumulation_steps=2)
    trainer.train()
    found["distilled"] = report(trainer, callback)
    trainer, callback = make_trainer(folder / "learned", processes=2, learned_scales=True)
    trainer.train()
    found["learned"] = report(trainer, callback)
    found["diverged"] = divergence(folder / "diverged")
    return found


def run_fsdp2(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["learned"] = refusal(folder / "refused", learned_scales=True, **sharded(2))
    found["efficient"] = refusal(folder / "refused", **sharded(2, cpu_ram_efficient_loading=True))
    trainer, callback = make_trainer(folder / "plain", processes=2, **sharded(2))
    trainer.train()
    found["plain"] = report(trainer, callback)
    trainer.save_model(str(folder / "model"))
    trainer, callback = make_trainer(folder / "plain", processes=2, **sharded(2))
    trainer.train(resume_from_checkpoint=str(folder / "plain" / f"checkpoint-{SAVED_AT}"))
    found["resumed"] = report(trainer, callback)
    trainer, callback = make_trainer(folder / "distilled", processes=2, teacher=small(2), **sharded(2))
    trainer.train()
    found["distilled"] = report(trainer, callback)
    trainer, callback = make_trainer(folder / "bf16", processes=2, bf16=True, **sharded(2))
    trainer.train()
    found["bf16"] = report(trainer, callback)
    found["diverged"] = divergence(folder / "diverged", **sharded(2))
    found["alone"] = each_module_alone()
    return found


def run_fsdp1(folder: Path) -> dict[str, Any]:
    """Without a checkpoint: FSDP 1 cannot gather a state dict on a CPU."""
    found: dict[str, Any] = {}
    for name, more in (("plain", {}), ("flat", {"use_orig_params": False})):
        trainer, callback = make_trainer(folder / name, processes=2, save_strategy="no", **sharded(1, **more))
        trainer.train()
        found[name] = report(trainer, callback)
    trainer, callback = make_trainer(folder / "bf16", processes=2, save_strategy="no", bf16=True, **sharded(1))
    trainer.train()
    buffers = {name: buffer.dtype for name, buffer in trainer.model.named_buffers()}
    found["bf16"] = {**report(trainer, callback), "buffers": {*buffers.values()}}
    found["diverged"] = divergence(folder / "diverged", save_strategy="no", **sharded(1))
    return found


def each_module_alone() -> dict[str, Any]:
    """Modules that FSDP 2 shards one by one have a class of its making."""
    model = small()
    fake_quantize(model, nearest_w4(model, group_size=32).grids)
    for module in [*fake_quantized_modules(model).values(), model]:
        fully_shard(module)
    model(input_ids=samples()[0]["input_ids"][None], labels=samples()[0]["input_ids"][None]).loss.backward()
    grids = finish(model)
    batch = samples()[1]["input_ids"][None]
    return {
        "grids": {name: (grid.scale, grid.low, grid.high) for name, grid in grids.items()},
        "state": whole_state(model),
        "loss": model(input_ids=batch, labels=batch).loss.item(),
        "left": len(fake_quantized_modules(model)),
        "classes": {type(model.get_submodule(name)).__name__ for name in grids},
    }


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if kind != "ddp":
        shard_on_cpu()
    found = {"ddp": run_ddp, "fsdp1": run_fsdp1, "fsdp2": run_fsdp2}[kind](folder)
    rank = torch.distributed.get_rank()
    torch.save(found, folder / f"found-{rank}.pt")
    print(json.dumps({"rank": rank, "found": sorted(found)}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
