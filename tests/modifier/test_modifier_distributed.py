"""Two processes that quantize one model together: the bytes that one alone writes, or nothing."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import distributed_quantize
import pytest
import torch
import yaml
from datasets import Dataset
from distributed_quantize import RECIPES, SCHEME
from random_models import TINY_LLAMA
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from srd_modifier.distributed import Ranks, in_order, launched, launched_rank, own_part
from srd_modifier.errors import RecipeError, SRDError
from srd_modifier.modifier.companion import every_batch
from srd_modifier.modifier.inputs import CalibrationInputs
from srd_modifier.modifier.plan import check_parts

HELPER = Path(distributed_quantize.__file__)
TIMEOUT = 240  # seconds, of which a quiet machine needs a tenth
CPU = torch.device("cpu")
FEEDBACK = {"base_rounding": "feedback", "rounding": "feedback", "residual_bits": 4, "residual_group_size": 32}
SENTENCE = "process 0 of 2 lost touch with the others"


class Pretended(Ranks):
    """One of several processes, of which the others' parts are known beforehand."""

    def __init__(self, rank: int, *parts: Any) -> None:
        super().__init__()
        self.rank, self.size, self.parts = rank, len(parts), parts

    def gather(self, value: Any) -> list[Any]:
        return [value if rank == self.rank else part for rank, part in enumerate(self.parts)]


# --- without any other process


def test_a_process_alone_is_the_first_of_one_and_talks_to_itself():
    ranks = Ranks.current()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.gather("own") == ["own"]
    assert ranks.merge({"a": 1}) == {"a": 1}
    assert ranks.from_first("own") == "own"
    tensor = torch.tensor([1.0, 2.0])
    ranks.sum(tensor)
    ranks.spread(tensor, owner=0)
    assert tensor.tolist() == [1.0, 2.0]
    assert ranks.divide({"a": 1.0, "b": 7.0}) == {"a": 0, "b": 0}
    ranks.agree()
    with pytest.raises(SRDError, match=r"^the disk is full$"), ranks.together():
        raise SRDError("the disk is full")


def test_work_is_divided_by_what_it_costs():
    ranks = Pretended(1, None, None, None)
    owners = ranks.divide({"a": 1.0, "b": 7.0, "c": 2.0, "d": 5.0, "e": 4.0, "f": 2.0})
    loads = [
        sum(cost for name, cost in zip("abcdef", (1, 7, 2, 5, 4, 2), strict=True) if owners[name] == i)
        for i in range(3)
    ]
    assert sorted(loads) == [7, 7, 7]
    assert owners == Pretended(0, None, None, None).divide({"a": 1.0, "b": 7.0, "c": 2.0, "d": 5.0, "e": 4.0, "f": 2.0})


def test_an_error_is_everybodys_and_says_whose_it_was():
    ranks = Pretended(0, None, "the disk is full")
    with pytest.raises(SRDError, match=r"^process 1 of 2 failed, and this one with it: the disk is full$"):
        ranks.agree()
    assert ranks.broken
    with pytest.raises(ValueError, match="its own"), Pretended(1, None, None).together():
        raise ValueError("its own")


def test_samples_of_all_are_in_the_order_of_one():
    assert in_order([["ccc", "b"], ["ddd", "ee", "a"]], len) == ["ccc", "ddd", "ee", "b", "a"]
    # of loaders that do not sort by length, one part after the other
    assert in_order([["b", "ccc"], ["ddd", "ee", "a"]], len) == ["b", "ccc", "ddd", "ee", "a"]


def test_the_companion_file_is_calibrated_on_everybodys_samples():
    def batch(*ids: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}

    ranks = Pretended(0, None, [[5, 6, 7], [8, 9]])
    ranks.together = nullcontext  # type: ignore[method-assign]
    batches = every_batch([batch(1, 2, 3), batch(4)], ranks)
    assert [one["input_ids"].tolist() for one in batches] == [[[1, 2, 3]], [[5, 6, 7]], [[8, 9]], [[4]]]


