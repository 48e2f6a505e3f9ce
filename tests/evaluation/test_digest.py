import hashlib
import shutil
from pathlib import Path

import pytest

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.digest import file_digest, model_digest

COUNTED = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "model-00001-of-00002.safetensors": "weights",
    "model-00002-of-00002.safetensors": "more weights",
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "srd/residual-00001-of-00001.safetensors": "residual",
    "srd/sensitivity.json": "{}",
}
OTHERS = {
    "README.md": "# A model",
    "recipe.yaml": "quant_stage:",
    "model-q4_k_m.gguf": "GGUF",
    "LICENSE": "Apache",
    ".config.json.1234.partial": "left over",
    "figures/quality.png": "PNG",
    ".git/config": "[core]",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    for name, content in (COUNTED | OTHERS).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


def test_a_file_has_the_digest_of_its_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" * 3_000_000)  # more than is read at once
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model_digest(path) == file_digest(path) == expected


def test_a_directory_has_the_digest_of_what_sha256sum_would_list(model):
    lines = [f"{hashlib.sha256(content.encode()).hexdigest()}  {name}\n" for name, content in sorted(COUNTED.items())]
    assert model_digest(model) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_copy_is_the_same_model(model, tmp_path):
    assert model_digest(model) == model_digest(Path(shutil.copytree(model, tmp_path / "copy")))


def test_links_count_as_what_they_lead_to(model, tmp_path):
    """The hub's cache is made of them."""
    links = tmp_path / "snapshot"
    for path in model.rglob("*"):
        if path.is_file():
            link = links / path.relative_to(model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    assert model_digest(links) == model_digest(model)


@pytest.mark.parametrize("name", COUNTED)
def test_what_decides_the_model_changes_the_digest(model, name):
    before = model_digest(model)
    (model / name).write_text(COUNTED[name] + " ")
    changed = model_digest(model)
    (model / name).unlink()
    assert len({before, changed, model_digest(model)}) == 3


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_leaves_it_alone(model, name):
    before = model_digest(model)
    (model / name).write_text("something else")
    assert model_digest(model) == before
    (model / name).unlink()
    assert model_digest(model) == before


def test_names_count_too(model):
    before = model_digest(model)
    (model / "vocab.json").rename(model / "vocab.txt")
    assert model_digest(model) != before


def test_a_directory_without_a_model_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("#")
    with pytest.raises(SRDError, match=r": there are no files of a model$"):
        model_digest(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SRDError, match=r"gone\.safetensors: cannot be read: No such file or directory$"):
        file_digest(tmp_path / "gone.safetensors")
