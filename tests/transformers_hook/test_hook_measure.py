import mmap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srd_modifier.errors import CheckpointError
from srd_modifier.met import INTENTS, Policy, build_met
from srd_modifier.selection.depth import CHUNKS
from srd_modifier.transformers import measure, memory
from srd_modifier.transformers.measure import measure_hydration

LAYERS = {"INFORM": (0, 1), "CLARIFY": (0, 1, 5), "REFUSE": (0, 1, 5), "UNCERTAIN": (0, 1, 5)}  # of six


def residual_bytes(directory: Path, layers: tuple[int, ...]) -> int:
    """Bytes of the stored tensors of these layers."""
    files = (load_file(path) for path in (directory / "srd").glob("residual-*.safetensors"))
    return sum(
        tensor.nbytes
        for tensors in files
        for name, tensor in tensors.items()
        if any(f".layers.{layer}." in name for layer in layers)
    )


def test_every_intent_is_measured(finished_checkpoint):
    policy = Policy.default()
    found = measure_hydration(finished_checkpoint, policy, dtype=torch.bfloat16)
    assert tuple(row.intent for row in found) == INTENTS
    for row in found:
        assert row.chunks == policy.chunks(row.intent)
        assert row.residual_bytes == residual_bytes(finished_checkpoint, LAYERS.get(row.intent, tuple(range(6))))
        assert 0 < row.seconds < 60
        assert row.resident_bytes_before is not None
        assert row.resident_bytes_peak >= row.resident_bytes_after > 0


def test_a_policy_of_ones_own(finished_checkpoint):
    policy = Policy.from_mapping({"ANSWER": ["early", "factual"], "DRAFT": []}, "test")
    answer, draft = measure_hydration(finished_checkpoint, policy, dtype=torch.float32)
    assert (answer.intent, answer.residual_bytes) == ("ANSWER", residual_bytes(finished_checkpoint, (0, 1, 2)))
    assert (draft.intent, draft.chunks, draft.residual_bytes) == ("DRAFT", (), 0)


def test_the_bytes_are_those_of_the_policy_file(finished_checkpoint):
    budgets = build_met(finished_checkpoint)["budgets"]
    for row in measure_hydration(finished_checkpoint, Policy.default()):
        assert row.residual_bytes == budgets[row.intent]["residual_bytes"]


def test_each_time_it_begins_from_plain_w4(finished_checkpoint, monkeypatch):
    hydrated, times = [], iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    plain = measure.hydrate

    def spy(model, **kwargs) -> None:
        correction = measure.correction_of(model)
        hydrated.append((set(correction.hydrated), model.dtype))
        plain(model, **kwargs)

    monkeypatch.setattr(measure, "hydrate", spy)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    policy = Policy.from_mapping({"ALL": list(CHUNKS)}, "test")
    (row,) = measure_hydration(finished_checkpoint, policy, dtype=torch.float32)
    assert hydrated == [(set(), torch.float32)] * 3
    assert row.seconds == 2.0


def test_a_model_without_a_residual(random_llama):
    with pytest.raises(CheckpointError, match="has no srd_config"):
        measure_hydration(random_llama, Policy.default(), dtype=torch.bfloat16)


# --- memory


def fill_and_return(size: int) -> None:
    """Not by way of an allocator, which may have kept what was freed before."""
    with mmap.mmap(-1, size) as pages:
        for page in range(0, size, mmap.PAGESIZE):
            pages[page] = 1
        time.sleep(0.05)  # long enough to be sampled


@pytest.mark.parametrize("resettable", [True, False], ids=["kernel", "samples"])
def test_a_peak_is_seen(resettable, monkeypatch):
    if not resettable:
        monkeypatch.setattr(memory, "_CLEAR", Path("/proc/self/no-such-file/clear_refs"))
    elif not memory._reset_peak():
        pytest.skip("this system does not reset the peak")
    fill_and_return(64 * 2**20)  # an earlier peak
    before = memory.resident_bytes()
    with memory.peak_resident() as peak:
        fill_and_return(32 * 2**20)
    assert 30 * 2**20 < peak.resident_bytes - before < 48 * 2**20
    assert memory.resident_bytes() - before < 16 * 2**20


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "none")
    assert memory.resident_bytes() is None
    with memory.peak_resident() as peak:
        pass
    assert peak.resident_bytes is None
