"""Time of one process and of two that quantize the same model together, with one thread each.

    python -m benchmarks.distributed_speed [--repeats N] [--samples N] [--layers N]

Calibration-bound work: a small Llama, W4 and a 4-bit residual both with error feedback, on many samples. Every run
begins with the model's load and ends with the saved checkpoint, imports not counted; one process and two run in turn
and figures are medians. Where the cores are not free, the CPU time of the busier process against that of the one alone
says what the wall time would be on two free ones, but for the waiting. The outputs are compared byte by byte.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import REPOSITORY, SCHEME, TINY_LLAMA
from benchmarks.scratch import contents, scratch

_LENGTH = 256


@dataclass(frozen=True)
class Run:
    """Seconds of one run: on the clock, and of CPU time by process."""

    wall: float
    cpu: list[float]


def worker(model_path: Path, output: Path, samples: int) -> None:
    """One process of a run; prints its seconds."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.logger import LoggerConfig, configure_logger
    from transformers import AutoModelForCausalLM

    from srd_modifier import SRDModifier
    from srd_modifier.distributed import launched, own_part

    configure_logger(LoggerConfig(console_log_level="ERROR"))
    torch.set_num_threads(1)
    tokens = torch.randint(1, 4000, (samples, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    with launched() as ranks:
        ranks.agree()  # imports are over in all of them
        started, used = time.perf_counter(), time.process_time()
        data = own_part(Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * _LENGTH] * samples}))
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
        recipe = SRDModifier(**SCHEME, base_rounding="feedback", residual_bits=4, rounding="feedback")
        options = {
            "num_calibration_samples": len(data),
            "max_seq_length": _LENGTH,
            "shuffle_calibration_samples": False,
        }
        oneshot(model=model, recipe=recipe, dataset=data, **options)
        model.save_pretrained(output)
        ranks.agree()
        print(json.dumps({"wall": time.perf_counter() - started, "cpu": time.process_time() - used}), flush=True)


def run(model: Path, output: Path, samples: int, processes: int) -> Run:
    """One run, as `torchrun` would start it."""
    shutil.rmtree(output, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    common |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.distributed_speed", "--worker", str(model), str(output), str(samples)]
    started = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode != 0:
            sys.exit(f"a process failed:\n{errors[-2000:]}")
    figures = [json.loads(printed.strip().splitlines()[-1]) for printed, _ in said]
    return Run(max(one["wall"] for one in figures), [one["cpu"] for one in figures])


def write_model(directory: Path, layers: int) -> Path:
    """A Llama of a few layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=4096, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, directory / name)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "OUTPUT", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        model, output, samples = options.worker
        worker(Path(model), Path(output), int(samples))
        return
    with scratch() as folder:
        model = write_model(folder / "model", options.layers)
        outputs = {1: folder / "one", 2: folder / "two"}
        runs: dict[int, list[Run]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for processes, output in outputs.items():
                runs[processes].append(run(model, output, options.samples, processes))
                last = runs[processes][-1]
                cpu = " and ".join(f"{seconds:.1f}" for seconds in last.cpu)
                print(f"{processes} process(es): {last.wall:6.1f} s, CPU time {cpu} s", flush=True)
        wall = statistics.median(two.wall / one.wall for one, two in zip(runs[1], runs[2], strict=True))
        cpu_ratio = statistics.median(max(two.cpu) / one.cpu[0] for one, two in zip(runs[1], runs[2], strict=True))
        print(f"two processes take {wall:.2f}x the wall time of one, the busier one {cpu_ratio:.2f}x its CPU time")
        print(f"load of the machine: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
        print(f"identical output: {contents(outputs[1]) == contents(outputs[2])}")


if __name__ == "__main__":
    main()
