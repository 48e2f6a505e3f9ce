"""A whole training: what it writes, that it can be stopped anywhere, and what it refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import TINY_LLAMA, make_llama, save_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState

from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.gguf import build_model
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.qat import train as train_module
from srd_modifier.qat.callback import DivergedError
from srd_modifier.qat.checkpoints import last_checkpoint
from srd_modifier.qat.data import Samples
from srd_modifier.qat.exports.destination import Destination
from srd_modifier.qat.fake_quantizer import FakeQuantizer
from srd_modifier.qat.schedule import QATSchedule
from srd_modifier.qat.settings import TrainingSettings
from srd_modifier.qat.train import Data, train
from srd_modifier.transformers import load_corrected

DEMO = Path(__file__).parents[2] / "examples" / "text" / "demo.txt"

STEPS, BATCH, MICRO, MODULES = 6, 4, 2, 14

# a learning rate at which many weights come to another level
SETTINGS = TrainingSettings(
    schedule="linear",
    start="nearest",
    group_size=32,
    learning_rate=2e-3,
    batch_size=BATCH,
    micro_batch_size=MICRO,
    num_samples=STEPS * BATCH,
    max_seq_length=32,
)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # rows of whole K-quant blocks


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(make_llama(), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_model(make_llama(**WIDE), tmp_path_factory.mktemp("models") / "wide")


def run(model, output, settings=SETTINGS, *, exports=("bf16",), data=None, **options):
    given = {"device": "cpu", "save_steps": 2, **options}
    destinations = [Destination.parse(word) for word in exports]
    return train(str(model), data or Data(text=DEMO), settings, output, exports=destinations, **given)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """Trained without a stop: for reading only."""
    return run(small, tmp_path_factory.mktemp("straight") / "out", exports=("bf16", "w4a16", "srd"))


def watch(monkeypatch, callback):
    """Add a callback to every Trainer, behind the one of the schedule."""
    original = train_module._trainer

    def trainer(*arguments):
        made, scheduled = original(*arguments)
        made.add_callback(callback)
        return made, scheduled

    monkeypatch.setattr(train_module, "_trainer", trainer)


def record(output):
    return json.loads((output / "training.json").read_text())


def losses(output):
    return [(entry["step"], entry["loss"], entry["bits"]) for entry in record(output)["history"] if "loss" in entry]


def tensors(directory):
    return load_file(directory / "model.safetensors")


def assert_same(first, second, exports=("bf16", "w4a16")):
    """Two trainings have the same weights and the same losses, bit for bit."""
    assert losses(first) == losses(second)
    for name in exports:
        own, other = tensors(first / name), tensors(second / name)
        assert own.keys() == other.keys()
        for tensor in own:
            assert torch.equal(own[tensor], other[tensor]), tensor


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def load(directory, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


# the whole


def test_everything_is_written(straight):
    files = {path.name for path in straight.output.iterdir()}
    assert files == {"training.json", "loss.png", "samples.npy", "checkpoints", "bf16", "w4a16", "srd"}
    assert straight.exports == tuple(straight.output / name for name in ("bf16", "w4a16", "srd"))
    assert (straight.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (straight.steps, straight.samples, straight.notes) == (STEPS, STEPS * BATCH, ())
    assert [step for step, *_ in losses(straight.output)] == list(range(1, STEPS + 1))
    assert straight.loss == losses(straight.output)[-1][1]


def test_the_record(straight, small):
    written = record(straight.output)
    assert written["model"] == str(small)
    assert written["data"] == str(DEMO)
    assert written["settings"] == SETTINGS.as_dict()
    assert (written["steps"], written["samples"]) == (STEPS, STEPS * BATCH)
    assert written["versions"]["torch"] == torch.__version__


def test_training_moves_weights_to_other_levels(straight, small, tmp_path):
    run(small, tmp_path / "out", replace(SETTINGS, learning_rate=1e-12), exports=["w4a16"])
    before, after = tensors(tmp_path / "out" / "w4a16"), tensors(straight.output / "w4a16")
    packed = [name for name in before if name.endswith("weight_packed")]
    assert len(packed) == MODULES
    assert not any(torch.equal(before[name], after[name]) for name in packed)


def test_what_is_not_quantized_stays(straight, small):
    original, trained = tensors(small), tensors(straight.output / "bf16")
    same = {name for name in original if torch.equal(original[name], trained[name])}
    assert same == {name for name in original if "proj" not in name}


def test_all_is_trained_if_asked(small, tmp_path):
    done = run(small, tmp_path / "out", replace(SETTINGS, train="all"))
    original, trained = tensors(small), tensors(done.exports[0])
    assert not [name for name in original if torch.equal(original[name], trained[name])]


def test_exports_tell_nothing_of_the_training(straight):
    for directory in straight.exports:
        assert not [name for name in tensors(directory) if "fake" in name or "log_factor" in name]
        assert {type(module) for module in load(directory).modules() if isinstance(module, nn.Linear)} <= {nn.Linear}


def test_w4a16_computes_what_the_trained_model_does(straight):
    dense, packed = (load(straight.output / name) for name in ("bf16", "w4a16"))
    token_ids = torch.randint(4096, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(dense(token_ids).logits, packed(token_ids).logits)


def test_srd_leads_back_to_the_original(straight, small):
    original = load(small, torch.float32)
    trained = load(straight.output / "bf16", torch.float32)
    corrected = load_corrected(straight.output / "srd", alpha=1.0, dtype=torch.float32)
    for name in linear_names(original):
        target = original.get_submodule(name).weight
        lost = (trained.get_submodule(name).weight - target).abs().amax()
        assert (corrected.get_submodule(name).weight - target).abs().amax() < lost / 100


def test_self_written_text_is_trained_on(small, tmp_path, monkeypatch):
    done = run(small, tmp_path / "out", data=Data(dataset="self"))
    assert (done.samples, done.steps) == (STEPS * BATCH, STEPS)
    shutil.rmtree(tmp_path / "out" / "bf16")
    monkeypatch.setattr(train_module, "from_model", pytest.fail)  # writing it again would be hours
    run(small, tmp_path / "out", data=Data(dataset="self"), resume=True)
    assert (tmp_path / "out" / "bf16").is_dir()


# the width


SCHEDULES = ["linear", "cosine", "step", "constant", "0:16,0.3:9.5,0.8:4", "step=0:16,0.2:7,0.55:4"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_width_of_every_forward_pass_is_the_schedules(schedule, small, tmp_path, monkeypatch):
    seen, current = [], []
    forward = FakeQuantizer.forward

    def recorded(self, weight):
        current.append(self.width)
        return forward(self, weight)

    class Watcher(TrainerCallback):
        def on_step_end(self, *arguments, **_):
            seen.append(list(current))
            current.clear()

    monkeypatch.setattr(FakeQuantizer, "forward", recorded)
    watch(monkeypatch, Watcher())
    run(small, tmp_path / "out", replace(SETTINGS, schedule=schedule, num_samples=11 * BATCH), exports=())
    expected = [QATSchedule.parse(schedule).width(step, 11) for step in range(11)]
    # every module in every micro batch
    assert seen == [[width] * (MODULES * BATCH // MICRO) for width in expected]
    assert expected[-1] == 4
    assert [bits for *_, bits in losses(tmp_path / "out")] == expected


def test_a_fraction_of_an_epoch_ends_at_the_last_width(small, tmp_path):
    done = run(small, tmp_path / "out", replace(SETTINGS, epochs=1.4, num_samples=23), exports=())
    assert done.steps == 9
    expected = [QATSchedule.linear().width(step, 9) for step in range(9)]
    assert [bits for *_, bits in losses(done.output)] == expected


# stop and resume


class Stop(TrainerCallback):
    """Interrupts a training at an event of a step, counted from 0."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, arguments, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(model, output, callback, settings=SETTINGS, **options):
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, callback)
        with pytest.raises(KeyboardInterrupt):
            run(model, output, settings, **options)


