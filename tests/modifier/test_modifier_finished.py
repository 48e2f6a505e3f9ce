"""A calibrated quantization that is killed, wherever that is, and resumed ends in the same bytes."""

import json
import logging
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Quantization, die, flip, in_child
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.sequential.helpers import Subgraph
from random_models import make_llama, make_mixture, save_model
from streamed import contents, scheme, srd, write_recipe

from srd_modifier import quantizing
from srd_modifier.errors import CheckpointError, SRDError
from srd_modifier.modifier import capture
from srd_modifier.modifier.candidates import file_of
from srd_modifier.modifier.finished import FinishedSteps
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.quantizing import quantize
from srd_modifier.resuming.journal import Journal

KILLS = 20
LAYERS = 4

DATA = [[random.Random(row).randrange(1, 4000) for _ in range(48)] for row in range(8)]
OTHER_DATA = [[*DATA[0][:-1], 7], *DATA[1:]]

RECIPES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "gptq": (("SRDModifier", {"residual_group_size": 32}), ("GPTQModifier", scheme(symmetric=False))),
    "some": (
        ("SRDModifier", {"residual_group_size": 32, "correct": {"depth": [0.3, 0.7]}}),
        ("GPTQModifier", scheme(actorder="weight")),
    ),
    "feedback": (
        (
            "SRDModifier",
            srd(rounding="feedback", base_rounding="feedback", residual_bits=4, sensitivity="gradient"),
        ),
    ),
    "budget": (("SRDModifier", {"correct": {"budget": "7bpw"}}), ("GPTQModifier", scheme())),
    "nearest": (
        ("SRDModifier", {"residual_group_size": 32, "rounding": "feedback"}),
        ("QuantizationModifier", scheme(symmetric=False)),
    ),
    "importance": (("SRDModifier", srd()),),
    "mixed": (
        ("SRDModifier", {"residual_group_size": 32}),
        ("QuantizationModifier", scheme("re:.*self_attn.*")),
        ("GPTQModifier", scheme("re:.*mlp.*")),
    ),
    "two": (
        ("SRDModifier", {"residual_group_size": 32, "correct": {"targets": ["re:.*self_attn.*"]}}),
        ("SRDModifier", {"residual_group_size": 64, "correct": {"targets": ["re:.*mlp.*"]}}),
        ("GPTQModifier", scheme()),
    ),
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with random bfloat16 weights: for reading only."""
    return save_model(
        make_llama(num_hidden_layers=LAYERS, uneven_norms=True), tmp_path_factory.mktemp("models") / "llama"
    )


@pytest.fixture(scope="module")
def make(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Quantization]:
    """A quantization with its undisturbed output, which keeps nothing on the way and is made once for each recipe."""
    expected: dict[str, Path] = {}

    def run(kind: str, work: Path) -> Quantization:
        recipe = write_recipe(work / f"{kind}.yaml", *RECIPES[kind])
        if kind not in expected:
            output = tmp_path_factory.mktemp(kind) / "checkpoint"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quantizing, "why_not_resumable", lambda *_: "it is compared with")
                quantize(str(llama), recipe, output, dataset=DATA)
            expected[kind] = output
        (work / "out").mkdir()
        return Quantization(llama, recipe, work / "out" / "checkpoint", expected[kind], {"dataset": DATA})

    return run


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def quantization(make: Callable[..., Quantization], work: Path) -> Quantization:
    return make("gptq", work)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The decoder layers whose modules are calibrated, quantized or encoded in this process."""
    layers: set[str] = set()
    add, hook, encode = CalibrationInputs.add, GPTQModifier.calibrate_module, capture.ResidualCapture._encode_quantized

    def note(name: str) -> None:
        layers.add(name.partition(".layers.")[2].partition(".")[0])

    def adding(self: Any, name: str, inputs: Any) -> None:
        note(name)
        add(self, name, inputs)

    def hooked(self: Any, module: Any, *args: Any) -> None:
        note(self._module_names[module])
        hook(self, module, *args)

    def encoding(self: Any, module: Any, *args: Any) -> bool:
        note(self.names[module])
        return encode(self, module, *args)

    monkeypatch.setattr(CalibrationInputs, "add", adding)
    monkeypatch.setattr(GPTQModifier, "calibrate_module", hooked)
    monkeypatch.setattr(capture.ResidualCapture, "_encode_quantized", encoding)
    return layers


