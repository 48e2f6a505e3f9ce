"""`srd` as users call it: in this process, where that is enough, and in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

from srd_modifier import cli
from srd_modifier.checkpoint.config import SENSITIVITY, read_srd_config
from srd_modifier.checkpoint.sensitivity import ModuleSensitivity, Sensitivity, sensitivity_file
from srd_modifier.cli import _quiet


@dataclass
class Done:
    """A finished command."""

    status: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """The one line of a failure; nothing else may have been printed."""
        assert self.status == 1, self
        assert self.stdout == ""
        assert self.stderr.startswith("srd: "), self.stderr
        assert self.stderr.count("\n") == 1, self.stderr
        return self.stderr.removeprefix("srd: ").rstrip("\n")


@pytest.fixture
def srd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the entry point in this process. What it does to the libraries is undone, and their log is left alone."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(tqdm, "__init__", vars(tqdm)["__init__"])
    monkeypatch.setattr(_quiet, "quiet_libraries", lambda *, bars: None if bars else _quiet.hide_bars())

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["srd", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def srd_process() -> Callable[..., Done]:
    """Run the installed command in a process of its own, where neither stdout nor stderr is a terminal."""

    # what other tests, and the programs that they call in process, set for this one
    dropped = ("TQDM_DISABLE", "SRD_TRACEBACK", "LLM_COMPRESSOR_LOG_LEVEL")

    def run(*arguments: object, **environment: str) -> Done:
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        command = [str(Path(sys.executable).with_name("srd")), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env | environment)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def sensitive(checkpoint: Path) -> Path:
    """A checkpoint with a sensitivity: the later the module, the more damage, of which 1% is left with a residual."""
    config = read_srd_config(checkpoint)
    assert config is not None
    damages = {name: number * 1e-4 for number, name in enumerate(config.modules, 1)}
    sensitivity = Sensitivity(
        method="gradient",
        tokens=4096,
        modules={name: ModuleSensitivity(w4=w4, corrected=w4 / 100, mixed=0.0) for name, w4 in damages.items()},
    )
    digest = json.loads((checkpoint / config.sidecar).read_text())["metadata"]["residual_digest"]
    values = sensitivity_file(sensitivity, base_digest=config.base_digest, residual_digest=digest)
    (checkpoint / SENSITIVITY).write_text(json.dumps(values))
    return checkpoint
