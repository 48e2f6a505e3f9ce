"""A streamed quantization that is killed, wherever that is, and resumed ends in the same bytes, and leaves nothing."""

import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed import Quantization, die, flip, in_child
from random_models import make_llama, save_model
from streamed import contents, differing, scheme, srd, write_recipe

from srd_modifier.checkpoint.base_writer import BaseWriter
from srd_modifier.checkpoint.shards import Shard
from srd_modifier.checkpoint.writer import SidecarWriter
from srd_modifier.errors import CheckpointError
from srd_modifier.modifier import rounded
from srd_modifier.quantizing import quantize
from srd_modifier.resuming.journal import Journal
from srd_modifier.resuming.workplace import unfinished
from srd_modifier.streaming.pipeline import LayerByLayer

KILLS = 20
STEPS = 7  # the embedding, four layers, the last norm, the head
TOO_LONG = 60

MODIFIERS = (("SRDModifier", srd(weights={"symmetric": False}, rounding="stochastic", density=0.5)),)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipes") / "recipe.yaml", *MODIFIERS)


@pytest.fixture(scope="module")
def expected(llama: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an undisturbed run: for reading only."""
    output = tmp_path_factory.mktemp("expected") / "checkpoint"
    quantize(str(llama), recipe, output)
    return output


@pytest.fixture
def output(work: Path) -> Path:
    """Where a checkpoint goes: alone in its folder, so that a test sees what is left beside it."""
    (work / "out").mkdir()
    return work / "out" / "checkpoint"


@pytest.fixture
def quantization(llama: Path, recipe: Path, output: Path, expected: Path) -> Quantization:
    return Quantization(llama, recipe, output, expected)


@pytest.fixture
def killed_in(quantization: Quantization) -> Callable[..., None]:
    """Quantize in a child that dies when it calls a function for the n-th time."""
    return quantization.killed_in


@pytest.fixture
def resume(quantization: Quantization) -> Callable[..., None]:
    """Go on in this process, and compare the whole directory."""
    return quantization.resume


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are done in this process, as they are done."""
    steps: list[str] = []
    inner = LayerByLayer._run

    def watched(self: LayerByLayer, step: Any, *args: Any) -> None:
        steps.append(step.name)
        inner(self, step, *args)

    monkeypatch.setattr(LayerByLayer, "_run", watched)
    return steps


# kills


def test_a_kill_at_random_points(quantization: Quantization, redone: list[str]) -> None:
    total = quantization.changes()
    assert total > 100
    begun = set()
    for point in sorted(random.Random(9).sample(range(1, total + 1), KILLS)):
        assert quantization.killed(point), f"change {point} of {total} was never reached"
        assert not quantization.output.exists()
        done = max(0, quantization.lines() - 1)
        redone.clear()
        quantization.resume()
        assert len(redone) == STEPS - done, f"after a kill at change {point} of {total}"
        begun.add(done)
        quantization.clean()
    assert len(begun) > 3, "the points are not spread over the layers"


@pytest.mark.slow
def test_a_kill_at_every_late_point(quantization: Quantization) -> None:
    """While headers are written, the final directory is assembled, and what is left is removed."""
    total = quantization.changes()
    for point in range(total - 40, total + 1):
        assert quantization.killed(point)
        assert not quantization.output.exists()
        quantization.resume()
        quantization.clean()


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (BaseWriter, "__init__", 1),
        (SidecarWriter, "__init__", 1),
        (Journal, "add", 1),
        (Journal, "add", STEPS),
        (SidecarWriter, "flush", 4),
        (rounded, "encode_rounded", 10),
        (BaseWriter, "finish", 1),
        (SidecarWriter, "finish", 1),
    ],
)
def test_a_kill_between_two_stages(
    owner: Any, name: str, call: int, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(owner, name, call)
    resume()


@pytest.mark.parametrize("name", ["link_or_copy", "attach_sidecar", "new_directory"])
def test_a_kill_while_the_directory_is_assembled(name: str, quantization: Quantization, redone: list[str]) -> None:
    from srd_modifier.streaming import run

    quantization.killed_in(run, name)
    assert quantization.lines() == STEPS + 1
    quantization.resume()
    assert redone == []


def test_two_kills(quantization: Quantization) -> None:
    quantization.killed_in(Journal, "add", 3)
    first = quantization.lines()
    quantization.killed_in(Journal, "add", 3, resume=True)
    assert quantization.lines() == first + 2
    quantization.killed_in(BaseWriter, "finish", resume=True)
    assert quantization.killed(3, resume=True)
    quantization.resume()


def test_a_kill_in_the_middle_of_a_line(
    output: Path, llama: Path, recipe: Path, resume: Callable[..., None], redone: list[str]
) -> None:
    write = Journal._write

    def half(self: Journal, line: str, mode: str) -> None:
        if '"layer 2"' in line:
            with self.path.open(mode) as file:
                file.write(line.encode()[:-20])
            die()
        write(self, line, mode)

    def work() -> None:
        Journal._write = half  # type: ignore[method-assign]
        quantize(str(llama), recipe, output)

    assert in_child(work) == signal.SIGKILL
    journal = unfinished(output) / "finished.jsonl"
    assert not journal.read_bytes().endswith(b"\n")
    resume()
    assert redone == ["layer 2", "layer 3", "model.norm", "lm_head"]


def test_a_kill_over_another_checkpoint(
    output: Path, expected: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    shutil.copytree(expected, output)
    (output / "notes.txt").write_text("of the old one")
    before = contents(output)
    killed_in(Journal, "add", 3, overwrite=True)
    assert contents(output) == before
    resume(overwrite=True)


def test_a_kill_after_everything_is_in_its_place(quantization: Quantization, redone: list[str]) -> None:
    """The checkpoint is whole: nothing is left to be done but to clear up."""
    quantization.killed_in(
        shutil, "rmtree", 2
    )  # the first is of the staging directory, which has become the checkpoint
    assert differing(quantization.output, quantization.expected) == []
    assert quantization.place.is_dir()
    with pytest.raises(CheckpointError, match="already exists; choose another directory or pass --overwrite"):
        quantization.run()
    quantization.resume()
    assert redone == []


def test_a_kill_after_everything_is_in_its_place_does_not_excuse_another_recipe(
    quantization: Quantization, work: Path
) -> None:
    quantization.killed_in(shutil, "rmtree", 2)
    recipe = write_recipe(work / "other.yaml", ("SRDModifier", srd()))
    with pytest.raises(CheckpointError, match="was begun with another recipe"):
        quantize(str(quantization.model), recipe, quantization.output, resume=True)
    quantization.resume()


def test_nothing_to_resume_is_no_error(resume: Callable[..., None], redone: list[str]) -> None:
    """So that a command can be repeated until it succeeds."""
    resume()
    assert len(redone) == STEPS


def test_an_interrupt_can_be_resumed(
    output: Path,
    llama: Path,
    recipe: Path,
    resume: Callable[..., None],
    redone: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 17:  # in the third layer
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    encode = rounded.encode_rounded
    with monkeypatch.context() as patch:
        patch.setattr(rounded, "encode_rounded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(llama), recipe, output)
    assert [path.name for path in output.parent.iterdir()] == [".checkpoint.unfinished.partial"]
    redone.clear()
    resume()
    assert redone == ["layer 2", "layer 3", "model.norm", "lm_head"]


def test_an_error_leaves_nothing_but_what_was_there(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SidecarWriter, "flush", fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            quantization.run()
    assert list(quantization.output.parent.iterdir()) == []
    quantization.killed_in(Journal, "add", 3)
    before = quantization.journal.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(SidecarWriter, "flush", fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            quantization.run(resume=True)
    assert quantization.journal.read_bytes() == before
    quantization.resume()


# what is on the disk


@pytest.mark.parametrize(
    ("file", "tensor", "step"),
    [
        ("model.safetensors", "model.embed_tokens.weight", "model.embed_tokens"),
        ("model.safetensors", "model.layers.0.mlp.up_proj.weight_packed", "layer 0"),
        ("model.safetensors", "model.layers.1.input_layernorm.weight", "layer 1"),
        ("srd/residual-00001-of-00001.safetensors", "model.layers.1.self_attn.q_proj.weight_d8_scale", "layer 1"),
    ],
)
def test_a_step_whose_bytes_were_damaged_is_done_again(
    file: str,
    tensor: str,
    step: str,
    output: Path,
    expected: Path,
    killed_in: Callable[..., None],
    resume: Callable[..., None],
    redone: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed_in(Journal, "add", 4)
    shard = Shard.open(expected / file)
    names = [name for name in shard.tensors if name == tensor or name.startswith(f"{tensor}_")]
    flip(unfinished(output) / file.replace("srd/", "residual/"), shard.tensors[names[0]].end - 1)
    with caplog.at_level(logging.WARNING, "srd_modifier.streaming.pipeline"):
        resume()
    assert redone == [step, "layer 2", "layer 3", "model.norm", "lm_head"]
    assert caplog.messages == [f"{step} was written, but its bytes are not what was written; it is done again"]


@pytest.mark.parametrize("name", ["model.safetensors", "residual"])
def test_files_that_were_removed_are_written_again(
    name: str, output: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    path = unfinished(output) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume()


def test_a_line_with_a_wrong_name_is_done_again(
    output: Path, killed_in: Callable[..., None], resume: Callable[..., None], redone: list[str]
) -> None:
    killed_in(Journal, "add", 4)
    journal = unfinished(output) / "finished.jsonl"
    text = journal.read_text()
    journal.write_text(text.replace("model.layers.1.mlp.up_proj.weight_packed", "model.layers.1.mlp.up_prok"))
    assert journal.read_text() != text
    resume()
    assert redone[0] == "layer 1"


def test_a_damaged_journal_is_a_sentence_and_is_kept(
    output: Path, llama: Path, recipe: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    journal = unfinished(output) / "finished.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(b"\0" * 40 + content[40:])
    with pytest.raises(CheckpointError, match=r"is damaged, so that the quantization cannot be resumed; pass --overw"):
        quantize(str(llama), recipe, output, resume=True)
    journal.write_bytes(content)
    resume()


# who may go on


def test_an_unfinished_one_is_refused_without_resume(
    output: Path, llama: Path, recipe: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    before = contents(output.parent)
    with pytest.raises(
        CheckpointError,
        match=r"an unfinished quantization to .*checkpoint waits in .*\.checkpoint\.unfinished\.partial; pass --resume",
    ):
        quantize(str(llama), recipe, output)
    assert contents(output.parent) == before
    resume()


def test_overwrite_starts_anew(
    output: Path, llama: Path, recipe: Path, expected: Path, killed_in: Callable[..., None], redone: list[str]
) -> None:
    killed_in(Journal, "add", 4)
    quantize(str(llama), recipe, output, overwrite=True)
    assert len(redone) == STEPS
    assert differing(output, expected) == []
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_starting_anew_takes_nothing_along(
    output: Path,
    llama: Path,
    recipe: Path,
    expected: Path,
    killed_in: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files of the other one had other names, as they do if their limits are passed."""
    with monkeypatch.context() as patch:
        patch.setitem(SidecarWriter.__init__.__kwdefaults__, "max_shard_bytes", 20_000)
        killed_in(Journal, "add", 4)
    assert len(list((unfinished(output) / "residual").iterdir())) > 1
    quantize(str(llama), recipe, output, overwrite=True)
    assert differing(output, expected) == []


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": ("SRDModifier", srd(weights={"symmetric": False}, rounding="stochastic", density=0.25)),
    "base": ("SRDModifier", srd(rounding="stochastic", density=0.5)),
    "none": ("QuantizationModifier", scheme(symmetric=False)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_recipe_is_refused(
    other: str,
    output: Path,
    work: Path,
    llama: Path,
    killed_in: Callable[..., None],
    resume: Callable[..., None],
) -> None:
    killed_in(Journal, "add", 4)
    before = contents(output.parent)
    changed = write_recipe(work / "other.yaml", OTHERS[other])
    with pytest.raises(CheckpointError, match="was begun with another recipe, so that it cannot be resumed; pass --ov"):
        quantize(str(llama), changed, output, resume=True)
    assert contents(output.parent) == before
    resume()


def test_another_model_is_refused(
    output: Path, work: Path, recipe: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    other = save_model(make_llama(num_hidden_layers=4, seed=1), work / "other")
    with pytest.raises(CheckpointError, match="was begun with another model, so that it cannot be resumed"):
        quantize(str(other), recipe, output, resume=True)
    resume()


def test_another_config_is_refused(
    output: Path, work: Path, llama: Path, recipe: Path, killed_in: Callable[..., None], resume: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    other = Path(shutil.copytree(llama, work / "other"))
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError, match=r"was begun with another config\.json, so that it cannot be resumed"):
        quantize(str(other), recipe, output, resume=True)
    resume()


@pytest.mark.parametrize("library", ["torch", "srd-modifier"])
def test_another_version_is_refused(
    library: str,
    output: Path,
    llama: Path,
    recipe: Path,
    killed_in: Callable[..., None],
    resume: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from srd_modifier.resuming import task

    killed_in(Journal, "add", 4)
    version = task.version
    with monkeypatch.context() as patch:
        patch.setattr(task, "version", lambda name: "0.0" if name == library else version(name))
        with pytest.raises(CheckpointError, match=f"was begun with another version of {library}, so that it cannot be"):
            quantize(str(llama), recipe, output, resume=True)
    resume()


def test_the_same_model_elsewhere_may_go_on(
    output: Path, work: Path, llama: Path, recipe: Path, expected: Path, killed_in: Callable[..., None]
) -> None:
    killed_in(Journal, "add", 4)
    moved = Path(shutil.copytree(llama, work / "moved"))
    quantize(str(moved), recipe, output, resume=True)
    assert differing(output, expected) == []


@pytest.fixture
def running(llama: Path, recipe: Path, output: Path) -> Iterator[int]:
    """A process that is quantizing to the same directory, and waits in the fourth step."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(TOO_LONG)
        add, calls = Journal.add, []

        def waiting(self: Journal, record: Any) -> None:
            calls.append(record)
            if len(calls) == 4:
                os.write(writer, b"!")
                signal.pause()
            add(self, record)

        Journal.add = waiting  # type: ignore[method-assign]
        try:
            quantize(str(llama), recipe, output)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_directory_that_another_process_fills_is_locked(
    options: dict[str, bool], running: int, output: Path, llama: Path, recipe: Path
) -> None:
    before = contents(output.parent)
    with pytest.raises(
        CheckpointError, match=r"^another process is quantizing to .*checkpoint; wait for it, or choose"
    ):
        quantize(str(llama), recipe, output, **options)
    assert contents(output.parent) == before


def test_a_lock_goes_with_its_process(running: int, output: Path, resume: Callable[..., None]) -> None:
    os.kill(running, signal.SIGKILL)
    os.waitid(os.P_PID, running, os.WEXITED | os.WNOWAIT)
    resume()