def test_a_part_for_every_process_and_none_without_samples(monkeypatch):
    dataset = Dataset.from_dict({"input_ids": [[i] for i in range(7)]})
    assert own_part(dataset) is dataset
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        part = own_part(dataset)
        parts.append([ids[0] for ids in part["input_ids"]])
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
    with pytest.raises(SRDError, match="2 samples are too few for 3 processes; start fewer, or give more text"):
        own_part(dataset.select(range(2)))


def test_a_loader_that_gives_everybody_the_first_part_is_refused():
    dataset = Dataset.from_dict({"input_ids": [[i] for i in range(6)]})
    ranks = Pretended(1, False, False)
    check_parts(DataLoader(dataset, sampler=RandomSampler(dataset)), ranks)
    check_parts(DataLoader(dataset), ranks)
    check_parts(None, ranks)
    misled = DataLoader(dataset, sampler=RandomSampler(dataset.select(range(3, 6))))
    check_parts(misled, Ranks())
    with pytest.raises(RecipeError, match=r"all 2 processes calibrate on the first part .*own_part\(dataset\)"):
        check_parts(misled, ranks)


@pytest.mark.parametrize("second_moments", [True, False])
def test_the_mean_does_not_depend_on_the_order_of_the_batches(second_moments):
    # magnitudes over five decades, of which sums in float32 lose the smaller ones in one order and not in another
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(7, 40, generator=generator) * 10.0 ** (i % 6 - 3) for i in range(24)]
    found = []
    for order in (batches, batches[::-1], batches[12:] + batches[:12]):
        inputs = CalibrationInputs(second_moments=second_moments)
        for batch in order:
            inputs.add("a", batch)
        hessian = inputs.hessian("a", CPU)
        found.append((inputs.mean_squares()["a"], hessian.regularized if hessian is not None else None))
    for square, moment in found[1:]:
        assert torch.equal(square, found[0][0])
        assert moment is None or torch.equal(moment, found[0][1])


def test_nothing_is_joined_without_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    with launched() as ranks:
        assert ranks.size == 1
    assert not torch.distributed.is_initialized()


# --- with another process


