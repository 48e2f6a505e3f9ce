"""What is scored of a container, against the same from the directory or the file that was packed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import container
from packing import flip_byte, pack_copy

from srd_modifier.axm.entries import EntryPath, open_root
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.comparison.candidate import Candidate, describe
from srd_modifier.evaluation.digest import file_digest, model_digest
from srd_modifier.evaluation.evaluate import evaluate_text
from srd_modifier.evaluation.gguf import LlamaCppTokenizer
from srd_modifier.evaluation.load import find_files, load, load_tokenizer
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.mixture import FileType

SETTINGS: list[dict[str, Any]] = [{}, {"alpha": 0.0}, {"alpha": 0.5, "chunks": ["early"]}]


@pytest.fixture(scope="module")
def dense(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_copy(tiny_llama, tmp_path_factory.mktemp("dense") / "tiny-llama.axm")


@pytest.fixture(scope="module")
def corrected(finished_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_copy(finished_checkpoint, tmp_path_factory.mktemp("corrected") / "srd.axm")


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf"
    export_gguf(str(tiny_llama), path, file_type=FileType.Q8_0)
    return path


@pytest.fixture(scope="module")
def gguf_alone(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    (folder / "empty").mkdir()
    return pack_copy(folder / "empty", folder / "tiny.axm", others=(gguf_file,))


def same_model(found: Any, expected: Any) -> bool:
    theirs = dict(expected.named_parameters())
    return all(torch.equal(parameter, theirs[name]) for name, parameter in found.named_parameters())


# loading


def test_a_dense_model_is_that_of_the_directory(dense, tiny_llama):
    found, expected = load(str(dense)), load(str(tiny_llama))
    assert same_model(found.model, expected.model)
    assert found.tokenizer("A text.").input_ids == expected.tokenizer("A text.").input_ids
    assert (found.name, found.path) == (str(dense), open_root(dense))
    assert isinstance(found.path, EntryPath)
    assert (found.alpha, found.chunks, found.corrected) == (None, None, None)
    assert found.size == expected.size
    assert load_tokenizer(str(dense))("A text.").input_ids == expected.tokenizer("A text.").input_ids


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_corrected_model_has_the_settings_and_the_size_of_the_directory(corrected, finished_checkpoint, settings):
    found, expected = load(str(corrected), **settings), load(str(finished_checkpoint), **settings)
    assert same_model(found.model, expected.model)
    assert (found.alpha, found.chunks, found.corrected) == (expected.alpha, expected.chunks, expected.corrected)
    assert found.size == expected.size


def test_a_gguf_alone_is_that_of_the_file(gguf_alone, gguf_file):
    found, expected = load(str(gguf_alone)), load(str(gguf_file))
    assert same_model(found.model, expected.model)
    assert isinstance(found.tokenizer, LlamaCppTokenizer)
    assert isinstance(load_tokenizer(str(gguf_alone)), LlamaCppTokenizer)
    assert (found.name, found.path.name) == (str(gguf_alone), gguf_file.name)
    assert found.size == expected.size
    assert not math.isnan(found.size.bits_per_weight)


def test_the_copy_of_a_gguf_is_private_and_made_once(gguf_alone, gguf_file):
    copy = find_files(str(gguf_alone))
    assert copy.read_bytes() == gguf_file.read_bytes()
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    assert find_files(str(gguf_alone)) == copy


def test_the_checkpoint_counts_where_there_is_a_gguf_too(tiny_llama, gguf_file, tmp_path):
    both = pack_copy(tiny_llama, tmp_path / "both.axm", others=(gguf_file,))
    assert find_files(str(both)) == open_root(both)


# digests


@pytest.mark.parametrize("packed", ["dense", "corrected"])
def test_the_digest_is_that_of_the_directory_and_reads_nothing(packed, request, tiny_llama, monkeypatch):
    path = request.getfixturevalue(packed)
    directory = tiny_llama if packed == "dense" else request.getfixturevalue("finished_checkpoint")
    root = open_root(path)

    def refuse(*_: Any) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(EntryPath, "open_extent", refuse)
    assert model_digest(root) == model_digest(directory)
    assert file_digest(root / "config.json") == file_digest(directory / "config.json")


# comparing


@pytest.mark.parametrize("at", ["", "@alpha=0.5", "@chunks=early+reasoning"])
def test_a_candidate_with_a_residual_is_described_as_the_directory(corrected, finished_checkpoint, at):
    found, expected = (describe(Candidate.parse(f"it={path}{at}")) for path in (corrected, finished_checkpoint))
    assert (found.digest, found.format, found.config) == (expected.digest, expected.format, expected.config)
    assert (found.size, found.family, found.alpha) == (expected.size, expected.family, expected.alpha)
    assert found.residual_bytes == expected.residual_bytes > 0


def test_a_dense_candidate_is_described_as_the_directory(dense, tiny_llama):
    found, expected = describe(Candidate.parse(str(dense))), describe(Candidate.parse(str(tiny_llama)))
    assert found.candidate.label == "tiny-llama.axm"
    assert (found.digest, found.format, found.size) == (expected.digest, expected.format, expected.size)
    with pytest.raises(ConfigError, match="has no residual"):
        describe(Candidate.parse(f"{dense}@alpha=0.5"))


def test_a_gguf_candidate_is_described_as_the_file(gguf_alone, gguf_file):
    found, expected = describe(Candidate.parse(str(gguf_alone))), describe(Candidate.parse(str(gguf_file)))
    assert (found.digest, found.format, found.size) == (expected.digest, "GGUF Q8_0", expected.size)
    with pytest.raises(ConfigError, match="has no residual"):
        describe(Candidate.parse(f"{gguf_alone}@alpha=0.5"))


# scores


@pytest.mark.parametrize("kind", ["dense", "corrected", "gguf"])
def test_the_report_is_that_of_the_directory(
    kind, dense, tiny_llama, corrected, finished_checkpoint, gguf_alone, gguf_file, prose
):
    pairs = {
        "dense": (dense, tiny_llama),
        "corrected": (corrected, finished_checkpoint),
        "gguf": (gguf_alone, gguf_file),
    }
    found, expected = (
        evaluate_text(str(name), text_path=prose, reference=str(tiny_llama), ctx=32, stride=16, max_tokens=100)
        for name in pairs[kind]
    )
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0, model=str(pairs[kind][0]))


# what is refused


@pytest.mark.parametrize("use", [load, load_tokenizer, lambda name: describe(Candidate(name, "it"))])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_changed_container_is_refused(tiny_llama, tmp_path, file, use):
    path = pack_copy(tiny_llama, tmp_path / "tiny.axm")
    flip_byte(path, (tiny_llama / file).read_bytes())
    with pytest.raises(CheckpointError, match=f"{file} was changed after it was packed"):
        use(str(path))


def test_a_missing_container_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.axm: there is no such file$"):
        load(str(tmp_path / "x.axm"))


def test_a_file_that_is_no_container_is_refused(tmp_path):
    (tmp_path / "x.axm").write_text("a text")
    with pytest.raises(CheckpointError, match=r"x\.axm: it is not an \.axm container"):
        load(str(tmp_path / "x.axm"))


def test_a_container_without_a_model_is_refused(tmp_path):
    (tmp_path / "x.axm").write_bytes(container({"met.json": b"{}\n", "notes.txt": b"nothing"}))
    with pytest.raises(SRDError, match=r"x\.axm holds no model: it has neither config\.json nor a GGUF file"):
        load(str(tmp_path / "x.axm"))


def test_several_ggufs_are_refused_by_name(tmp_path):
    (tmp_path / "x.axm").write_bytes(container({"met.json": b"{}\n", "a.gguf": b"GGUF", "b.gguf": b"GGUF"}))
    with pytest.raises(SRDError, match=r"x\.axm holds 2 GGUF files \(a\.gguf, b\.gguf\); unpack it and name one"):
        load(str(tmp_path / "x.axm"))


@pytest.mark.parametrize(("packed", "reason"), [("dense", "config.json has no srd_config"), ("gguf_alone", "a GGUF")])
def test_settings_need_a_residual(packed, reason, request):
    with pytest.raises(SRDError, match=rf"\.axm has no residual \({reason}.*\), so alpha cannot be applied"):
        load(str(request.getfixturevalue(packed)), alpha=0.5)