# kills


@pytest.mark.parametrize("kind", ["gptq", "feedback", pytest.param("budget", marks=pytest.mark.slow)])
def test_a_kill_at_random_points(
    kind: str, make: Callable[..., Quantization], work: Path, calibrated: set[str]
) -> None:
    quantization = make(kind, work)
    total = quantization.changes()
    begun = set()
    for point in sorted(random.Random(9).sample(range(1, total + 1), KILLS)):
        assert quantization.killed(point), f"change {point} of {total} was never reached"
        assert not quantization.output.exists()
        text = quantization.journal.read_text() if quantization.journal.exists() else ""
        done = text[: text.rfind("\n") + 1].count('"step": "model.layers')
        calibrated.clear()
        quantization.resume()
        assert calibrated == {str(layer) for layer in range(done, LAYERS)}, f"after a kill at change {point} of {total}"
        begun.add(done)
        quantization.clean()
    assert len(begun) > 3, "the points are not spread over the layers"


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("layers", [1, LAYERS - 1])
def test_a_kill_between_two_layers(
    kind: str, layers: int, make: Callable[..., Quantization], work: Path, calibrated: set[str]
) -> None:
    quantization = make(kind, work)
    before = kind == "mixed"  # round-to-nearest has its turn before, without data, with all layers at once
    quantization.killed_in(FinishedSteps, "keep", layers + 1 + before)
    calibrated.clear()
    quantization.resume()
    assert calibrated == {str(layer) for layer in range(layers, LAYERS)}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_kill_while_it_is_saved(
    kind: str, make: Callable[..., Quantization], work: Path, calibrated: set[str]
) -> None:
    """Nothing is calibrated again, and the directory that it had begun does not stay behind."""
    quantization = make(kind, work)
    quantization.killed_in(json, "dump", 1)  # of the model's configuration
    assert quantization.lines() > LAYERS
    assert len(list(quantization.output.parent.iterdir())) == 3, "the workplace, and two that are being filled"
    calibrated.clear()
    quantization.resume()
    assert calibrated == set()


def test_a_kill_after_everything_is_in_its_place(quantization: Quantization, calibrated: set[str]) -> None:
    """The checkpoint is whole: nothing is left to be done but to clear up."""

    def work() -> None:
        rmtree = shutil.rmtree

        def dying(path: Path, *args: Any, **kwargs: Any) -> None:
            if path == quantization.place and quantization.output.exists():
                die()
            rmtree(path, *args, **kwargs)

        shutil.rmtree = dying
        quantization.run()

    assert in_child(work) == signal.SIGKILL
    quantization.resume()
    assert calibrated == set()


