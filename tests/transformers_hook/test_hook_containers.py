"""Models, tokenizers and configurations out of containers, against the same from the directories that were packed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import KEY, KEY_HEX, flip_byte, pack_copy
from random_models import make_llama, save_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    modeling_utils,
    pipeline,
)

from srd_modifier import hydrate, load_corrected, set_alpha
from srd_modifier.axm.container import Container
from srd_modifier.axm.entries import EntryPath, open_root
from srd_modifier.axm.keys import ENVIRONMENT
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.transformers.containers import MappedFile, entry_of, view_of
from srd_modifier.transformers.correction import correction_of
from srd_modifier.transformers.source import checkpoint_directory

# in a process of its own: loads argv[2] and argv[3], and says whether they are one model
LOAD_BOTH = """
import torch
torch.set_num_threads(1)
models = [AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[2:4]]
logits = [model(input_ids=torch.arange(32)[None]).logits for model in models]
tokens = [AutoTokenizer.from_pretrained(name)("A text.").input_ids for name in sys.argv[2:4]]
print(torch.equal(*logits) and tokens[0] == tokens[1])
from srd_modifier.transformers.containers import view_of
print(view_of(sys.argv[3]))
"""
SHARD = "srd/residual-00001-of-00001.safetensors"
TRANSFORMERS = "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
PLUGIN = "import srd_modifier\n"


@pytest.fixture(scope="module")
def dense(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama."""
    return pack_copy(tiny_llama, tmp_path_factory.mktemp("dense") / "tiny-llama.axm")


