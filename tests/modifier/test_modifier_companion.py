"""`gguf` of SRDModifier: a calibrated GGUF file of the original model in the checkpoint's own directory."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from srd_modifier import SRDModifier
from srd_modifier.checkpoint.merge import export_dense
from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.checkpoint.sizes import measure
from srd_modifier.checkpoint.trim import trim
from srd_modifier.errors import ConfigError, RecipeError, SRDError
from srd_modifier.gguf.calibration.text import Calibration
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.mixture import FileType
from srd_modifier.gguf.reader import GGUFFile
from srd_modifier.modifier import companion
from srd_modifier.modifier.companion import CompanionFile
from srd_modifier.selection.budget import Budget, parse_budget

NAME = "small-llama-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def rows(calibration: Any) -> list[list[int]]:
    return calibration["input_ids"][:]


@pytest.fixture(scope="module")
def expected(small_llama: Path, rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file, exported from the original model."""
    path = tmp_path_factory.mktemp("expected") / NAME
    export_gguf(small_llama, path, calibration=Calibration("the recipe's data", samples=rows))
    return path


@pytest.fixture(scope="module")
def saved(
    small_llama: Path,
    quantize: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Both checkpoints of one run, with the sensitivity that trimming takes: for reading only."""
    recipe = make_recipe("gptq", gguf="Q4_K_M", sensitivity="gradient")
    return quantize(recipe, tmp_path_factory.mktemp("saved") / "model", model=small_llama, data=True)


# settings


def test_a_type_alone_or_with_a_budget() -> None:
    assert CompanionFile.parse(None) is None
    assert CompanionFile.parse("Q5_K_M") == CompanionFile(FileType.Q5_K_M)
    assert CompanionFile.parse({}) == CompanionFile(FileType.Q4_K_M)
    budgeted = CompanionFile.parse({"type": "Q4_0", "budget": "4.85bpw"})
    assert budgeted == CompanionFile(FileType.Q4_0, Budget(bits_per_weight=4.85))
    assert CompanionFile.parse({"budget": 119_000_000}) == CompanionFile(budget=parse_budget("budget", "119MB"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("F16", "gguf.type is 'F16', expected one of Q8_0, "),
        ("q4_k_m", "gguf.type is 'q4_k_m'"),
        (True, "gguf.type is True"),
        (["Q4_K_M"], r"gguf.type is \['Q4_K_M'\]"),
        ({"type": "BF16"}, "gguf.type is 'BF16'"),
        ({"type": "Q4_K_M", "size": "5bpw"}, "gguf has 'size', expected only"),
        ({1: "Q4_K_M"}, "gguf has '1', expected only"),
        ({"budget": "much"}, "gguf.budget is 'much', expected a size such as"),
        ({"budget": 4.85}, "gguf.budget is 4.85, expected a size such as"),
        ({"budget": -1}, "gguf.budget is -1"),
    ],
)
def test_settings_are_checked_when_the_recipe_is_read(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompanionFile.parse(value)
    with pytest.raises(ValueError, match=message):
        SRDModifier(gguf=value)


# what is refused before calibration


def refuse(call: Callable[[], Any], kind: type[SRDError], message: str, forwards: list[str]) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert forwards == []


def test_it_needs_data(quantize, make_recipe, small_llama, tmp_path, forwards) -> None:
    recipe = make_recipe("round-to-nearest", gguf="Q4_K_M")
    refuse(
        lambda: quantize(recipe, tmp_path / "out", model=small_llama),
        RecipeError,
        "gguf is calibrated on the recipe's data; give oneshot a dataset",
        forwards,
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gone", [False, True], ids=["never", "gone"])
def test_it_needs_a_model_on_disk(gone, small_llama, tmp_path, forwards, monkeypatch) -> None:
    directory = Path(shutil.copytree(small_llama, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    if gone:
        shutil.rmtree(directory)
    else:
        model.config._name_or_path = ""
        monkeypatch.chdir(directory)  # which must not be taken for it
    refuse(
        lambda: CompanionFile().check(model),
        RecipeError,
        "gguf makes a file of the original model, which is not on disk .*; load it from a directory or a hub id",
        forwards,
    )


def test_a_budget_that_cannot_be_met_is_refused(quantize, make_recipe, small_llama, tmp_path, forwards) -> None:
    recipe = make_recipe("gptq", gguf={"budget": "3bpw"})
    refuse(
        lambda: quantize(recipe, tmp_path / "out", model=small_llama, data=True),
        ConfigError,
        "a budget of 3 bpw is too small for this model, which takes ",
        forwards,
    )


def test_a_model_that_llamacpp_does_not_know_is_refused(small_llama, tmp_path, forwards) -> None:
    directory = Path(shutil.copytree(small_llama, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    check = CompanionFile().check
    refuse(
        lambda: check(AutoModelForCausalLM.from_pretrained(directory)), SRDError, f"{directory}.*tokenizer", forwards
    )


@pytest.mark.parametrize("library", ["gguf", "xllamacpp", "accelerate"])
def test_a_library_that_is_missing_is_named(library, small_llama, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_llama)
    require = companion.require

    def missing(name: str, *, extra: str) -> None:
        require("no_such_library" if name == library else name, extra=extra)

    monkeypatch.setattr(companion, "require", missing)
    with pytest.raises(SRDError, match=r"pip install 'srd-modifier\[gguf\]'"):
        CompanionFile().check(model)


# one run, both checkpoints


def test_the_file_is_the_original_models(saved: Path, expected: Path) -> None:
    """Not a bit of it comes from the W4 codes."""
    assert (saved / NAME).read_bytes() == expected.read_bytes()
    metadata = GGUFFile(saved / NAME).metadata
    assert metadata["srd.method"] == "output-error"
    assert metadata["srd.calibration.text"] == "the recipe's data"
    assert metadata["srd.calibration.tokens"] == str(8 * 64)
    assert sorted(path.name for path in saved.glob("*.gguf")) == [NAME]
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_the_checkpoint_is_the_same_without_it(
    saved: Path, quantize, make_recipe, small_llama, directory_bytes, tmp_path
) -> None:
    alone = quantize(make_recipe("gptq", sensitivity="gradient"), tmp_path / "alone", model=small_llama, data=True)
    found, without = directory_bytes(saved), directory_bytes(alone)
    assert found.keys() - without.keys() == {NAME}
    names = without.keys() - {"recipe.yaml"}  # which says what was asked for
    assert {name: found[name] for name in names} == {name: without[name] for name in names}
    assert b"gguf: Q4_K_M" in found["recipe.yaml"]


def test_the_checkpoint_still_loads(saved: Path, divergence, small_llama) -> None:
    Sidecar.open(saved).verify()
    assert divergence(small_llama, saved, 1.0) < 1e-2 * divergence(small_llama, saved, 0.0)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert isinstance(model(torch.tensor([[1, 2, 3]])).logits, torch.Tensor)
    files = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert measure(saved, corrected=()).bytes_on_disk == files


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        ("gptq", "independent"),
        ("gptq", "sequential"),
        pytest.param("round-to-nearest", "independent", marks=pytest.mark.slow),
        pytest.param("itself", "sequential", marks=pytest.mark.slow),
    ],
)
def test_every_pipeline_writes_it(kind, pipeline, quantize, make_recipe, small_llama, expected: Path, tmp_path) -> None:
    recipe = make_recipe(kind, gguf={"type": "Q4_K_M"})
    output = quantize(recipe, tmp_path / "model", model=small_llama, data=True, pipeline=pipeline)
    assert (output / NAME).read_bytes() == expected.read_bytes()
    Sidecar.open(output).verify()


def test_a_budget_is_kept(quantize, make_recipe, small_llama, tmp_path) -> None:
    output = quantize(make_recipe("gptq", gguf={"budget": "5.5bpw"}), tmp_path / "model", model=small_llama, data=True)
    (path,) = output.glob("*.gguf")
    assert path.name == "small-llama-5.5bpw.gguf"
    file = GGUFFile(path)
    assert file.metadata["srd.mixture"] == "5.5bpw"
    size = sum(int(tensor.n_bytes) for tensor in file.tensors.values())
    assert 5.3 < 8 * size / sum(int(tensor.n_elements) for tensor in file.tensors.values()) <= 5.5


def test_saving_again_writes_it_again(quantized_model, make_recipe, small_llama, expected: Path, tmp_path) -> None:
    model = quantized_model(make_recipe("gptq", gguf="Q4_K_M"), model=small_llama)
    for name in ("first", "second", "second"):
        model.save_pretrained(tmp_path / name)
        assert (tmp_path / name / NAME).read_bytes() == expected.read_bytes()
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    assert list((tmp_path / "dense").glob("*.gguf")) == []


def test_a_file_that_fails_leaves_nothing(quantized_model, make_recipe, small_llama, tmp_path) -> None:
    directory = Path(shutil.copytree(small_llama, tmp_path / "small-llama"))
    model = quantized_model(make_recipe("gptq", gguf="Q4_K_M"), model=directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(SRDError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small-llama"]


# copies of the checkpoint


def test_a_dense_export_leaves_it_out(saved: Path, tmp_path: Path) -> None:
    export_dense(saved, tmp_path / "dense")
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert "tokenizer.json" in names
    assert NAME not in names


def test_a_trimmed_checkpoint_leaves_it_out(saved: Path, tmp_path: Path) -> None:
    size = measure(saved).bytes_on_disk
    trim(saved, tmp_path / "trimmed", Budget(bytes=size - 5000))
    Sidecar.open(tmp_path / "trimmed").verify()
    assert (saved / NAME).is_file()
    assert not list((tmp_path / "trimmed").rglob("*.gguf"))


# batches


def batch(rows: list[list[int]], mask: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    values = {"input_ids": torch.tensor(rows)}
    return values if mask is None else {**values, "attention_mask": torch.tensor(mask)}


def test_batches_are_taken_apart_without_padding() -> None:
    batches = [
        batch([[5, 6, 7, 0], [0, 0, 8, 9]], [[1, 1, 1, 0], [0, 0, 1, 1]]),
        batch([[1, 2, 3]]),
    ]
    assert companion._samples(batches) == [[5, 6, 7], [8, 9], [1, 2, 3]]


def test_no_more_batches_are_read_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "_MOST_TOKENS", 5)

    def batches() -> Any:
        yield batch([[1, 2, 3]])
        yield batch([[4, 5, 6], [7, 8, 9]])
        raise AssertionError("one batch too many")

    assert companion._samples(batches()) == [[1, 2, 3], [4, 5, 6]]