@pytest.mark.parametrize("kind", ["gptq", "two"])
def test_finished_layers_see_the_data_once(
    kind: str, make: Callable[..., Quantization], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are run for what comes out of them, and no more to be calibrated; nor is the embedding."""
    quantization = make(kind, work)
    quantization.killed_in(FinishedSteps, "keep", 3)
    forward = Subgraph.forward
    calls: list[Subgraph] = []

    def counting(self: Subgraph, *args: Any, **inputs: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Subgraph, "forward", counting)
        quantization.resume()
        assert Subgraph.forward is counting
    passes = Counter(id(one) for one in calls)  # in the order of their first calls
    assert [count // len(DATA) for count in passes.values()] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_the_other_pipelines(pipeline: str, quantization: Quantization, work: Path) -> None:
    """The basic one calibrates all layers at once, so that it is all or nothing."""
    options = {**quantization.options, "pipeline": pipeline}
    quantize(str(quantization.model), quantization.recipe, work / "expected", **options)
    quantization.options, quantization.expected = options, work / "expected"
    for call in (1, 2) if pipeline == "sequential" else (1,):
        quantization.killed_in(FinishedSteps, "keep", call)
        quantization.resume()
        quantization.clean()


def test_several_kills(quantization: Quantization, calibrated: set[str]) -> None:
    quantization.killed_in(FinishedSteps, "keep", 2)
    quantization.killed_in(FinishedSteps, "keep", 2, resume=True)
    quantization.killed_in(FinishedSteps, "keep", 1, resume=True)
    quantization.resume()
    assert calibrated == {"2", "3"}


def test_weights_on_the_disk(quantization: Quantization) -> None:
    """What a killed process had put aside for itself goes, too."""
    quantization.options["max_memory"] = 200_000
    quantization.killed_in(FinishedSteps, "keep", 3)
    assert any(path.name.startswith(".srd-offload-") for path in quantization.place.iterdir())
    quantization.resume()


def test_a_mixture_of_experts(work: Path, monkeypatch: pytest.MonkeyPatch, calibrated: set[str]) -> None:
    """Experts that no token reaches have no inputs, and are as they were left."""
    model = save_model(make_mixture(num_experts=8), work / "mixture")
    ignored = scheme() | {"ignore": ["lm_head", "re:.*mlp.gate$"]}
    recipe = write_recipe(
        work / "recipe.yaml", ("SRDModifier", {"correct": {"budget": "7bpw"}}), ("GPTQModifier", ignored)
    )
    few = [DATA[0][:6], DATA[1][:6]]
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "why_not_resumable", lambda *_: "it is compared with")
        quantize(str(model), recipe, work / "expected", dataset=few)
    (work / "out").mkdir()
    quantization = Quantization(model, recipe, work / "out" / "checkpoint", work / "expected", {"dataset": few})
    quantization.killed_in(FinishedSteps, "keep", 2)
    calibrated.clear()
    quantization.resume()
    assert calibrated == {"1"}


def test_the_models_own_samples_are_not_written_again(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dataset": "self", "num_samples": 4, "max_seq_length": 32}
    quantize(str(quantization.model), quantization.recipe, work_output(quantization), **options)
    quantization.options, quantization.expected = options, work_output(quantization)
    quantization.killed_in(FinishedSteps, "keep", 2)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("they were written before")

    monkeypatch.setattr(quantizing, "from_model", never)
    with pytest.raises(CheckpointError, match="was begun with another set of samples"):
        quantization.run(resume=True, num_samples=5)
    samples = quantization.place / "samples.json"
    content = samples.read_bytes()
    samples.write_bytes(content[:-3])
    with pytest.raises(SRDError, match=r"^cannot read .*samples\.json: .*; pass --overwrite instead of --resume"):
        quantization.run(resume=True)
    samples.write_bytes(content)
    quantization.resume()


def work_output(quantization: Quantization) -> Path:
    return quantization.output.parent.parent / "expected"


def test_a_file_of_another_kind_beside_it(quantization: Quantization, work: Path) -> None:
    """A GGUF file is written from the original once all is calibrated."""
    recipe = write_recipe(
        work / "gguf.yaml", ("SRDModifier", {"residual_group_size": 32, "gguf": "Q8_0"}), ("GPTQModifier", scheme())
    )
    quantize(str(quantization.model), recipe, work / "expected", dataset=DATA)
    quantization.recipe, quantization.expected = recipe, work / "expected"
    quantization.killed_in(FinishedSteps, "keep", 3)
    quantization.resume()
    assert list(quantization.output.glob("*.gguf"))


def test_nothing_to_resume_is_no_error(quantization: Quantization, calibrated: set[str]) -> None:
    """So that a command can be repeated until it succeeds."""
    quantization.resume()
    assert len(calibrated) == LAYERS


def exhaust_memory() -> None:
    torch.empty(1 << 60, dtype=torch.int8)


def exhaust_pythons_memory() -> None:
    bytearray(1 << 62)


@pytest.mark.parametrize("exhaust", [exhaust_memory, exhaust_pythons_memory])
def test_memory_that_runs_out_can_be_resumed(
    exhaust: Callable[[], None], quantization: Quantization, calibrated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, calls = FinishedSteps.keep, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            exhaust()
        keep(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedSteps, "keep", failing)
        with pytest.raises(CheckpointError, match=r"^memory ran out, and what is finished waits in .*; free some, or"):
            quantization.run()
    calibrated.clear()
    quantization.resume()
    assert calibrated == {"2", "3"}


def test_an_error_leaves_nothing_but_what_was_there(
    quantization: Quantization, work: Path, calibrated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(FinishedSteps, "keep", fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            quantization.run()
    assert list(quantization.output.parent.iterdir()) == []
    quantization.killed_in(FinishedSteps, "keep", 3)
    with pytest.raises(SRDError, match="there is no such file"):
        quantization.run(resume=True, dataset=str(work / "missing.txt"))
    keep = FinishedSteps.keep

    def fail_later(self: Any, step: str, *args: Any) -> None:
        keep(self, step, *args)
        if ".3." in step:
            fail()

    with monkeypatch.context() as patch:
        patch.setattr(FinishedSteps, "keep", fail_later)
        with pytest.raises(CheckpointError, match="the disk is full"):
            quantization.run(resume=True)
    calibrated.clear()
    quantization.resume()
    assert calibrated == set()


# what is on the disk


@pytest.mark.parametrize(
    ("kind", "file", "again"),
    [
        ("gptq", f"calibrated/{file_of(Path(), 'model.layers.0.self_attn.q_proj')}", "0"),
        ("gptq", "sidecar/residual-00001-of-00001.safetensors", None),
        ("feedback", f"calibrated/{file_of(Path(), 'output sensitivity')}", ""),
        ("budget", f"candidates/{file_of(Path(), 'model.layers.1.mlp.up_proj')}", "1"),
    ],
)
def test_damaged_files_are_made_again(
    kind: str,
    file: str,
    again: str | None,
    make: Callable[..., Quantization],
    work: Path,
    calibrated: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    quantization = make(kind, work)
    quantization.killed_in(FinishedSteps, "keep", 4)
    path = quantization.place / file
    flip(path, path.stat().st_size - 1 if again is not None else path.stat().st_size // 8)
    calibrated.clear()
    with caplog.at_level(logging.WARNING, "srd_modifier.modifier.finished"):
        quantization.resume()
    done = calibrated - {"3"}
    assert len(done) == (again != "")
    assert again in (None, "", *done)
    warnings = [message for message in caplog.messages if "its bytes are not what was written" in message]
    assert len(warnings) == len(done)


@pytest.mark.parametrize("kind", ["gptq", "budget"])
@pytest.mark.parametrize("folder", ["calibrated", "sidecar", "candidates"])
def test_files_that_were_removed_are_made_again(
    kind: str, folder: str, make: Callable[..., Quantization], work: Path
) -> None:
    quantization = make(kind, work)
    quantization.killed_in(FinishedSteps, "keep", 4)
    shutil.rmtree(quantization.place / folder, ignore_errors=True)
    quantization.resume()


def test_a_line_with_other_details_is_done_again(quantization: Quantization, calibrated: set[str]) -> None:
    quantization.killed_in(FinishedSteps, "keep", 4)
    lines = quantization.journal.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"step": "model.layers.1.' in line)
    lines[number] = lines[number].replace("weight_packed", "weight_pocket", 1)
    quantization.journal.write_text("\n".join(lines) + "\n")
    quantization.resume()
    assert calibrated == {"1", "3"}


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"step": 1, "digest": "", "details": {}}', b'{"step": "a"}'])
def test_a_damaged_journal_is_a_sentence_and_is_kept(line: bytes, quantization: Quantization) -> None:
    quantization.killed_in(FinishedSteps, "keep", 4)
    content = quantization.journal.read_bytes()
    quantization.journal.write_bytes(content + line + b"\n")
    with pytest.raises(CheckpointError, match=r"is damaged, so that the quantization cannot be resumed; pass --overw"):
        quantization.run(resume=True)
    quantization.journal.write_bytes(content)
    quantization.resume()


# who may go on


def test_other_data_are_refused_and_nothing_is_lost(quantization: Quantization) -> None:
    quantization.killed_in(FinishedSteps, "keep", 4)
    before = contents(quantization.place)
    with pytest.raises(CheckpointError, match="was begun with another set of calibration data, so that it"):
        quantization.run(resume=True, dataset=OTHER_DATA)
    assert contents(quantization.place) == before
    quantization.resume()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("recipe", lambda one, work: {"recipe": write_recipe(work / "other.yaml", *RECIPES["some"])}),
        ("model", lambda one, work: {"model": save_model(make_llama(num_hidden_layers=4, seed=1), work / "other")}),
    ],
)
def test_another_task_is_refused(
    field: str, change: Callable[..., dict[str, Path]], quantization: Quantization, work: Path
) -> None:
    quantization.killed_in(FinishedSteps, "keep", 2)
    other = replace(quantization, **change(quantization, work))
    with pytest.raises(CheckpointError, match=f"was begun with another {field}, so that it cannot be resumed; pass --"):
        other.run(resume=True)
    quantization.resume()


def test_another_pipeline_is_refused(quantization: Quantization) -> None:
    quantization.killed_in(FinishedSteps, "keep", 2)
    with pytest.raises(CheckpointError, match="was begun with another --dataset or --pipeline"):
        quantization.run(resume=True, pipeline="basic")
    quantization.resume()


def test_an_unfinished_one_is_refused_without_resume(quantization: Quantization) -> None:
    quantization.killed_in(FinishedSteps, "keep", 2)
    with pytest.raises(CheckpointError, match=r"an unfinished quantization to .* waits in .*; pass --resume to go on"):
        quantization.run()
    quantization.resume()


def test_overwrite_starts_anew(quantization: Quantization, calibrated: set[str]) -> None:
    quantization.killed_in(FinishedSteps, "keep", 4)
    quantization.run(overwrite=True)
    assert len(calibrated) == LAYERS
    assert [path.name for path in quantization.output.parent.iterdir()] == [quantization.output.name]


def test_a_streamed_one_is_not_taken_for_a_calibrated_one(quantization: Quantization, work: Path) -> None:
    """The same recipe, with and without data."""
    recipe = write_recipe(work / "streamed.yaml", ("SRDModifier", srd()))
    with_data = Quantization(
        quantization.model, recipe, quantization.output, quantization.expected, quantization.options
    )
    without = replace(with_data, options={})
    for first, second in ((with_data, without), (without, with_data)):
        first.killed_in(Journal, "add", 4)
        with pytest.raises(CheckpointError, match="was begun with another --dataset or --pipeline, so that it cannot"):
            second.run(resume=True)
        first.run(resume=True)
        first.clean()


@pytest.mark.parametrize("kind", ["awq", "none"])
def test_what_cannot_be_resumed_says_so_and_leaves_nothing(kind: str, quantization: Quantization, work: Path) -> None:
    modifiers, reason = {
        "awq": (
            (("SRDModifier", {}), ("AWQModifier", {}), ("QuantizationModifier", scheme())),
            "AWQModifier keeps no layer as it was finished",
        ),
        "none": ((("GPTQModifier", scheme()),), "it has no SRDModifier, which keeps what is finished"),
    }[kind]
    quantization.recipe = write_recipe(work / "other.yaml", *modifiers)
    with pytest.raises(SRDError, match=rf"cannot be resumed, so leave --resume out: {reason}$"):
        quantization.run(resume=True)
    assert list(quantization.output.parent.iterdir()) == []