@pytest.fixture(scope="module")
def corrected(finished_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a residual."""
    return pack_copy(finished_checkpoint, tmp_path_factory.mktemp("corrected") / "srd.axm")


@pytest.fixture(scope="module")
def plain_checkpoint(finished_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without one."""
    directory = tmp_path_factory.mktemp("w4") / "model"
    shutil.copytree(finished_checkpoint, directory, ignore=shutil.ignore_patterns("srd"))
    config = json.loads((directory / "config.json").read_text())
    del config["srd_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in several files."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    save_model(make_llama(), directory)
    LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory, max_shard_size="300KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture(scope="module")
def same(logits: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Two models have the same weights, the same dtypes and the same logits."""

    def check(found: Any, expected: Any) -> None:
        theirs = dict(expected.named_parameters())
        assert [*dict(found.named_parameters())] == [*theirs]
        for name, parameter in found.named_parameters():
            assert (parameter.dtype, parameter.device) == (theirs[name].dtype, theirs[name].device)
            assert torch.equal(parameter, theirs[name]), name
        assert torch.equal(logits(found), logits(expected))

    return check


# models


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto", "dtype": torch.float16},
        {"low_cpu_mem_usage": True},
        {"disable_mmap": True},
        {"use_safetensors": True},
    ],
    ids=str,
)
def test_a_dense_model_is_that_of_the_directory(dense, tiny_llama, same, options):
    found = AutoModelForCausalLM.from_pretrained(dense, **options)
    same(found, AutoModelForCausalLM.from_pretrained(tiny_llama, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_corrected_model_is_that_of_the_directory(corrected, finished_checkpoint, same, dtype):
    found = AutoModelForCausalLM.from_pretrained(str(corrected), dtype=dtype)
    same(found, AutoModelForCausalLM.from_pretrained(finished_checkpoint, dtype=dtype))


def test_a_plain_w4_model_is_that_of_the_directory(plain_checkpoint, tmp_path, same):
    container = pack_copy(plain_checkpoint, tmp_path / "w4.axm")
    same(AutoModelForCausalLM.from_pretrained(container), AutoModelForCausalLM.from_pretrained(plain_checkpoint))


def test_a_model_in_several_files_is_that_of_the_directory(sharded, tmp_path, same):
    container = pack_copy(sharded, tmp_path / "sharded.axm")
    same(AutoModelForCausalLM.from_pretrained(container), AutoModelForCausalLM.from_pretrained(sharded))


def test_a_class_of_its_own_loads_the_model(dense, tiny_llama, same):
    same(LlamaForCausalLM.from_pretrained(dense), LlamaForCausalLM.from_pretrained(tiny_llama))


def test_a_given_config_counts(dense, tiny_llama, logits):
    config = AutoConfig.from_pretrained(dense)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    found = AutoModelForCausalLM.from_pretrained(dense, config=config)
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(tiny_llama, config=config)))
    assert not torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_loading_info_is_that_of_the_directory(dense, tiny_llama):
    _, found = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    _, expected = AutoModelForCausalLM.from_pretrained(tiny_llama, output_loading_info=True)
    assert found == expected


def test_a_path_relative_to_the_working_directory_is_found(dense, tiny_llama, same, monkeypatch):
    monkeypatch.chdir(dense.parent)
    found = AutoModelForCausalLM.from_pretrained(dense.name)
    assert found.name_or_path == dense.name
    same(found, AutoModelForCausalLM.from_pretrained(tiny_llama))


def test_threads_share_one_view(tiny_llama, tmp_path):
    """Tokenizers and files in eight threads; models are not loaded in more than one, which Transformers cannot do."""
    container = pack_copy(tiny_llama, tmp_path / "tiny.axm")
    expected, found = AutoTokenizer.from_pretrained(tiny_llama)("A text.").input_ids, []

    def load() -> None:
        tokens = AutoTokenizer.from_pretrained(container)("A text.").input_ids
        with modeling_utils.safe_open(view_of(container) / "model.safetensors", framework="pt") as file:
            found.append((tokens, view_of(container), sum(file.get_tensor(name).numel() for name in file.keys())))  # noqa: SIM118

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights = sum(tensor.numel() for tensor in load_file(tiny_llama / "model.safetensors").values())
    assert found == [(expected, view_of(container), weights)] * 8


# the dial


def test_load_corrected_has_its_settings(corrected, finished_checkpoint, same):
    settings = {"alpha": 0.5, "chunks": ["early", "reasoning"]}
    same(load_corrected(corrected, **settings), load_corrected(finished_checkpoint, **settings))


def test_load_corrected_needs_a_residual(dense):
    with pytest.raises(CheckpointError, match=r"tiny-llama\.axm: config\.json has no srd_config"):
        load_corrected(dense)


def test_the_dial_turns_and_chunks_come_from_the_container(corrected, finished_checkpoint, same):
    model, expected = load_corrected(corrected, chunks=[]), load_corrected(finished_checkpoint, chunks=[])
    same(model, expected)
    for change in (lambda it: hydrate(it, chunks=["early"]), lambda it: set_alpha(it, 0.25), hydrate):
        change(model)
        change(expected)
        same(model, expected)
    assert correction_of(model).sidecar.directory == open_root(corrected)


# everything else that has a from_pretrained


def test_the_tokenizer_is_that_of_the_directory(dense, tiny_llama):
    text = "A text with ünïcode, and  two spaces."
    expected = AutoTokenizer.from_pretrained(tiny_llama)
    for found in (AutoTokenizer.from_pretrained(dense), PreTrainedTokenizerFast.from_pretrained(str(dense))):
        assert found(text) == expected(text)
        assert found.get_vocab() == expected.get_vocab()
        assert found.name_or_path == found.init_kwargs["name_or_path"] == str(dense)
    assert type(AutoTokenizer.from_pretrained(dense)) is type(expected)
    assert type(AutoProcessor.from_pretrained(dense)) is type(AutoProcessor.from_pretrained(tiny_llama))


def test_a_tokenizer_can_be_saved_again(dense, tmp_path):
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path)
    assert str(dense) not in (tmp_path / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path)("A text.") == AutoTokenizer.from_pretrained(dense)("A text.")


def test_the_configurations_are_those_of_the_directory(dense, tiny_llama):
    assert LlamaConfig.from_pretrained(dense).to_dict() == LlamaConfig.from_pretrained(tiny_llama).to_dict()
    assert AutoConfig.from_pretrained(dense).to_diff_dict() == AutoConfig.from_pretrained(tiny_llama).to_diff_dict()
    assert AutoConfig.from_pretrained(dense).name_or_path == str(dense)
    assert GenerationConfig.from_pretrained(dense) == GenerationConfig.from_pretrained(tiny_llama)


def test_model_and_config_keep_the_name_of_the_container(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert model.name_or_path == model.config.name_or_path == model.config._name_or_path == str(dense)
    assert model.generation_config == GenerationConfig.from_pretrained(dense)


def test_a_pipeline_generates(dense, tiny_llama):
    options = {"max_new_tokens": 4, "do_sample": False}
    found, expected = (pipeline("text-generation", model=str(name))("The", **options) for name in (dense, tiny_llama))
    assert found == expected


# weights stay where they are


def test_the_view_is_private_and_holds_no_weights(corrected, finished_checkpoint):
    view = view_of(corrected)
    assert view == view_of(str(corrected))
    assert view.stat().st_mode & 0o777 == 0o700
    files = {path.relative_to(view).as_posix(): path.stat().st_size for path in view.rglob("*") if path.is_file()}
    expected = {
        path.relative_to(finished_checkpoint).as_posix(): path.stat().st_size * (path.suffix != ".safetensors")
        for path in finished_checkpoint.rglob("*")
        if path.is_file()
    }
    assert files == expected | {"met.json": 3}


def test_weights_are_mapped_from_the_container(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    places = [
        tuple(int(part, 16) for part in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(dense))
    ]
    weights = [parameter for name, parameter in model.named_parameters() if "proj" in name]
    assert weights
    for weight in weights:
        assert any(start <= weight.data_ptr() < end for start, end in places)


def test_writing_to_a_weight_does_not_reach_the_container(dense, logits):
    before = dense.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert dense.read_bytes() == before
    assert logits(AutoModelForCausalLM.from_pretrained(dense)).any()


def test_the_sidecar_is_read_in_the_container(corrected):
    directory = checkpoint_directory(view_of(corrected) / "model.safetensors")
    assert isinstance(directory, EntryPath)
    assert directory == open_root(corrected)


def test_a_file_in_the_container_is_read_as_safetensors_reads_it(tmp_path):
    tensors = {
        "b": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
        "a": torch.arange(6, dtype=torch.int8),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text("{}")
    root = open_root(pack_copy(tmp_path / "model", tmp_path / "model.axm"))
    indices = [..., slice(1, None), slice(None), 0]
    with safe_open(path, framework="pt") as theirs, MappedFile(root / "model.safetensors") as ours:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert ours.metadata() == theirs.metadata()
        for name in tensors:
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
            found, expected = ours.get_slice(name), theirs.get_slice(name)
            assert (found.get_shape(), found.get_dtype()) == (expected.get_shape(), expected.get_dtype())
            for index in indices if len(found.get_shape()) == 3 else indices[:1]:
                assert torch.equal(found[index], expected[index])


def test_other_files_go_to_safetensors(tiny_llama, dense):
    view_of(dense)
    path = tiny_llama / "model.safetensors"
    assert entry_of(path) is entry_of(3) is None
    with modeling_utils.safe_open(path, framework="pt") as file:
        assert not isinstance(file, MappedFile)


# nothing unverified is used


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Transformers opens of a model."""
    opened: list[str] = []
    dict_from_json = LlamaConfig._dict_from_json_file
    monkeypatch.setattr(
        "transformers.configuration_utils.PreTrainedConfig._dict_from_json_file",
        classmethod(lambda cls, path: (opened.append(str(path)), dict_from_json(path))[1]),
    )
    return opened


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", SHARD])
@pytest.mark.parametrize(
    "load", [AutoModelForCausalLM, AutoTokenizer, AutoConfig, GenerationConfig], ids=lambda kind: kind.__name__
)
def test_a_changed_file_is_found_before_anything_is_read(finished_checkpoint, tmp_path, loads, name, load):
    container = pack_copy(finished_checkpoint, tmp_path / "srd.axm")
    flip_byte(container, (finished_checkpoint / name).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name} was changed after it was packed"):
        load.from_pretrained(container)
    assert loads == []


def test_a_container_that_is_changed_later_is_not_loaded_again(tiny_llama, tmp_path):
    container = pack_copy(tiny_llama, tmp_path / "tiny.axm")
    AutoConfig.from_pretrained(container)
    flip_byte(container, (tiny_llama / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was changed"):
        AutoModelForCausalLM.from_pretrained(container)


def test_a_container_is_verified_once_for_everything(tiny_llama, tmp_path, monkeypatch):
    container, calls = pack_copy(tiny_llama, tmp_path / "tiny.axm"), []
    verify = Container.verify
    monkeypatch.setattr(Container, "verify", lambda self, progress=None: (calls.append(self.path), verify(self)))
    AutoTokenizer.from_pretrained(container)
    AutoModelForCausalLM.from_pretrained(container)
    assert calls == [container]


def test_the_key_in_the_environment_counts(dense, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, KEY_HEX)
    assert AutoConfig.from_pretrained(dense).model_type == "llama"
    assert open_root(dense).container.key.key_id == KEY.key_id
    monkeypatch.setenv(ENVIRONMENT, "ab" * 32)
    with pytest.raises(CheckpointError, match="was packed with another key"):
        AutoConfig.from_pretrained(dense)


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoTokenizer, AutoConfig], ids=lambda kind: kind.__name__)
def test_a_file_that_is_no_container_is_refused(tmp_path, load):
    (tmp_path / "x.axm").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"x\.axm: it is not an \.axm container"):
        load.from_pretrained(tmp_path / "x.axm")


# what is not read from a container


@pytest.fixture
def only_gguf(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.gguf").write_bytes(b"GGUF")
    return pack_copy(tmp_path / "model", tmp_path / "gguf.axm")


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoTokenizer, AutoConfig], ids=lambda kind: kind.__name__)
def test_a_gguf_alone_is_refused(only_gguf, load):
    with pytest.raises(SRDError, match=r"only a GGUF file: score it with `srd eval`, or unpack it with `srd axm extr"):
        load.from_pretrained(only_gguf)


def test_a_pickle_is_not_opened(sharded, tmp_path):
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    torch.save({}, directory / "pytorch_model.bin")
    container = pack_copy(directory, tmp_path / "model.axm")
    assert not (view_of(container) / "pytorch_model.bin").exists()
    with pytest.raises(SRDError, match=r"model\.axm: only safetensors files are read from a container"):
        AutoModelForCausalLM.from_pretrained(container, use_safetensors=False)


def test_a_part_that_would_stay_on_the_disk_is_refused(dense, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places["model.layers"] = "disk"
    with pytest.raises(SRDError, match=r"tiny-llama\.axm: a part of the model would stay on the disk"):
        AutoModelForCausalLM.from_pretrained(dense, device_map=places, offload_folder=tmp_path)


def test_an_adapter_is_refused_where_transformers_asks_for_one(tiny_llama, tmp_path):
    from transformers.utils.hub import cached_file

    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (directory / "adapter_config.json").write_text("{}")
    container = pack_copy(directory, tmp_path / "model.axm")
    with pytest.raises(SRDError, match="holds an adapter"):
        cached_file(container, "adapter_config.json")


# the process around it


@pytest.mark.parametrize("imports", [PLUGIN + TRANSFORMERS, TRANSFORMERS + PLUGIN], ids=["plugin first", "plugin last"])
def test_any_order_of_imports_will_do_and_the_view_goes_with_the_process(corrected, finished_checkpoint, imports):
    done = subprocess.run(
        [sys.executable, "-c", imports + LOAD_BOTH, "", str(finished_checkpoint), str(corrected)],
        capture_output=True,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    same, view = done.stdout.split()
    assert same == "True"
    assert Path(view).parent == Path(tempfile.gettempdir())
    assert not Path(view).exists()


def test_a_fork_leaves_the_view_alone(dense):
    """A child that ends as Python ends would remove the view of its parent."""
    script = (
        PLUGIN
        + TRANSFORMERS
        + (
            "import os; from srd_modifier.transformers.containers import view_of\n"
            "view = view_of(sys.argv[1])\n"
            "child = os.fork()\n"
            "if child == 0: sys.exit()\n"
            "os.waitpid(child, 0); print(view.is_dir())\n"
        )
    )
    done = subprocess.run([sys.executable, "-c", script, str(dense)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_other_names_import_nothing_and_are_passed_on():
    """What loads directories and hub ids meets no part of what reads containers."""
    script = (
        PLUGIN
        + TRANSFORMERS
        + (
            "from transformers import AutoConfig\n"
            "AutoConfig.from_pretrained(sys.argv[1])\n"
            "AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "print([name for name in sys.modules if name.startswith('srd_modifier.axm')])\n"
        )
    )
    tiny_llama = Path(__file__).parents[2] / "examples" / "tiny-llama"
    done = subprocess.run([sys.executable, "-c", script, str(tiny_llama)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_hooks_find_all_that_they_wrap():
    """An attribute that a new Transformers lacks would be a warning."""
    script = (
        "import warnings; warnings.filterwarnings('error', 'srd-modifier')\n"
        + PLUGIN
        + (
            "from importlib import import_module\n"
            "from srd_modifier._container_hooks import MODULES\n"
            "for name in MODULES: import_module(name)\n"
            "print(len(MODULES) > 8)\n"
        )
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
