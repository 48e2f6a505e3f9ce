"""What is damaged, foreign, incomplete or bypassed stops the engine, with the reason in one sentence.

VLLM prints tracebacks of its own around it, in every process that it takes down.
"""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from random_models import make_mixture, save_model
from rtn import write_checkpoint
from vllm_environment import environment

from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.vllm.register import register

MODULE = "model.layers.3.mlp.up_proj"
PROMPTS = [[5, 6, 7, 8]]
Spoil = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def intact(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(random_llama, tmp_path_factory.mktemp("refusals") / "checkpoint", group_size=32)


@pytest.fixture(scope="module")
def foreign(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of the same names and shapes, of another W4."""
    return write_checkpoint(random_llama, tmp_path_factory.mktemp("refusals") / "other", group_size=32, negative=True)


@pytest.fixture
def checkpoint(intact: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(intact, tmp_path / "checkpoint"))


def residual_file(checkpoint: Path) -> Path:
    return next((checkpoint / "srd").glob("residual*.safetensors"))


def damage(checkpoint: Path, name: str = f"{MODULE}.weight_d8") -> None:
    """Flip one bit of a residual tensor."""
    path = residual_file(checkpoint)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def index(checkpoint: Path) -> Path:
    return checkpoint / "srd" / "residual.safetensors.index.json"


def without_file(checkpoint: Path, _: Path) -> None:
    residual_file(checkpoint).unlink()


def without_index(checkpoint: Path, _: Path) -> None:
    index(checkpoint).unlink()


def without_tensor(checkpoint: Path, _: Path) -> None:
    edit(index(checkpoint), lambda values: values["weight_map"].pop(f"{MODULE}.weight_d8_scale"))


def truncated(checkpoint: Path, _: Path) -> None:
    path = residual_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])


def other_version(checkpoint: Path, _: Path) -> None:
    edit(checkpoint / "config.json", lambda values: values["srd_config"].update(version=3))


def other_residual(checkpoint: Path, foreign: Path) -> None:
    shutil.rmtree(checkpoint / "srd")
    shutil.copytree(foreign / "srd", checkpoint / "srd")


def other_sidecar(checkpoint: Path, foreign: Path) -> None:
    other_residual(checkpoint, foreign)
    theirs = json.loads((foreign / "config.json").read_text())["srd_config"]
    edit(checkpoint / "config.json", lambda values: values.update(srd_config=theirs))


def configure(model: Path, **overrides: object) -> None:
    """What vLLM does with the config of a model before it starts any worker."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    values = json.loads((model / "config.json").read_text())
    config = get_quantization_config("srd").from_config(values["quantization_config"])
    settings = overrides or values["srd_config"]
    config.maybe_update_config(str(model), hf_config=SimpleNamespace(srd_config=settings), revision=None)


def test_an_intact_checkpoint_is_configured(checkpoint):
    configure(checkpoint)
    configure(checkpoint, alpha=0.5)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_file, r".*/srd/residual.*\.safetensors is missing"),
        (without_index, r".*/srd/residual\.safetensors\.index\.json is missing"),
        (without_tensor, rf".*index\.json: {MODULE}\.weight_d8_scale is missing, srd_config promises it"),
        (truncated, r".*/srd/residual.*\.safetensors.*"),
        (other_version, r".*config\.json: srd_config\.version is 3, this srd-modifier reads 2; upgrade srd-modifier"),
        (
            other_residual,
            r".*index\.json: the sidecar belongs to another base than srd_config \(base_digest differs\); .*",
        ),
        (other_sidecar, r".*model\.safetensors: the sidecar in .* belongs to another base \(fingerprint differs\); .*"),
    ],
)
def test_the_sidecar_is_verified_before_any_worker_starts(checkpoint, foreign, spoil: Spoil, sentence):
    spoil(checkpoint, foreign)
    with pytest.raises(CheckpointError, match=f"^{sentence}$") as raised:
        configure(checkpoint)
    assert "\n" not in str(raised.value)


def test_settings_are_checked_before_any_worker_starts(checkpoint):
    with pytest.raises(ConfigError, match=r"^alpha is 2, expected a number from 0 to 1$"):
        configure(checkpoint, alpha=2)


def test_transforms_are_refused(checkpoint):
    transform = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    edit(checkpoint / "config.json", lambda values: values["quantization_config"].update(transform_config=transform))
    with pytest.raises(SRDError, match=r": config\.json has a transform_config, which corrected layers do not apply; "):
        configure(checkpoint)


