import subprocess
import sys

import pytest
from typer.testing import CliRunner

from srd_modifier import cli
from srd_modifier.errors import SRDError

COMMANDS = ["quantize", "plan", "qat", "inspect", "eval", "trim", "export", "demo", "autoload"]


def test_no_arguments_show_the_commands(srd):
    done = srd()
    assert done.status == 2
    assert all(command in done.stdout + done.stderr for command in COMMANDS)


def test_help_of_the_installed_command(srd_process):
    done = srd_process("--help")
    assert (done.status, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)
    assert "SRD_TRACEBACK=1" in done.stdout


HELP_OF_ALL = """
import sys
from typer.testing import CliRunner
from srd_modifier.cli import _app
app = _app()
for command in (["--help"], *([name, "--help"] for name in sys.argv[1:])):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output
print(sorted({"torch", "transformers", "llmcompressor", "numpy", "datasets"} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL, *COMMANDS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["--no-such-option"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["inspect", "a", "--no-such-option"],
        ["quantize", "model", "--output", "out"],
        ["quantize", "model", "--recipe", "recipe.yaml"],
        ["quantize", "m", "--recipe", "r", "--output", "o", "--num-samples", "0"],
        ["quantize", "m", "--recipe", "r", "--output", "o", "--max-seq-length", "1"],
        ["quantize", "m", "--recipe", "r", "--output", "o", "--seed", "-1"],
        ["quantize", "m", "--recipe", "r", "--output", "o", "--num-samples", "many"],
        ["quantize", "m", "--recipe", "r", "--output", "o", "--pipeline", "fast"],
        ["export", "bf16", "a"],
        ["export", "bf16", "a", "--output", "b", "--dtype", "int8"],
        ["export", "no-such-format", "a"],
        ["autoload", "maybe"],
        ["demo", "extra"],
    ],
    ids=" ".join,
)
def test_misuse_exits_with_status_two(srd, arguments):
    done = srd(*arguments)
    assert (done.status, done.stdout) == (2, "")
    assert "Error" in done.stderr


@pytest.fixture
def failing(monkeypatch):
    """Let `srd inspect` fail with any error."""

    def fail_with(error: BaseException) -> None:
        def summarize(directory: object) -> None:
            raise error

        monkeypatch.setattr("srd_modifier.checkpoint.summary.summarize", summarize)

    return fail_with


def test_an_expected_error_is_one_sentence_and_status_one(srd, failing):
    failing(SRDError("the recipe is at fault; mend it"))
    assert srd("inspect", "x").sentence == "the recipe is at fault; mend it"


def test_an_error_of_the_system_names_its_file(srd, failing):
    failing(OSError(28, "No space left on device", "/full/disk"))
    assert srd("inspect", "x").sentence == "/full/disk: No space left on device"


def test_an_error_of_the_system_without_a_file_is_shown_as_it_is(srd, failing):
    failing(ConnectionError("the hub cannot be reached"))
    assert srd("inspect", "x").sentence == "the hub cannot be reached"


def test_an_unexpected_error_keeps_its_traceback(srd, failing):
    failing(KeyError("our own mistake"))
    with pytest.raises(KeyError, match="our own mistake"):
        srd("inspect", "x")


@pytest.mark.parametrize("error", [SRDError("at fault"), OSError(28, "No space left on device", "/full/disk")])
def test_tracebacks_can_be_asked_for(srd, failing, monkeypatch, error):
    monkeypatch.setenv("SRD_TRACEBACK", "1")
    failing(error)
    with pytest.raises(type(error)) as caught:
        srd("inspect", "x")
    assert caught.value is error
    assert "summarize" in [entry.name for entry in caught.traceback]


def test_the_installed_command_prints_one_sentence(srd_process, tmp_path):
    assert srd_process("inspect", tmp_path / "nowhere").sentence == f"{tmp_path}/nowhere/config.json is missing"


def test_the_installed_command_prints_a_traceback_if_asked(srd_process, tmp_path):
    done = srd_process("inspect", tmp_path / "nowhere", SRD_TRACEBACK="1")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.rstrip().endswith(f"CheckpointError: {tmp_path}/nowhere/config.json is missing")


def test_commands_leave_errors_to_the_shared_handler(tmp_path):
    """There is one place that turns an error into a sentence, and it is not in the commands."""
    result = CliRunner().invoke(cli._app(), ["inspect", str(tmp_path)])
    assert isinstance(result.exception, SRDError)
