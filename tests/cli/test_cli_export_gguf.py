import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from srd_modifier.checkpoint.config import IMPORTANCE
from srd_modifier.cli.export import FileTypeName
from srd_modifier.gguf import export
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.ggml import GGMLType
from srd_modifier.gguf.importance import read_imatrix
from srd_modifier.gguf.mixture import FileType


@pytest.fixture
def important(checkpoint: Path) -> Path:
    """A checkpoint with the importance of one module."""
    save_file({"model.layers.3.mlp.down_proj.importance": torch.rand(128) + 0.1}, checkpoint / IMPORTANCE)
    return checkpoint


def test_the_installed_command_writes_the_file(
    srd_process: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    done = srd_process("export", "gguf", tiny_llama, "--type", "Q4_K_M", "--output", tmp_path / "model.gguf")
    assert (done.status, done.stderr) == (0, "")
    size = (tmp_path / "model.gguf").stat().st_size
    first, second = done.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'model.gguf'}: Q4_K_M without importance, {size:,} bytes, ")
    assert first.endswith(" bits per weight over all 7,344,384 weights")
    assert second.startswith("tensors: ")
    export_gguf(tiny_llama, tmp_path / "expected.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--alpha", "0.5"], {"alpha": 0.5}),
        (["--chunk", "early", "--chunk", "factual"], {"chunks": ["early", "factual"]}),
        (["--type", "Q8_0"], {"file_type": FileType.Q8_0}),
        (["--tensor-type", "attn_v=q6_k"], {"overrides": [("attn_v", GGMLType.Q6_K)]}),
        (["--no-importance"], {"use_importance": False}),
    ],
)
def test_options_reach_the_export(
    options: list[str], expected: dict[str, Any], srd: Callable[..., Any], important: Path, tmp_path: Path
) -> None:
    done = srd("export", "gguf", important, "--output", tmp_path / "model.gguf", *options)
    assert done.status == 0, done
    export_gguf(important, tmp_path / "expected.gguf", **expected)
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_every_option_of_the_export_can_be_reached(
    srd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class DoneError(Exception):
        pass

    def stop(*arguments: Any, **options: Any) -> None:
        given.update(options)
        raise DoneError

    monkeypatch.setattr(export, "export_gguf", stop)
    with pytest.raises(DoneError):
        srd("export", "gguf", "model", "--output", tmp_path / "out.gguf")
    parameters = inspect.signature(export_gguf).parameters.values()
    missing = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} - given.keys()
    assert missing == {"layer_alphas"}  # by layer, alphas are set in the checkpoint's config.json


def test_json_has_the_whole_summary(srd: Callable[..., Any], important: Path, tmp_path: Path) -> None:
    done = srd("export", "gguf", important, "--output", tmp_path / "model.gguf", "--json")
    summary = export_gguf(important, tmp_path / "expected.gguf")
    values = json.loads(done.stdout)
    assert values.pop("path") == str(tmp_path / "model.gguf")
    expected = json.loads(json.dumps({**vars(summary), "path": None}))
    assert values | {"path": None} == expected
    assert values["weighted"] is True


def test_tensors_that_fall_back_are_told(srd: Callable[..., Any], random_llama: Path, tmp_path: Path) -> None:
    done = srd("export", "gguf", random_llama, "--output", tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_0"  # rows of 64
    count = sum(name not in ("F32",) for name in types.values())
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{count} tensors have rows that do not divide into blocks: ")
    assert " Q4_K to Q5_0" in last


def test_importance_goes_out_and_comes_in(srd: Callable[..., Any], important: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    done = srd("export", "gguf", important, "--output", tmp_path / "one.gguf", "--imatrix-out", imatrix)
    assert "with importance" in done.stdout
    assert read_imatrix(imatrix).keys() == {"blk.3.ffn_down.weight"}
    done = srd("export", "gguf", important, "--output", tmp_path / "two.gguf", "--imatrix", imatrix)
    assert done.status == 0, done
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_existing_file_is_kept_unless_asked(srd: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    assert srd("export", "gguf", tiny_llama, "--output", path).sentence == (
        f"{path} already exists; choose another name or pass --overwrite"
    )
    assert path.read_text() == "mine"
    assert srd("export", "gguf", tiny_llama, "--output", path, "--overwrite").status == 0


def test_errors_are_one_sentence(srd: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    sentence = srd("export", "gguf", tmp_path, "--output", tmp_path / "model.gguf").sentence
    assert "models of type 'gpt2' cannot be written as GGUF yet" in sentence


def test_a_malformed_tensor_type_is_refused(srd: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    done = srd("export", "gguf", tiny_llama, "--output", tmp_path / "model.gguf", "--tensor-type", "attn_v")
    assert "'attn_v' is not PATTERN=TYPE" in done.sentence


@pytest.mark.parametrize("option", ["--imatrix", "--imatrix-out"])
def test_an_imatrix_without_importance_is_refused(
    option: str, srd: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    files = ("--output", tmp_path / "model.gguf", option, tmp_path / "imatrix.gguf")
    done = srd("export", "gguf", tiny_llama, *files, "--no-importance")
    assert done.status == 2
    assert "give either --no-importance or an imatrix" in done.stderr


def test_the_types_of_the_command_are_those_of_the_rules() -> None:
    assert [name.value for name in FileTypeName] == [file_type.value for file_type in FileType]