MOMENTS = [
    ("on_train_begin", 0),
    ("on_step_begin", 0),
    ("on_substep_end", 1),
    ("on_step_end", 2),
    ("on_save", 2),
    ("on_step_begin", 3),
    ("on_pre_optimizer_step", 4),
    ("on_optimizer_step", 4),
    ("on_step_end", 6),
    ("on_save", 6),
    ("on_train_end", 6),
]


@pytest.mark.parametrize(("event", "step"), MOMENTS, ids=[f"{event}-{step}" for event, step in MOMENTS])
def test_stopping_anywhere_changes_nothing(event, step, straight, small, tmp_path):
    stopped(small, tmp_path / "out", Stop(event, step))
    assert "history" not in record(tmp_path / "out")
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True)
    assert_same(tmp_path / "out", straight.output)


def test_stopping_after_every_step_changes_nothing(straight, small, tmp_path):
    for step in range(1, STEPS):
        stopped(small, tmp_path / "out", Stop("on_step_begin", step), save_steps=1, resume=step > 1)
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), save_steps=1, resume=True)
    assert_same(tmp_path / "out", straight.output)


VARIANTS = {
    "learned": replace(SETTINGS, scales="learned"),
    "all": replace(SETTINGS, train="all", distill=0.5, temperature=2.0, schedule="cosine"),
    "two epochs": replace(SETTINGS, epochs=2, num_samples=STEPS * BATCH // 2, distill=0.0),
    "bfloat16": replace(SETTINGS, products="bfloat16"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stopping_changes_nothing_with(name, small, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(small, whole, VARIANTS[name], exports=("bf16", "w4a16"))
    stopped(small, parted, Stop("on_step_begin", 3), VARIANTS[name])
    run(small, parted, VARIANTS[name], exports=("bf16", "w4a16"), resume=True)
    assert_same(whole, parted)


def test_learned_scales_are_others(straight, small, tmp_path):
    # on the grid from the first step, or small gradients would leave the bfloat16 scales as they are
    settings = replace(SETTINGS, scales="learned", schedule="constant")
    run(small, tmp_path / "out", settings, exports=["w4a16"])
    before, after = tensors(straight.output / "w4a16"), tensors(tmp_path / "out" / "w4a16")
    scales = [name for name in before if name.endswith("weight_scale")]
    assert len(scales) == MODULES
    assert not any(torch.equal(before[name], after[name]) for name in scales)


def test_stopping_before_an_export_changes_nothing(straight, small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "out")
    assert not (tmp_path / "out" / "bf16").exists()
    done = run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True)
    assert (done.steps, done.loss) == (straight.steps, straight.loss)
    assert_same(tmp_path / "out", straight.output)


def break_off(patch, method, step):
    """Stop a Trainer while it writes the checkpoint of a step."""
    original = getattr(Trainer, method)

    def broken(self, *arguments, **options):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    patch.setattr(Trainer, method, broken)


@pytest.mark.parametrize("method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(method, straight, small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_off(patch, method, 4)
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out" / "checkpoints").name == "checkpoint-2"
    said = []
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True, say=said.append)
    assert f"going on from {tmp_path / 'out' / 'checkpoints' / 'checkpoint-2'}" in said
    assert_same(tmp_path / "out", straight.output)


@pytest.mark.parametrize("text", ["", '{"best_global_step": null, "log_his'])
def test_a_state_that_is_not_whole_is_passed_over(text, straight, small, tmp_path, monkeypatch):
    original = TrainerState.save_to_json

    def cut(self, path):
        original(self, path)
        if self.global_step == 4:
            Path(path).write_text(text)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", cut)
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out" / "checkpoints").name == "checkpoint-2"
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True)
    assert_same(tmp_path / "out", straight.output)


CHILD = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_qat_train import run
torch.set_num_threads(1)
run(sys.argv[2], __import__("pathlib").Path(sys.argv[3]), save_steps=1, resume=sys.argv[4] == "resume")
"""


def start_child(model, output, *, resume):
    search = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])])
    arguments = [str(Path(__file__).parent), str(model), str(output), "resume" if resume else "begin"]
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killing_changes_nothing(straight, small, tmp_path):
    """At moments while checkpoints are written, whenever they are on this machine: each has to do."""
    chance = random.Random(0)
    output = tmp_path / "out"
    for step in (1, 3, 5):
        child = start_child(small, output, resume=output.exists())
        while child.poll() is None and not (output / "checkpoints" / f"checkpoint-{step}").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL)
    run(small, output, exports=("bf16", "w4a16"), save_steps=1, resume=True)
    assert_same(output, straight.output)


def test_a_training_is_resumed_with_the_text_that_it_began_with(straight, small, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(DEMO, text)
    stopped(small, tmp_path / "out", Stop("on_step_begin", 3), data=Data(text=text))
    text.write_text("something else")
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), data=Data(text=text), resume=True)
    assert_same(tmp_path / "out", straight.output)


def test_another_save_steps_changes_nothing(straight, small, tmp_path):
    stopped(small, tmp_path / "out", Stop("on_step_begin", 3))
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), save_steps=5, resume=True)
    assert_same(tmp_path / "out", straight.output)


def test_two_checkpoints_are_kept(straight):
    assert sorted(path.name for path in (straight.output / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_training_that_was_stopped_before_its_samples(straight, small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training.json"]
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True)
    assert_same(tmp_path / "out", straight.output)


# starts


def test_a_start_from_a_checkpoint(straight, small, tmp_path):
    """Its own group size is taken, also when the training is resumed."""
    settings = replace(SETTINGS, start=str(straight.output / "w4a16"), group_size=64)
    run(small, tmp_path / "whole", settings, exports=("bf16", "w4a16"))
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    assert tensors(tmp_path / "whole" / "w4a16")[scale].shape == (128, 2)
    stopped(small, tmp_path / "parted", Stop("on_step_begin", 3), settings)
    run(small, tmp_path / "parted", settings, exports=("bf16", "w4a16"), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parted")


def gguf_weights(path):
    return build_model(GGUFFile(path), torch.float32).state_dict()


def assert_gguf_holds(path, dense):
    """The file's weights are those of the bfloat16 export, but for their rounding."""
    trained, stored = gguf_weights(path), load(dense, torch.float32).state_dict()
    assert trained.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(trained[name].bfloat16().float(), tensor), name


GGUF_SETTINGS = replace(SETTINGS, grid="gguf:Q4_K_M")


@pytest.fixture(scope="module")
def straight_gguf(wide, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "out"
    return run(wide, output, GGUF_SETTINGS, exports=("bf16", "gguf:Q4_K_M", "gguf:Q8_0"))


def test_a_gguf_grid(straight_gguf, wide):
    dense, own, converted = straight_gguf.exports
    assert [path.name for path in straight_gguf.exports] == ["bf16", "wide-Q4_K_M.gguf", "wide-Q8_0.gguf"]
    assert_gguf_holds(own, dense)
    assert straight_gguf.notes == (
        "gguf:Q8_0 is rounded by ggml from the trained model, which was trained for gguf:Q4_K_M",
    )
    before, after, rounded = (gguf_weights(path) for path in (straight_gguf.output / "start.gguf", own, converted))
    projections = [name for name in before if "proj" in name]
    assert len(projections) == MODULES
    for name in projections:
        assert not torch.equal(before[name], after[name])
        assert torch.allclose(after[name], rounded[name], atol=1e-3)


@pytest.mark.parametrize("step", [0, 3])
def test_stopping_on_a_gguf_grid_changes_nothing(step, straight_gguf, wide, tmp_path):
    stopped(wide, tmp_path / "out", Stop("on_step_begin", step), GGUF_SETTINGS)
    made = (tmp_path / "out" / "start.gguf").stat()
    run(wide, tmp_path / "out", GGUF_SETTINGS, exports=("bf16", "gguf:Q4_K_M"), resume=True)
    assert (tmp_path / "out" / "start.gguf").stat() == made
    assert_same(tmp_path / "out", straight_gguf.output, ["bf16"])
    own = tmp_path / "out" / "wide-Q4_K_M.gguf"
    assert own.read_bytes() == straight_gguf.exports[1].read_bytes()


def test_a_schedule_that_ends_at_another_width_than_the_blocks(wide, tmp_path):
    settings = replace(GGUF_SETTINGS, schedule="0:16,0.9:6")
    with pytest.raises(ConfigError, match="ends at 6 bits, but the grid has 4"):
        run(wide, tmp_path / "out", settings)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["w4a16", "gguf:Q4_K_M"])
def test_a_calibrated_start(grid, tmp_path):
    settings = replace(SETTINGS, grid=grid, start="calibrated", group_size=64, learning_rate=1e-4)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = run(TINY_LLAMA, whole, settings, exports=("bf16", grid), save_steps=3)
    # as a stop after the third step leaves it, without calibrating again
    shutil.copytree(whole, parted)
    for path in (parted / "checkpoints" / "checkpoint-6", parted / "bf16"):
        shutil.rmtree(path)
    run(TINY_LLAMA, parted, settings, exports=("bf16", grid), save_steps=3, resume=True)
    assert_same(whole, parted, ["bf16"])
    if grid != "w4a16":
        assert_gguf_holds(done.exports[1], done.exports[0])


# nothing is left behind


def test_a_training_leaves_the_process_as_it_was(small, tmp_path):
    from accelerate.state import AcceleratorState, PartialState
    from transformers.utils import logging

    def state():
        return {
            "environment": dict(os.environ),
            "torch": torch.get_rng_state().tolist(),
            "numpy": [str(part) for part in np.random.get_state()],
            "python": random.getstate(),
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
            "verbosity": logging.get_verbosity(),
            "bars": logging.is_progress_bar_enabled(),
            "accelerate": (AcceleratorState._shared_state, PartialState._shared_state),
        }

    run(small, tmp_path / "first", exports=())  # what libraries do when they are imported is no matter
    torch.manual_seed(123)
    before = state()
    run(small, tmp_path / "second", exports=("bf16", "w4a16", "srd"))
    assert state() == before
    assert before["accelerate"] == ({}, {})
    stopped(small, tmp_path / "third", Stop("on_step_begin", 3))
    assert state() == before


# training that diverges


class Spoil(TrainerCallback):
    """Puts a NaN into a weight before a step, counted from 0."""

    def __init__(self, step):
        self.step = step

    @torch.no_grad()
    def on_step_begin(self, arguments, state, control, *, model, **_):
        if state.global_step == self.step:
            model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = float("nan")


def test_a_loss_that_is_no_number(straight, small, tmp_path, monkeypatch):
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    with monkeypatch.context() as patch:
        watch(patch, Spoil(3))
        with pytest.raises(DivergedError) as raised:
            run(small, tmp_path / "out")
    assert str(raised.value) == (
        "training diverged at step 4 of 6: the loss or its gradient is not finite; "
        f"the last good checkpoint is {checkpoint}; lower the learning rate"
    )
    assert not (tmp_path / "out" / "bf16").exists()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(checkpoint).values())
    run(small, tmp_path / "out", exports=("bf16", "w4a16"), resume=True)
    assert_same(tmp_path / "out", straight.output)


def test_a_loss_that_is_no_number_at_once(small, tmp_path, monkeypatch):
    watch(monkeypatch, Spoil(0))
    with pytest.raises(DivergedError, match=r"diverged at step 1 of 6: .*; there is no checkpoint yet \(save_steps\)"):
        run(small, tmp_path / "out")


def test_a_learning_rate_that_is_far_too_high(small, tmp_path):
    with pytest.raises(DivergedError, match=r"training diverged at step \d of 6: .* lower the learning rate") as raised:
        run(small, tmp_path / "out", replace(SETTINGS, learning_rate=1e30), save_steps=1)
    checkpoint = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert f"the last good checkpoint is {checkpoint};" in str(raised.value)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(checkpoint).values())


