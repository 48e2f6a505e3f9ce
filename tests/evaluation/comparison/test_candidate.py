import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA, make_llama, save_model
from rtn import write_checkpoint

from srd_modifier.checkpoint.sidecar import Sidecar
from srd_modifier.errors import CheckpointError, ConfigError, SRDError
from srd_modifier.evaluation.comparison.candidate import Candidate, Described, describe
from srd_modifier.evaluation.digest import model_digest
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.mixture import FileType
from srd_modifier.residual import ResidualFormat

LAYERS = 6
CHUNK_OF_LAYER = ["early", "early", "factual", "reasoning", "reasoning", "governance"]  # at depths of 0, 1/6, ... 5/6


# what the command line has


@pytest.mark.parametrize(
    ("text", "model", "label", "alpha", "chunks"),
    [
        ("out/tiny-srd", "out/tiny-srd", "tiny-srd", None, None),
        ("out/tiny-srd/", "out/tiny-srd/", "tiny-srd", None, None),
        ("/models/a.gguf", "/models/a.gguf", "a.gguf", None, None),
        ("somebody/model", "somebody/model", "model", None, None),
        ("mine=out/tiny-srd", "out/tiny-srd", "mine", None, None),
        ("W4A16 + D8, half=out/srd@alpha=0.5", "out/srd", "W4A16 + D8, half", 0.5, None),
        ("out/srd@alpha=0.5", "out/srd", "srd, alpha 0.5", 0.5, None),
        ("out/srd@alpha=0", "out/srd", "srd, alpha 0", 0.0, None),
        ("out/srd@alpha=1e-1", "out/srd", "srd, alpha 0.1", 0.1, None),
        ("out/srd@chunks=early", "out/srd", "srd, early", None, ("early",)),
        ("out/srd@chunks=reasoning+early", "out/srd", "srd, early+reasoning", None, ("early", "reasoning")),
        ("out/srd@alpha=0.5@chunks=early", "out/srd", "srd, alpha 0.5, early", 0.5, ("early",)),
        ("out/srd@chunks=early@alpha=0.5", "out/srd", "srd, alpha 0.5, early", 0.5, ("early",)),
        ("a=b=c", "b=c", "a", None, None),
        ("./a=b/srd", "./a=b/srd", "srd", None, None),
        (r"C:\models\a=b", r"C:\models\a=b", r"C:\models\a=b", None, None),
        (r"mine=C:\models\srd@alpha=1", r"C:\models\srd", "mine", 1.0, None),
        ("dir@2024/srd", "dir@2024/srd", "srd", None, None),
        ("srd@v2@alpha=1", "srd@v2", "srd@v2, alpha 1", 1.0, None),
        ("srd@beta=1", "srd@beta=1", "srd@beta=1", None, None),
        ("http://localhost:8000", "http://localhost:8000", "http://localhost:8000", None, None),
        ("https://host/v1?a=b", "https://host/v1?a=b", "https://host/v1?a=b", None, None),
        ("served=http://localhost:8000#model", "http://localhost:8000#model", "served", None, None),
        ("größe=modèle", "modèle", "größe", None, None),
    ],
)
def test_a_word_of_the_command_line_is_a_candidate(text, model, label, alpha, chunks):
    found = Candidate.parse(text)
    assert (found.model, found.label, found.alpha, found.chunks) == (model, label, alpha, chunks)
    assert found.family == ""
    assert found.is_server == ("http" in text)


