"""What a GGUF file says of itself, read back by gguf."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srd_modifier._version import __version__
from srd_modifier.errors import CheckpointError
from srd_modifier.gguf.families import family_of
from srd_modifier.gguf.metadata import CalibrationText, Method, add_general
from srd_modifier.gguf.weights import ModelWeights

CARD = """---
license: apache-2.0
language:
- en
- no
base_model: HuggingFaceTB/SmolLM2-135M
tags:
- text-generation
- 2024
model_name: River
version: 1.5
datasets:
- Salesforce/wikitext
---
# River
"""
DEMO = CalibrationText(name="demo.txt", sha256="ab" * 32, tokens=8192)


@pytest.fixture
def write(random_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with nothing but its metadata."""
    import gguf

    def write(directory: Path = random_llama, name: str = "m.gguf", **options: Any) -> Path:
        weights = ModelWeights.open(directory)
        if "shapes" not in options:
            options["shapes"] = {tensor.name: tensor.shape for tensor in family_of(weights.config).tensors(weights)}
        options = {"method": Method.WEIGHT_ERROR, "mixture": "Q4_K_M"} | options
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        add_general(writer, weights=weights, **options)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture
def metadata(write: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    import gguf

    def metadata(*args: Any, **options: Any) -> dict[str, Any]:
        fields = gguf.GGUFReader(write(*args, **options)).fields
        return {name: field.contents() for name, field in fields.items()}

    return metadata


@pytest.fixture
def model(random_llama: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the model under a name of choice, for a card to be put beside it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(random_llama, tmp_path / name))

    return copy


def test_a_model_without_a_card_has_the_name_of_its_directory(metadata):
    found = metadata()
    assert found["general.type"] == "model"
    assert found["general.name"] == "Random Llama"
    assert found["general.quantized_by"] == "srd-modifier"
    assert found["general.size_label"] == "746K"
    assert "general.license" not in found


def test_what_the_card_says_is_in_the_file(metadata, model):
    directory = model("river")
    (directory / "README.md").write_text(CARD)
    found = metadata(directory)
    assert found["general.name"] == "River"
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en", "no"]
    assert found["general.tags"] == ["text-generation", "2024"]
    assert found["general.version"] == "1.5"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M"
    assert found["general.dataset.0.repo_url"] == "https://huggingface.co/Salesforce/wikitext"


def test_the_parts_of_a_name_are_told_apart(metadata, model):
    found = metadata(model("River-746K-Instruct"))
    assert found["general.name"] == "River 746K Instruct"
    parts = ("basename", "size_label", "finetune")
    assert [found[f"general.{part}"] for part in parts] == ["River", "746K", "Instruct"]


def test_a_snapshot_of_the_hub_has_the_name_of_its_repository(metadata, model):
    found = metadata(model("models--some-body--River-746K/snapshots/0123456789abcdef"))
    assert found["general.name"] == "River 746K"
    assert found["general.organization"] == "Some Body"
    assert found["general.source.repo_url"] == "https://huggingface.co/some-body/River-746K"


def test_the_size_of_a_mixture_names_its_experts(metadata):
    shapes = {"blk.0.attn_q.weight": (1000, 1000), "blk.0.ffn_up_exps.weight": (8, 2000, 1000)}
    assert metadata(shapes=shapes)["general.size_label"] == "8x3.0M"


@pytest.mark.parametrize("front", ["license: [mit", "\ttags: :"], ids=["bracket", "colon"])
def test_a_card_that_is_not_yaml_is_refused(metadata, model, front):
    directory = model("river")
    (directory / "README.md").write_text(f"---\n{front}\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: the front matter of the model card cannot be read: .*line"):
        metadata(directory)


def test_a_card_that_is_not_text_is_refused(metadata, model):
    directory = model("river")
    (directory / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: the front matter of the model card cannot .*utf-8"):
        metadata(directory)


@pytest.mark.parametrize("card", ["", "# River\n", "---\n---\n", "---\n- a list\n---\n"])
def test_a_card_without_front_matter_says_nothing(metadata, model, card):
    directory = model("river")
    (directory / "README.md").write_text(card)
    assert metadata(directory)["general.name"] == "River"


def test_how_the_weights_were_rounded_is_in_the_file(metadata):
    importance = {"blk.0.attn_q.weight": torch.arange(4.0)}
    found = metadata(method=Method.OUTPUT_ERROR, mixture="4.85bpw", importance=importance, calibration=DEMO)
    assert found["srd.version"] == 1
    assert found["srd.library"] == __version__
    assert found["srd.method"] == "output-error"
    assert found["srd.mixture"] == "4.85bpw"
    assert found["srd.calibration.text"] == "demo.txt"
    assert found["srd.calibration.sha256"] == DEMO.sha256
    assert found["srd.calibration.tokens"] == "8192"
    assert not {"srd.base_digest", "srd.alpha"} & found.keys()


def test_the_importance_is_named_by_its_digest(metadata):
    def digest(**tensors: torch.Tensor) -> str:
        return metadata(importance=tensors)["srd.importance"]

    first = digest(a=torch.ones(4), b=torch.zeros(4))
    assert first.startswith("sha256:")
    assert digest(b=torch.zeros(4), a=torch.ones(4)) == first
    assert len({first, digest(a=torch.zeros(4), b=torch.ones(4)), digest(a=torch.ones(4))}) == 3
    assert "srd.importance" not in metadata()


def test_a_checkpoint_is_named_by_its_base(metadata, finished_checkpoint):
    weights = ModelWeights.open(finished_checkpoint)
    assert weights.srd_config is not None
    found = metadata(finished_checkpoint)
    assert found["srd.base_digest"] == weights.srd_config.base_digest
    assert found["srd.alpha"] == "1"


def test_the_same_input_gives_the_same_bytes(write):
    assert write(calibration=DEMO).read_bytes() == write(name="again.gguf", calibration=DEMO).read_bytes()


def test_files_of_one_model_are_of_one_size_whatever_was_calibrated(write):
    importance = {"blk.0.attn_q.weight": torch.arange(4.0)}
    ways: list[dict[str, Any]] = [
        {},
        {"method": Method.CONVERSION},
        {"method": Method.TRAINED},
        {"importance": importance},
        {"importance": importance, "calibration": DEMO},
        {"method": Method.OUTPUT_ERROR, "importance": importance, "calibration": DEMO},
        {"method": Method.OUTPUT_ERROR, "calibration": CalibrationText(name="großes.txt", sha256="0" * 64, tokens=1)},
    ]
    assert len({write(**options).stat().st_size for options in ways}) == 1