def start(
    folder: Path, *arguments: str, processes: int = 2, who: str = ""
) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """Start the helper, in as many processes, with a log of each."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    common |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(HELPER.parent), str(HELPER.parents[2])])
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(processes):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else common
        log = folder / f"log-{who}{processes}-{rank}"
        with log.open("w") as file:
            command = [sys.executable, str(HELPER), *arguments, str(folder)]
            started.append((subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT), log))
    return started


def finish(started: list[tuple[subprocess.Popen[bytes], Path]]) -> list[tuple[int, str]]:
    """Exit status and output of every process; they are ended if one hangs."""
    try:
        return [(process.wait(timeout=TIMEOUT), log.read_text(encoding="utf-8")) for process, log in started]
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_llama, small_mixture) -> Path:
    """A folder with two models and a recipe."""
    folder = tmp_path_factory.mktemp("distributed")
    shutil.copytree(small_llama, folder / "llama")
    shutil.copytree(small_mixture, folder / "mixture")
    recipe = {"quant_stage": {"quant_modifiers": {"SRDModifier": {**SCHEME, **FEEDBACK}}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def quantized(models) -> Path:
    """The same folder with what one process alone and two together make of every recipe."""
    both = [*start(models, "quantize", processes=1), *start(models, "quantize")]
    for status, output in finish(both):
        assert status == 0, output[-3000:]
    return models


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_write_the_bytes_of_one(recipe, quantized, directory_bytes):
    alone, together = (directory_bytes(quantized / who / recipe) for who in ("alone", "together"))
    assert "srd/residual-00001-of-00001.safetensors" in alone
    assert ("srd/importance.safetensors" in alone) == (recipe != "nearest")
    assert ("srd/sensitivity.json" in alone) == (recipe in ("budget", "budget-by-noise", "experts"))
    assert sorted(alone) == sorted(together)
    assert [name for name in alone if alone[name] != together[name]] == []


@pytest.fixture(scope="module")
def found(models) -> list[dict[str, Any]]:
    for status, output in finish(start(models, "talk", who="talk-")):
        assert status == 0, output[-3000:]
    return [torch.load(models / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_what_two_processes_tell_each_other(found):
    assert [(one["rank"], one["size"]) for one in found] == [(0, 2), (1, 2)]
    for one in found:
        assert one["gathered"] == [0, 10]
        assert one["merged"] == {0: "own", 1: "own", "common": 1}
        assert one["from first"] == "process 0"
        assert one["divided"] == {"a": 1, "b": 0, "c": 0, "d": 1}
        assert one["sum"] == [3.0] * 3
        assert one["spread"] == [1.0] * 2
    assert found[0]["received"]


@pytest.mark.slow
def test_an_error_in_one_process_is_a_sentence_in_the_other(found):
    assert [one["broken before"] for one in found] == [False, False]
    assert found[0]["failed"] == "process 1 of 2 failed, and this one with it: the disk is full"
    assert found[1]["failed"] == "the disk is full"
    assert all(one["broken"] and one["still here"] == [None, None] for one in found)


@pytest.mark.slow
def test_the_moments_of_two_processes_are_those_of_one(found):
    batches = torch.randn(6, 9, 24, generator=torch.Generator().manual_seed(0))
    alone = CalibrationInputs(second_moments=True)
    for number, hidden in enumerate(batches):
        for name in ("q", "k"):
            alone.add(name, hidden)
        if number == 4:
            alone.add("expert", hidden + 1)
    expected = {name: alone.hessian(name, CPU) for name in ("q", "k", "expert")}
    for one in found:
        assert one["inputs"]["groups"] == {"q": ["q", "k"], "expert": ["expert"], "idle": ["idle"]}
        assert one["inputs"]["squares"].keys() == {"q", "k", "expert"}
        for name, square in one["inputs"]["squares"].items():
            assert torch.equal(square, alone.mean_squares()[name]), name
        assert "b reads the input of a in one calibration batch" in one["inputs"]["disagreeing"]
    # the process that will quantize the modules has their moments, though it may have seen no batch of them
    moments = found[0]["inputs"]["moments"]
    assert moments.keys() == expected.keys()
    for name, moment in moments.items():
        assert torch.equal(moment, expected[name].regularized), name
    assert found[0]["inputs"]["shared"]
    assert not found[1]["inputs"]["moments"]


FAULTS = {
    # in the middle of llm-compressor's work, where nobody else listens
    "error-in-calibration": (1, SENTENCE, "SRDError: the disk is full"),
    "error-in-encoding": (1, "process 1 of 2 failed, and this one with it: the disk is full", "the disk is full"),
    "error-in-writing": (
        1,
        "SRDError: the disk is full",
        "process 0 of 2 failed, and this one with it: the disk is full",
    ),
    "kill-in-encoding": (-9, SENTENCE, ""),
    "kill-in-waiting": (-9, SENTENCE, ""),
}


@pytest.fixture
def empty_output(models) -> Iterator[Path]:
    folder = models / "out"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_where_one_process_fails_no_process_hangs_and_nothing_is_left(fault, models, empty_output):
    status, first_says, second_says = FAULTS[fault]
    first, second = finish(start(models, "fail", fault, who=f"{fault}-"))
    assert first[0] == 1, first[1][-3000:]
    assert second[0] == status, second[1][-3000:]
    assert first_says in first[1]
    assert second_says in second[1]
    assert list(empty_output.iterdir()) == []


@pytest.mark.slow
def test_the_command_under_torchrun(models, tmp_path, directory_bytes):
    text = TINY_LLAMA.parent / "text" / "demo.txt"
    arguments = ["quantize", str(models / "llama"), "--recipe", str(models / "recipe.yaml"), "--dataset", str(text)]
    arguments += ["--num-samples", "6", "--max-seq-length", "48", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPER.parents[2])}

    def run(*launcher: str, output: Path) -> str:
        command = [sys.executable, *launcher, "-m", "srd_modifier.cli", *arguments, str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(output=tmp_path / "alone")
    said = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", output=tmp_path / "together")
    assert said.count("base digest") == 1  # of the two processes one says what was written
    assert directory_bytes(tmp_path / "together") == directory_bytes(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]