def test_the_directory_one_is_in_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "srd").mkdir()
    monkeypatch.chdir(tmp_path / "srd")
    assert (Candidate.parse(".").model, Candidate.parse(".").label) == (".", "srd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("srd@alpha=1.5", r"^srd@alpha=1\.5: alpha is 1\.5, expected a number from 0 to 1$"),
        ("srd@alpha=-0.1", "alpha is -0.1, expected"),
        ("srd@alpha=half", "alpha is half, expected"),
        ("srd@alpha=nan", "alpha is nan, expected"),
        ("srd@chunks=middle", "chunk 'middle' is unknown, expected some of"),
        ("srd@chunks=early+", "chunk '' is unknown, expected some of"),
        ("srd@chunks=early,reasoning", "chunk 'early,reasoning' is unknown"),
        ("srd@alpha=0.5@alpha=1", "^srd@alpha=0.5@alpha=1: @alpha is given twice$"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Candidate.parse(text)


# what they are


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="module")
def srd(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A16 with a residual of 8 bits, whose MLPs have one of 4 bits in the first layer."""
    other = {f"model.layers.0.mlp.{name}_proj": ResidualFormat(bits=4, group_size=32) for name in ("up", "down")}
    return write_checkpoint(
        original, tmp_path_factory.mktemp("checkpoints") / "srd", group_size=32, formats=other, alpha=0.75
    )


@pytest.fixture(scope="module")
def w4(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a residual."""
    directory = write_checkpoint(original, tmp_path_factory.mktemp("checkpoints") / "w4", group_size=32)
    config = json.loads((directory / "config.json").read_text())
    del config["srd_config"]
    (directory / "config.json").write_text(json.dumps(config))
    shutil.rmtree(directory / "srd")
    return directory


@pytest.fixture(scope="module")
def gguf(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "original.gguf"
    export_gguf(original, path, file_type=FileType.Q8_0)
    return path


@pytest.fixture
def named(original: Path, srd: Path, w4: Path, gguf: Path) -> Callable[..., Described]:
    paths = {"original": original, "srd": srd, "w4": w4, "gguf": gguf}
    return lambda name, settings="": describe(Candidate.parse(f"{paths[name]}{settings}"))


@pytest.mark.parametrize(
    ("name", "form"),
    [("original", "bfloat16"), ("w4", "W4A16"), ("gguf", "GGUF Q8_0")],
)
def test_models_without_a_residual(named, name, form):
    found = named(name)
    assert (found.format, found.alpha, found.residual_bytes, found.config) == (form, None, None, None)
    assert found.digest == model_digest(found.path)


def test_a_checkpoint_names_its_residuals(named):
    found = named("srd")
    labels = {entry.format.label for entry in Sidecar.open(found.path).entries.values()}
    assert len(labels) == 2
    words, *residuals = found.format.split(" + ")
    assert (words, set(residuals)) == ("W4A16", labels)
    assert (found.alpha, named("srd", "@alpha=0.5").alpha) == (0.75, 0.5)


def group(bits: int, inputs: int | None = None) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": bits},
        "input_activations": None if inputs is None else {"num_bits": inputs},
    }


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32"),
        ({"dtype": None}, "dense"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {}}, "quantized"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": group(8, 8)}}},
            "W8A8",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": group(8), "b": group(4)},
                }
            },
            "W4A16 + W8A16",
        ),
    ],
)
def test_the_format_is_what_the_configuration_says(original, tmp_path, config, form):
    directory = Path(shutil.copytree(original, tmp_path / "model"))
    values = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(values))
    assert describe(Candidate(str(directory), "model")).format == form


def test_a_format_that_is_given_is_taken(original, gguf):
    assert describe(Candidate(str(original), "a", format="NF4")).format == "NF4"
    assert describe(Candidate(str(gguf), "b", format="mine")).format == "mine"
    assert describe(Candidate("http://localhost:1", "c", format="vLLM")).format == "vLLM"