# resuming what is not there, or something else


def test_resuming_nothing(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"out holds no training to resume: there is no training\.json"):
        run(small, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


OTHERS = [
    ("learning_rate", replace(SETTINGS, learning_rate=1e-3), "learning_rate 0.002, not 0.001"),
    ("schedule", replace(SETTINGS, schedule="cosine"), "schedule 'linear', not 'cosine'"),
    ("scales", replace(SETTINGS, scales="learned"), "scales 'searched', not 'learned'"),
    ("ignore", replace(SETTINGS, ignore=("re:.*k_proj",)), r"ignore \[\], not \['re:\.\*k_proj'\]"),
    ("num_samples", replace(SETTINGS, num_samples=None), "num_samples 24, not None"),
    ("seed", replace(SETTINGS, seed=1), "seed 0, not 1"),
]


@pytest.mark.parametrize(("settings", "message"), [other[1:] for other in OTHERS], ids=[other[0] for other in OTHERS])
def test_resuming_with_another_setting(settings, message, straight, small):
    before = (straight.output / "training.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"training\.json: the training was begun with {message}; resume it with"):
        run(small, straight.output, settings, resume=True)
    assert (straight.output / "training.json").read_bytes() == before


def test_resuming_with_another_model(straight, wide):
    with pytest.raises(ConfigError, match=r"the training was begun with model '.*small', not '.*wide'"):
        run(wide, straight.output, resume=True)


def test_resuming_with_other_data(straight, small):
    with pytest.raises(ConfigError, match=r"the training was begun with data '.*demo\.txt', not 'self'"):
        run(small, straight.output, data=Data(dataset="self"), resume=True)


def test_resuming_a_damaged_record(straight, small, tmp_path):
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training\.json"):
        run(small, tmp_path, resume=True)


# output that is there


def test_an_output_that_is_there(straight, small):
    with pytest.raises(CheckpointError, match="out already exists; choose another directory, or pass --resume or --ov"):
        run(small, straight.output)


def test_an_output_that_is_a_file(small, tmp_path):
    (tmp_path / "out").write_text("text")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CheckpointError, match="out is a file, expected a directory that does not exist yet"):
            run(small, tmp_path / "out", **options)


def test_an_empty_directory_is_filled(small, tmp_path):
    run(small, tmp_path, exports=())
    assert (tmp_path / "training.json").is_file()


def test_a_training_is_overwritten_if_asked(straight, small, tmp_path):
    output = Path(shutil.copytree(straight.output, tmp_path / "out"))
    run(small, output, replace(SETTINGS, num_samples=BATCH), exports=(), overwrite=True)
    assert {path.name for path in output.iterdir()} == {"training.json", "loss.png", "samples.npy", "checkpoints"}
    assert len(losses(output)) == 1


def test_what_is_no_training_is_not_overwritten(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not the directory of a training and is not overwritten"):
        run(small, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_training_stays_until_its_successor_can_begin(straight, small, tmp_path):
    output = Path(shutil.copytree(straight.output, tmp_path / "out"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SRDError, match="there is no text to train on"):
        run(small, output, data=Data(text=tmp_path / "empty.txt"), overwrite=True)
    with pytest.raises(SRDError, match="there is no such directory"):
        run(tmp_path / "nowhere", output, overwrite=True)
    assert_same(output, straight.output)


def test_a_model_is_not_overwritten_by_its_own_training(straight, tmp_path):
    output = Path(shutil.copytree(straight.output, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"bf16 is in .*out, which would be overwritten; choose another"):
        run(output / "bf16", output, overwrite=True)
    assert_same(output, straight.output)


# input at fault: nothing is written


def refused(model, output, settings=SETTINGS, **options):
    with pytest.raises(SRDError) as raised:
        run(model, output, settings, **options)
    assert not output.exists()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_model_that_is_not_there(tmp_path):
    assert "there is no such directory" in refused(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", ["w4a16", "srd"])
def test_a_model_that_is_quantized(name, straight, tmp_path):
    model = straight.output / name
    assert refused(model, tmp_path / "out") == f"{model} is quantized already; start from the original model"


def test_an_empty_text(small, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    message = refused(small, tmp_path / "out", data=Data(text=tmp_path / "empty.txt"))
    assert message == f"{tmp_path / 'empty.txt'}: there is no text to train on"


def test_a_text_that_is_not_there(small, tmp_path):
    message = refused(small, tmp_path / "out", data=Data(text=tmp_path / "nowhere.txt"))
    assert message == f"{tmp_path / 'nowhere.txt'}: there is no such file or folder to train on"


def test_no_data(small, tmp_path):
    assert "there is nothing to train on" in refused(small, tmp_path / "out", data=Data())


def test_a_sequence_longer_than_the_context(small, tmp_path):
    message = refused(small, tmp_path / "out", replace(SETTINGS, max_seq_length=300))
    assert message == "max_seq_length is 300, but the model's context has 256 tokens; ask for at most that"


def test_a_start_that_is_not_there(small, tmp_path):
    message = refused(small, tmp_path / "out", replace(SETTINGS, start="callibrated"))
    assert message.startswith("start is 'callibrated'; expected calibrated, nearest, or a W4A16 checkpoint or GGUF")


def test_an_srd_export_of_what_leads_nowhere(small, tmp_path):
    message = refused(small, tmp_path / "out", replace(SETTINGS, train="all"), exports=["srd"])
    assert message.startswith("the residual of srd leads back to the original model")
    assert message.endswith("set train to linear")


@pytest.mark.parametrize("export", ["w4a16", "srd"])
def test_an_export_of_another_grid(export, small, tmp_path):
    message = refused(small, tmp_path / "out", replace(SETTINGS, grid="gguf:Q8_0"), exports=[export])
    assert message == f"{export} cannot hold weights that were trained for gguf:Q8_0: set grid to w4a16"


def test_a_gguf_export_of_a_model_that_has_no_gguf(small, tmp_path):
    model = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "architectures": ["Unheard"]}))
    message = refused(model, tmp_path / "out", exports=["gguf:Q8_0"])
    assert "models of type 'unheard_of' cannot" in message


EXPORTS = [
    ("int4", "there is no export 'int4': give bf16, w4a16, srd, or gguf: and a type"),
    ("gguf:Q9", "there is no GGUF type 'Q9'; there are F32, F16"),
    ("gguf:", "there is no GGUF type ''"),
    ("", "there is no export ''"),
]


@pytest.mark.parametrize(("text", "message"), EXPORTS)
def test_an_export_that_is_unknown(text, message):
    with pytest.raises(ConfigError, match=message):
        Destination.parse(text)


@pytest.mark.parametrize("text", ["bf16", "w4a16", "srd", "gguf:Q4_K_M"])
def test_an_export_is_written_as_it_is_read(text):
    assert str(Destination.parse(f" {text} ")) == text


LIBRARIES = [
    ("accelerate", SETTINGS, "qat"),
    ("matplotlib", SETTINGS, "qat"),
    ("llmcompressor", replace(SETTINGS, start="calibrated"), "quantize"),
    ("xllamacpp", GGUF_SETTINGS, "gguf"),
]


@pytest.mark.parametrize(("library", "settings", "extra"), LIBRARIES, ids=[library for library, *_ in LIBRARIES])
def test_a_library_that_is_missing(library, settings, extra, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    message = refused(small, tmp_path / "out", settings)
    assert message == f"{library} is not installed; it comes with: pip install 'srd-modifier[{extra}]'"


def test_several_processes(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is started by a script of its own" in refused(small, tmp_path / "out")


def test_progress_is_shown(small, tmp_path):
    shown, said = [], []

    def bar(title):
        return lambda done, total: shown.append((title, done, total))

    run(small, tmp_path / "out", progress=bar, say=said.append)
    assert shown == [("training", step, STEPS) for step in range(1, STEPS + 1)]
    assert said == [
        f"training on 24 samples of 32 tokens from {DEMO}",
        "choosing the first levels: nearest",
        "exporting bf16",
    ]


def test_samples_are_stored_as_they_are(straight):
    stored = Samples(np.load(straight.output / "samples.npy"))
    assert (stored.token_ids.shape, stored.token_ids.dtype) == ((STEPS * BATCH, 32), np.int32)
