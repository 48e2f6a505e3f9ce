"""`srd export gguf --calibration`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srd_modifier.gguf import export
from srd_modifier.gguf.calibration.text import Calibration
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.selection.budget import parse_budget

TEXT = Path(__file__).parents[2] / "examples" / "text" / "demo.txt"
SMALL = ("--calibration", TEXT, "--num-samples", "2", "--max-seq-length", "32", "--device", "cpu")
CALIBRATION = Calibration(str(TEXT), num_samples=2, max_seq_length=32, device="cpu")


def test_the_installed_command_is_quiet_where_there_is_no_terminal(
    srd_process: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    """The model writes its text, types are compared and codes chosen, each of which has a bar on a terminal."""
    small = ("--calibration", "self", "--num-samples", "2", "--max-seq-length", "16", "--device", "cpu")
    path = tmp_path / "a.gguf"
    done = srd_process("export", "gguf", random_llama, "--output", path, *small, "--budget", "6bpw", "--json")
    assert (done.status, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert (values["path"], values["mixture"], values["method"]) == (str(path), "6bpw", "output-error")
    assert values["bytes"] == path.stat().st_size
    assert values["predicted_kld"] > 0


def test_the_command_writes_the_file_of_the_library(
    srd: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    done = srd("export", "gguf", random_llama, "--output", tmp_path / "a.gguf", *SMALL)
    assert done.status == 0, done
    summary = export_gguf(random_llama, tmp_path / "b.gguf", calibration=CALIBRATION)
    assert (tmp_path / "a.gguf").read_bytes() == summary.path.read_bytes()
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'a.gguf'}: Q4_K_M calibrated, {summary.bytes:,} bytes, ")
    assert f"predicted divergence from the original: {summary.predicted_kld:.3g} nats per token" in rest


def test_budget_directory_and_adapter(srd: Callable[..., Any], random_llama: Path, tmp_path: Path) -> None:
    options = ("--budget", "6.5bpw", "--residual-lora", "2", "--tensor-type", "attn_v=q8_0")
    done = srd("export", "gguf", random_llama, "--output", tmp_path, *SMALL, *options)
    assert done.status == 0, done
    names = ["random-llama-6.5bpw-lora.gguf", "random-llama-6.5bpw.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert f"wrote {tmp_path / names[1]}: 6.5bpw, attn_v=Q8_0 calibrated, " in done.stdout
    file = GGUFFile(tmp_path / names[1])
    assert file.metadata["srd.mixture"] == "6.5bpw, attn_v=Q8_0"
    assert file.tensors["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"


def test_the_options_reach_the_export(srd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DoneError(Exception):
        pass

    given: dict[str, Any] = {}

    def stop(*arguments: Any, **options: Any) -> None:
        given.update(options)
        raise DoneError

    def options(*own: object) -> dict[str, Any]:
        with pytest.raises(DoneError):
            srd("export", "gguf", "model", "--output", tmp_path / "a.gguf", *own)
        return given

    monkeypatch.setattr(export, "export_gguf", stop)
    assert (options()["calibration"], given["budget"], given["lora_rank"]) == (None, None, None)
    assert options("--calibration", "self")["calibration"] == Calibration("self")
    sizes = ("--num-samples", "3", "--max-seq-length", "5", "--seed", "7", "--device", "cuda")
    assert options("--calibration", "a.txt", *sizes)["calibration"] == Calibration("a.txt", 3, 5, 7, "cuda")
    assert options("--budget", "12MiB")["budget"] == parse_budget("budget", "12MiB")
    assert options("--residual-lora", "8")["lora_rank"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "5bpw"], "give a calibration text too"),
        ([*SMALL, "--budget", "many"], "--budget is 'many', expected a size such as"),
        ([*SMALL, "--budget", "2bpw"], "a budget of 2 bpw is too small for this model, which takes "),
        ([*SMALL, "--budget", "1kB"], "a budget of 1 kB is too small for this model, which takes "),
        ([*SMALL, "--type", "F16"], "F16 is not quantized, so there is nothing to calibrate"),
        ([*SMALL, "--no-importance"], "calibration measures the importance itself"),
        ([*SMALL, "--imatrix", "imatrix.gguf"], "calibration measures the importance itself"),
        ([*SMALL, "--residual-lora", "65"], "rank must be from 1 to 32, the rank of blk.0.attn_k.weight, got 65"),
        (["--type", "F16", "--residual-lora", "4"], "F16 quantizes no matrix"),
        (["--calibration", "none.txt"], "none.txt: there is no such file to calibrate on"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: list[object], message: str, srd: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    done = srd("export", "gguf", random_llama, "--output", tmp_path / "a.gguf", *options)
    assert message in done.sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [["--num-samples", "0"], ["--max-seq-length", "1"], ["--residual-lora", "0"], ["--device", "tpu"]]
)
def test_numbers_out_of_range_are_refused_by_the_command(
    options: list[str], srd: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    done = srd("export", "gguf", random_llama, "--output", tmp_path / "a.gguf", "--calibration", TEXT, *options)
    assert done.status == 2
    assert options[0] in done.stderr
    assert list(tmp_path.iterdir()) == []
