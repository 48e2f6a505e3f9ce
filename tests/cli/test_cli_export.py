import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srd_modifier.checkpoint.merge import export_dense
from srd_modifier.cli.export import DtypeName


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal(found: Path, expected: Path) -> None:
    found_weights, expected_weights = weights(found), weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert found_weights[name].dtype == tensor.dtype, name
        assert torch.equal(found_weights[name], tensor), name


def test_the_installed_command_writes_a_dense_model(srd_process, finished_checkpoint, tmp_path):
    done = srd_process("export", "bf16", finished_checkpoint, "--output", tmp_path / "out")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'out'}: dense bfloat16, no quantization, no sidecar\n"
    export_dense(finished_checkpoint, tmp_path / "expected")
    assert_equal(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--alpha 0.5", {"alpha": 0.5}),
        ("--alpha 0", {"alpha": 0.0}),
        ("--chunk early --chunk governance", {"chunks": ["early", "governance"]}),
        ("--dtype float16", {"dtype": torch.float16}),
        ("--dtype float32", {"dtype": torch.float32}),
    ],
)
def test_options_arrive(srd, finished_checkpoint, tmp_path, options, expected):
    assert srd("export", "bf16", finished_checkpoint, "--output", tmp_path / "out", *options.split()).status == 0
    export_dense(finished_checkpoint, tmp_path / "expected", **expected)
    assert_equal(tmp_path / "out", tmp_path / "expected")


def test_the_default_dtype_is_the_librarys():
    assert getattr(torch, DtypeName.bfloat16.value) is inspect.signature(export_dense).parameters["dtype"].default


def test_an_existing_output_is_refused_and_replaced_if_asked(srd, finished_checkpoint, checkpoint):
    assert srd("export", "bf16", finished_checkpoint, "--output", checkpoint).sentence == (
        f"{checkpoint} already exists; choose another directory or pass --overwrite"
    )
    assert (checkpoint / "srd").is_dir()
    assert srd("export", "bf16", finished_checkpoint, "--output", checkpoint, "--overwrite").status == 0
    assert not (checkpoint / "srd").exists()


def test_a_model_without_residual(srd, tiny_llama, tmp_path):
    sentence = srd("export", "bf16", tiny_llama, "--output", tmp_path / "out").sentence
    assert sentence == f"{tiny_llama / 'config.json'} has no srd_config: this is not an SRD checkpoint"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--alpha 2", "alpha is 2.0, expected a number from 0 to 1"),
        (
            "--chunk middle",
            "chunk 'middle' is unknown, expected some of ['early', 'factual', 'reasoning', 'governance']",
        ),
    ],
)
def test_options_out_of_range(srd, finished_checkpoint, tmp_path, options, sentence):
    done = srd("export", "bf16", finished_checkpoint, "--output", tmp_path / "out", *options.split())
    assert done.sentence == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_gives_no_output(srd, checkpoint, tmp_path):
    (checkpoint / "srd" / "residual-00001-of-00001.safetensors").unlink()
    assert (
        "residual-00001-of-00001.safetensors" in srd("export", "bf16", checkpoint, "--output", tmp_path / "o").sentence
    )
    assert not (tmp_path / "o").exists()
