"""What vLLM pays for a corrected model: time to start, speed of decoding, memory.

    python -m benchmarks.vllm_serving [--model NAME ...] [--serving NAME ...] [--repeats N] [--sequences N] [--tokens N]

Runs in vLLM's environment (`make venv-vllm`), on whatever vLLM runs on there. One checkpoint is served in turn

    no plugin   VLLM_PLUGINS="", what everybody has
    plain W4    with the plugin, --quantization compressed-tensors: the one that the ratios are relative to
    alpha 0     with the plugin, which leaves every layer to vLLM's W4 kernels
    merge       with the plugin, every layer dense
    int8        with the plugin, every layer in groups of int8; needs CUDA
    split       with the plugin, W4 and the residual in two kernels; needs CUDA

each in a process of its own. Start is from the process's begin until the engine takes requests, imports counted;
`loading` is the part in which vLLM makes the model and loads its weights. Decoding is tokens per second after the
first token, the quickest of several attempts in a process. Both are also given in seconds of processor time, which
other work on the machine disturbs less; it says nothing about decoding on a GPU. Peak is the largest resident memory
of the process on a CPU, and of allocated memory on a GPU, with a KV cache of 256 MB in it. Ratios are medians over the
rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_checkpoint
from benchmarks.models import REPOSITORY, SHAPES, TINY_LLAMA, write_random
from benchmarks.process import median, ratio
from benchmarks.scratch import scratch

_MODELS = ("tiny-llama", *SHAPES)
_BASE = "plain W4"
_ATTEMPTS = 8
_PROMPT_TOKENS = 16
_KV_CACHE_BYTES = 2**28

# by name: whether the plugin is loaded, the arguments of vLLM, whether it needs CUDA
_SERVINGS: dict[str, tuple[bool, dict[str, Any], bool]] = {
    "no plugin": (False, {}, False),
    _BASE: (True, {"quantization": "compressed-tensors"}, False),
    "alpha 0": (True, {"hf_overrides": {"srd_config": {"alpha": 0.0}}}, False),
    "merge": (True, {"hf_overrides": {"srd_config": {"compute": "merge"}}}, False),
    "int8": (True, {"hf_overrides": {"srd_config": {"compute": "int8"}}}, True),
    "split": (True, {"hf_overrides": {"srd_config": {"compute": "split"}}}, True),
}


@dataclass(frozen=True)
class Serving:
    """What a process measured.

    Attributes:
        start: seconds until the engine took requests.
        loading: of these, seconds to make the model and load its weights.
        decode: tokens per second.
        start_cpu: seconds of processor time until the engine took requests.
        decode_cpu: tokens per second of processor time.
        peak: MB at most.
    """

    start: float
    loading: float
    decode: float
    start_cpu: float
    decode_cpu: float
    peak: float


def worker(directory: str, arguments: str, started: float, sequences: int, tokens: int) -> None:
    """Serve a checkpoint in this process and measure it."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform

    loading = _time_calls(BaseModelLoader, "load_model")
    cuda = current_platform.is_cuda()
    engine = LLM(
        model=directory,
        max_model_len=_PROMPT_TOKENS + tokens,
        max_num_seqs=sequences,
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        gpu_memory_utilization=0.9 if cuda else 0.3,
        enforce_eager=not cuda,  # a CPU would compile for longer than it computes here
        **json.loads(arguments),
    )
    start, start_cpu = time.time() - started, time.process_time()
    prompts = [{"prompt_token_ids": [1 + number] * _PROMPT_TOKENS} for number in range(sequences)]

    def generate(count: int) -> tuple[float, float]:
        before = time.perf_counter(), time.process_time()
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - before[0], time.process_time() - before[1]

    generate(tokens)
    first, whole = ([generate(count) for _ in range(_ATTEMPTS)] for count in (1, tokens))
    decode, decode_cpu = (
        sequences * (tokens - 1) / (min(seconds) - min(begin))
        for begin, seconds in zip(zip(*first, strict=True), zip(*whole, strict=True), strict=True)
    )
    result = Serving(start, sum(loading), decode, start_cpu, decode_cpu, _peak(cuda))
    print(json.dumps(asdict(result)), flush=True)


def _time_calls(owner: type, name: str) -> list[float]:
    """Replace a method with one that notes its seconds in the list that is returned."""
    seconds: list[float] = []
    original = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        before = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - before)

    setattr(owner, name, timed)
    return seconds


def _peak(cuda: bool) -> float:
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    # not getrusage's, which begins with that of the process that started this one
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def serve(directory: Path, name: str, options: argparse.Namespace) -> Serving:
    """Measure one way to serve a checkpoint, in a process of its own."""
    plugin, arguments, _ = _SERVINGS[name]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_INT4_W4A8": "0",  # with AMX, W4 would compute with int8 activations
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "srd" if plugin else "",
    }
    work = [directory, json.dumps(arguments), time.time(), options.sequences, options.tokens]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_serving", "--worker", *map(str, work)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode != 0 or not lines:
        sys.exit(f"{name} failed:\n{(finished.stdout + finished.stderr)[-4000:]}")
    return Serving(**json.loads(lines[-1]))


def has_cuda() -> bool:
    """Whether vLLM runs on a GPU here, asked in another process."""
    code = "from vllm.platforms import current_platform as p; import sys; sys.exit(not p.is_cuda())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", choices=_MODELS, help="one of them, or several; tiny-llama")
    parser.add_argument("--serving", action="append", choices=_SERVINGS, help="besides plain W4; all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--sequences", type=int, default=4, help="decoded at a time")
    parser.add_argument("--tokens", type=int, default=128, help="decoded for each")
    parser.add_argument("--worker", nargs=5, metavar="ARGUMENT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        directory, arguments, started, sequences, tokens = options.worker
        worker(directory, arguments, float(started), int(sequences), int(tokens))
        return
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed in this environment; `make venv-vllm` makes one where it is")
    names = [name for name in _SERVINGS if name == _BASE or name in (options.serving or _SERVINGS)]
    if not has_cuda():
        skipped = [name for name in names if _SERVINGS[name][2]]
        names = [name for name in names if name not in skipped]
        if skipped:
            print(f"{' and '.join(skipped)} need CUDA and are skipped")
    print(f"{options.sequences} sequences of {options.tokens} tokens; medians of {options.repeats} rounds,")
    print(f"in brackets ratios to {_BASE}, of time and of processor time")
    print(f"{'model':13} {'served':10} {'start':>24} {'loading':>8} {'tokens/s':>26} {'peak':>9}")
    with scratch() as folder:
        for model in options.model or ["tiny-llama"]:
            source = TINY_LLAMA if model == "tiny-llama" else write_random(model, folder)
            directory = write_checkpoint(source, folder / f"{model}-srd")
            measured: dict[str, list[Serving]] = {name: [] for name in names}
            for number in range(options.repeats):
                # there and back, so that none is always the first
                for name in names if number % 2 == 0 else reversed(names):
                    measured[name].append(serve(directory, name, options))
            for name in names:
                print_line(model, name, measured[_BASE], measured[name])


def print_line(model: str, name: str, base: list[Serving], own: list[Serving]) -> None:
    pair = (base, own)
    print(
        f"{model:13} {name:10} {median(own, 'start'):8.2f}s ({ratio(pair, 'start'):4.2f}x, "
        f"{ratio(pair, 'start_cpu'):4.2f}x) {median(own, 'loading'):7.2f}s {median(own, 'decode'):9.1f} "
        f"({ratio(pair, 'decode'):5.3f}x, {ratio(pair, 'decode_cpu'):5.3f}x) {median(own, 'peak'):6.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