def test_a_server_is_not_asked_before_it_is_opened():
    found = describe(Candidate.parse("http://127.0.0.1:1"))
    assert (found.path, found.digest, found.format) == (None, None, "server")
    assert (found.size, found.residual_bytes, found.alpha) == (None, None, None)
    with pytest.raises(SRDError, match=r"127\.0\.0\.1:1"):
        found.open(dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("original", "@alpha=1", r"original has no residual, leave @alpha and @chunks out$"),
        ("w4", "@chunks=early", r"w4 has no residual, leave @alpha and @chunks out$"),
        ("gguf", "@alpha=0.5", r"original\.gguf has no residual, leave @alpha and @chunks out$"),
    ],
)
def test_without_a_residual_there_is_nothing_to_dial(named, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        named(name, settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"chunks": ("middle",)}, "chunk 'middle' is un"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_it_is_opened(srd, options, message):
    with pytest.raises(ConfigError, match=message):
        describe(Candidate(str(srd), "srd", **options))


def test_a_server_is_dialled_where_it_is_started():
    with pytest.raises(ConfigError, match=r"^http://host: what a server applies is set where it is started, leave @ o"):
        describe(Candidate("http://host", "server", alpha=0.5))


def test_missing_and_damaged_models_are_refused(srd, tmp_path):
    with pytest.raises(SRDError, match=r"nowhere/at-all/x: there is no such directory"):
        describe(Candidate.parse("nowhere/at-all/x"))
    with pytest.raises(CheckpointError, match=r"m\.gguf: there is no such file"):
        describe(Candidate.parse(str(tmp_path / "m.gguf")))
    damaged = Path(shutil.copytree(srd, tmp_path / "damaged"))
    next((damaged / "srd").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError):
        describe(Candidate.parse(str(damaged)))


# what they cost


def expected_residual(directory: Path, layers: set[int]) -> int:
    """Bytes of the tensors of some layers' modules, as the files' headers have them."""
    total = 0
    for path in (directory / "srd").glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and int(name.split("layers.")[1].split(".")[0]) in layers:
                total += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return total


@pytest.mark.parametrize(
    ("settings", "chunks"),
    [
        ("@chunks=early", {"early"}),
        ("@chunks=reasoning+governance", {"reasoning", "governance"}),
        ("@alpha=0.5@chunks=factual", {"factual"}),
        ("@alpha=0", set()),
        ("@alpha=0@chunks=early", set()),
    ],
)
def test_a_part_of_the_residual_costs_its_tensors(named, settings, chunks):
    found = named("srd", settings)
    layers = {layer for layer, chunk in enumerate(CHUNK_OF_LAYER) if chunk in chunks}
    assert found.residual_bytes == expected_residual(found.path, layers)
    base = sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    assert found.size.bytes_on_disk == base + found.residual_bytes


def test_all_of_it_costs_its_tensors_and_on_disk_its_files(named):
    found = named("srd", "@alpha=0.5")
    files = sum(path.stat().st_size for path in (found.path / "srd").glob("*.safetensors"))
    base = sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    assert found.residual_bytes == expected_residual(found.path, set(range(LAYERS))) < files
    assert found.size.bytes_on_disk == base + files


def test_files_are_counted_as_they_are(named):
    for name in ("original", "w4"):
        found = named(name)
        assert found.size.bytes_on_disk == (found.path / "model.safetensors").stat().st_size
    assert named("gguf").size.bytes_on_disk == named("gguf").path.stat().st_size
    assert named("original").size.bits_per_weight == 16
    assert named("w4").size.bits_per_weight == pytest.approx(4 + 16 / 32, abs=0.1)


def test_what_another_library_saved_costs_what_it_says(original):
    found = describe(Candidate(str(original), "HQQ", read=lambda: None, bytes_on_disk=1234))
    assert found.size.bytes_on_disk == 1234
    assert math.isnan(found.size.bits_per_weight)


# as they are opened


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_what_another_library_reads_is_scored_as_it_reads_it(original, device):
    model = make_llama(seed=5)
    subject = describe(Candidate(str(original), "theirs", read=lambda: model.train())).open(
        dtype=torch.bfloat16, device=device
    )
    assert subject.loaded is not None
    assert subject.loaded.model is model
    assert not model.training
    assert subject.name == "theirs"
    assert subject.scorer.encode("the") == subject.loaded.tokenizer("the")["input_ids"]


def test_a_checkpoint_is_opened_as_it_is_dialled(named):
    subject = named("srd", "@alpha=0.5@chunks=early").open(dtype=torch.float32, device="cpu")
    assert subject.loaded is not None
    assert (subject.loaded.alpha, subject.loaded.chunks) == (0.5, ("early",))
    assert {module.split(".")[2] for module in subject.loaded.corrected} == {"0", "1"}
    assert subject.scorer.max_length == 256


def test_the_trained_example_is_described_without_loading_it(monkeypatch):
    monkeypatch.setattr("srd_modifier.evaluation.comparison.candidate.load", None)
    found = describe(Candidate.parse(f"original={TINY_LLAMA}"))
    assert (found.format, found.candidate.label) == ("bfloat16", "original")
    assert found.size.bytes_on_disk == (TINY_LLAMA / "model.safetensors").stat().st_size
