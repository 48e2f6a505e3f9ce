"""`examples/train_qat.py`: what one process and two of them train and write."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import make_llama, save_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "train_qat.py"
TIMEOUT = 240  # seconds, of which a quiet machine needs a tenth
STEPS = 4
EXPORTS = ["bf16", "checkpoints", "model-Q8_0.gguf", "trained", "w4a16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_llama(), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The miller counts {number} sacks of flour.\n" for number in range(200)), encoding="utf-8")
    return path


def run(launcher: list[str], model: Path, text: Path, output: Path, **settings: object) -> subprocess.CompletedProcess:
    settings = {
        "num_samples": 4 * STEPS,
        "max_seq_length": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "group_size": 32,
        "gguf": "Q8_0",
        **settings,
    }
    flags = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is None else [str(value)]))
    ]
    command = [*launcher, str(SCRIPT), "--model", str(model), "--text", str(text), "--output", str(output), *flags]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # as a group, so that the processes of a launcher end with it
    process = subprocess.Popen(
        command, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.fixture(scope="module")
def alone(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    done = run([sys.executable], model, text, output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"trained for {STEPS} steps" in done.stdout
    return output


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def check_alike(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to the rare weight that rounding has put into the next cell."""
    for name, tensor in expected.items():
        assert ((state[name] - tensor).abs() > 1e-4).float().mean() < 5e-3, name


def test_it_writes_the_exports_of_a_trained_model(alone):
    assert sorted(path.name for path in alone.iterdir()) == EXPORTS
    dense, packed = state_of(alone / "bf16"), state_of(alone / "w4a16")
    trained = state_of(alone / "trained")
    for name in dense:
        assert torch.equal(trained[name].bfloat16().float(), dense[name]), name
    assert "weight_packed" in " ".join(packed)
    state = json.loads((alone / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert [entry["bits"] for entry in state["log_history"]] == [16.0, 12.5, 7.5, 4.0]


def test_two_processes_train_what_one_does(alone, model, text, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(launcher, model, text, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("trained for 4 steps", done.stdout)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == EXPORTS
    check_alike(state_of(tmp_path / "trained"), state_of(alone / "trained"))


def test_accelerate_launches_it_and_it_goes_on_from_a_checkpoint(alone, model, text, tmp_path):
    """Accelerate starts several processes on a CPU with MPI only, so it is one here."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(alone / "checkpoints" / "checkpoint-2", tmp_path / "checkpoints" / "checkpoint-2")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = run(launcher, model, text, tmp_path, resume=None)
    assert done.returncode == 0, done.stderr[-3000:]
    state = state_of(tmp_path / "trained")
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(alone / "trained").items())


def test_a_batch_that_cannot_be_divided_is_refused(model, text, tmp_path):
    done = run([sys.executable], model, text, tmp_path / "output", batch_size=5)
    assert done.returncode == 2
    assert "--batch-size 5 is not a multiple of 2" in done.stderr
    assert not (tmp_path / "output").exists()
