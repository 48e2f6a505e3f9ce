"""vLLM engines and what they serve. These tests run in the serving environment: `make test` does it."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from vllm_environment import environment

if find_spec("vllm") is None:  # the quantizing environment, whose compressed-tensors is another
    collect_ignore_glob = ["test_*.py"]

ENGINE = Path(__file__).parent / "engine.py"


class Served(NamedTuple):
    """What an engine answered.

    Attributes:
        logprobs: float32 `[prompts, tokens - 1]`, of the prompts' own tokens after the first.
        generated: greedy continuations.
    """

    logprobs: Tensor
    generated: list[list[int]]


class Engine(NamedTuple):
    """A finished engine process: its answers, one for each step of the dial, and its log."""

    answers: list[Served]
    log: str
    status: int


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """Serve a directory in a process of its own and ask it; the process may fail, see `status` and `log`."""

    def run(
        model: Path | str,
        prompts: list[list[int]],
        *,
        tokens: int = 1,
        steps: list[dict[str, Any]] | None = None,
        plugin: bool = True,
        multiprocessing: bool = False,
        program: Path = ENGINE,
        **arguments: Any,
    ) -> Engine:
        arguments = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True} | arguments
        arguments |= {"model": str(model), "gpu_memory_utilization": 0.3, "disable_log_stats": True}
        ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        folder = tmp_path_factory.mktemp("engine")
        request = {"arguments": arguments, "prompts": prompts, "tokens": tokens, "steps": steps or []}
        (folder / "REQUEST.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, str(program), str(folder / "REQUEST.json")],
            env=environment(multiprocessing=multiprocessing, ranks=ranks, plugin=plugin),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        answers = []
        if done.returncode == 0:
            results = json.loads((folder / "RESULT.json").read_text())
            answers = [Served(torch.tensor(result["logprobs"]), result["generated"]) for result in results]
        return Engine(answers, done.stdout, done.returncode)

    return run


@pytest.fixture(scope="session")
def serve(run_engine: Callable[..., Engine]) -> Callable[..., Served]:
    """The answer of an engine that must not fail."""

    def run(*arguments: Any, **settings: Any) -> Served:
        engine = run_engine(*arguments, **settings)
        assert engine.status == 0, engine.log[-8000:]
        return engine.answers[0]

    return run