def last_sentences(log: str) -> list[str]:
    """Our errors in a log, as the tracebacks end with them."""
    return re.findall(r"srd_modifier\.errors\.\w+: (.*)", log)


@pytest.mark.slow
def test_a_foreign_sidecar_stops_the_engine(checkpoint, foreign, run_engine):
    other_sidecar(checkpoint, foreign)
    engine = run_engine(checkpoint, PROMPTS)
    assert engine.status != 0
    (sentence,) = last_sentences(engine.log)  # before there is any worker
    assert "belongs to another base (fingerprint differs); copy base and sidecar from the same checkpoint" in sentence


@pytest.mark.slow
def test_damage_is_noticed_in_every_rank(checkpoint, run_engine):
    damage(checkpoint)
    engine = run_engine(checkpoint, PROMPTS, tensor_parallel_size=2)
    assert engine.status != 0
    path = residual_file(checkpoint)
    sentence = f"{path}: {MODULE}.weight_d8 does not match its digest; the file is damaged"
    assert set(last_sentences(engine.log)) == {sentence}
    for rank in ("TP0", "TP1"):
        assert re.search(rf"Worker_{rank}\b.*{re.escape(sentence)}", engine.log), rank


@pytest.mark.slow
def test_damage_stops_the_server(checkpoint):
    damage(checkpoint)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--gpu-memory-utilization", "0.3"]
    done = subprocess.run(
        [*command, *settings, "--host", "127.0.0.1", "--port", "0"],
        env=environment(multiprocessing=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0
    sentence = f"{residual_file(checkpoint)}: {MODULE}.weight_d8 does not match its digest; the file is damaged"
    assert set(last_sentences(done.stdout)) == {sentence}
    assert "Application startup complete" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer"])
def test_a_loader_that_bypasses_the_sidecar_stops_the_engine(intact, run_engine, load_format):
    engine = run_engine(intact, PROMPTS, load_format=load_format)
    assert engine.status != 0
    assert set(last_sentences(engine.log)) == {
        f"--load-format {load_format} does not read the residual of an SRD checkpoint; leave it at 'auto', or serve "
        "plain W4 with `--quantization compressed-tensors`"
    }


FORGETFUL = """
import importlib, json, sys, warnings

warnings.simplefilter("ignore")
module, name, forgotten, arguments = sys.argv[1:]
model = getattr(importlib.import_module(module), name)
load_weights = model.load_weights
model.load_weights = lambda self, weights: load_weights(self, (w for w in weights if w[0] != forgotten))
from vllm import LLM

LLM(**json.loads(arguments))
print("the engine has started")
"""


def forget(model: str, checkpoint: Path, tensor: str, **arguments: object) -> subprocess.CompletedProcess:
    """Start an engine whose model loses one tensor of the checkpoint."""
    module, _, name = model.rpartition(".")
    settings = {"model": str(checkpoint), "enforce_eager": True, "max_model_len": 64, "gpu_memory_utilization": 0.3}
    return subprocess.run(
        [sys.executable, "-c", FORGETFUL, module, name, tensor, json.dumps({**settings, **arguments})],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tensor_that_does_not_arrive_is_named(intact, dtype):
    """A part of a fused layer: its neighbours do arrive."""
    lost = "model.layers.3.self_attn.k_proj"
    done = forget("vllm.model_executor.models.llama.LlamaForCausalLM", intact, f"{lost}.weight", dtype=dtype)
    assert done.returncode != 0
    assert last_sentences(done.stdout) == [
        f"{lost}: its residual is promised by srd_config, but vLLM has not loaded all of it; serve plain W4 with "
        "`--quantization compressed-tensors`, and report the model's architecture"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "what"), [("up_proj", "gate and up projection"), ("down_proj", "down projection")])
def test_an_expert_that_does_not_arrive_is_named(tmp_path, part, what):
    checkpoint = write_checkpoint(
        save_model(make_mixture(num_experts=4), tmp_path / "model"), tmp_path / "checkpoint", group_size=32
    )
    lost = f"model.layers.1.mlp.experts.2.{part}.weight"
    done = forget("vllm.model_executor.models.qwen3_moe.Qwen3MoeForCausalLM", checkpoint, lost, dtype="float32")
    assert done.returncode != 0
    assert last_sentences(done.stdout) == [
        f"model.layers.1.mlp.experts.2: the weight of its {what} has not arrived whole in vLLM; serve plain W4 with "
        "`--quantization compressed-tensors`, and report the model's architecture"
    ]
