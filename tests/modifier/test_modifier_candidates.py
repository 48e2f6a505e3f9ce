from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from srd_modifier.checkpoint.sensitivity import ModuleSensitivity
from srd_modifier.errors import CheckpointError
from srd_modifier.modifier.calibrated import encode_all, predict
from srd_modifier.modifier.candidates import DEFAULT_CANDIDATES, CandidateStore, StoredCandidate
from srd_modifier.residual import EncodedResidual, ResidualFormat, decode
from srd_modifier.residual.hessian import Hessian

SHAPES = {"model.layers.0.mlp.up_proj": (24, 128), "model.layers.0.mlp.down_proj": (16, 96), "odd": (3, 77)}


def make(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, Hessian]:
    """A residual, and the Hessian of inputs of as many columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    return torch.randn(shape, generator=generator) * 1e-2, Hessian.prepare(rows.T @ rows / len(rows))


def stored(formats: tuple[ResidualFormat, ...], w4: float = 1.0) -> list[StoredCandidate]:
    return [StoredCandidate(fmt, ModuleSensitivity(w4=w4, corrected=0.0, mixed=0.0)) for fmt in formats]


def test_every_default_candidate_comes_back_as_it_was_stored(tmp_path):
    store = CandidateStore(tmp_path)
    expected: dict[str, list[EncodedResidual]] = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        residual, hessian = make(shape, seed)
        expected[name] = encode_all(residual, DEFAULT_CANDIDATES, hessian, name, None)
        store.write(name, shape, stored(DEFAULT_CANDIDATES), expected[name])
    for name, shape in SHAPES.items():
        for number, (fmt, one) in enumerate(zip(DEFAULT_CANDIDATES, expected[name], strict=True)):
            found = store.read(name, number)
            assert found.tensors().keys() == one.tensors().keys()
            for suffix, tensor in one.tensors().items():
                assert found.tensors()[suffix].dtype == tensor.dtype
                assert torch.equal(found.tensors()[suffix], tensor)
            decoded = decode(found, fmt, in_features=shape[1], key=name)
            assert torch.equal(decoded, decode(one, fmt, in_features=shape[1], key=name))
            entry = store.entry(name, number)
            assert entry.bytes() == sum(tensor.nbytes for tensor in one.tensors().values())


def test_candidates_differ_in_what_they_cost_and_in_what_they_leave():
    residual, hessian = make((24, 128))
    encoded = encode_all(residual, DEFAULT_CANDIDATES, hessian, "a", None)
    damages = [one.damage(1.0) for one in predict("a", residual, DEFAULT_CANDIDATES, encoded, hessian, torch.ones(24))]
    sizes = [0, *(fmt.bytes(24, 128) for fmt in DEFAULT_CANDIDATES)]
    assert len(set(sizes)) == len(sizes) == len(set(DEFAULT_CANDIDATES)) + 1
    dense = range(len(DEFAULT_CANDIDATES))  # without the sparse one, the last
    assert [sizes[i] for i in dense] == sorted(sizes[i] for i in dense)
    assert [damages[i] for i in dense] == sorted((damages[i] for i in dense), reverse=True)
    assert damages[-1] < damages[0]


def test_formats_of_other_roundings_stand_between_those_with_feedback():
    residual, hessian = make((24, 128))
    nearest, feedback = ResidualFormat(bits=4, rounding="nearest"), ResidualFormat(bits=4, rounding="feedback")
    mixed = encode_all(residual, (nearest, feedback, replace(nearest, bits=2)), hessian, "a", None)
    (alone,) = encode_all(residual, (feedback,), hessian, "a", None)
    assert torch.equal(mixed[1].codes, alone.codes)
    assert not torch.equal(mixed[0].codes, alone.codes)
    assert mixed[2].codes.shape == (24, 32)


def test_the_predicted_damage_is_the_quadratic_form_of_its_errors():
    residual, hessian = make((24, 128))
    output = torch.rand(24, generator=torch.Generator().manual_seed(1))
    formats = DEFAULT_CANDIDATES
    encoded = encode_all(residual, formats, hessian, "a", None)
    found = predict("a", residual, formats, encoded, hessian, output)
    moment = hessian.regularized.double() - torch.diag(hessian.added.double())

    def damage(error: torch.Tensor) -> float:
        return float((error @ moment * error).sum(1) @ output.double()) / 2

    assert found[0] == ModuleSensitivity(w4=found[0].w4, output=float(output.mean()))
    assert found[0].w4 == pytest.approx(damage(residual.double()), rel=1e-4)
    for fmt, one, sensitivity in zip(formats, encoded, found[1:], strict=True):
        decoded = decode(one, fmt, in_features=128, key="a").double()
        for alpha in (0.0, 0.3, 0.5, 1.0):
            # what the weight is off by: W4 + alpha * decoded, of an original that is W4 + residual
            expected = damage(alpha * decoded - residual.double())
            assert sensitivity.damage(alpha) == pytest.approx(expected, rel=1e-3, abs=1e-6 * found[0].w4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("IO: No space left on dev")])
def test_a_full_disk_is_a_sentence(error, monkeypatch, tmp_path):
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("srd_modifier.modifier.candidates.save_file", full)
    with pytest.raises(CheckpointError, match=r"^cannot write the residual of odd to .*: .*No space left on dev"):
        CandidateStore(tmp_path).write("odd", (3, 77), [], [])


def test_a_folder_that_is_gone_is_a_sentence(tmp_path):
    residual, hessian = make((3, 77))
    encoded = encode_all(residual, DEFAULT_CANDIDATES, hessian, "odd", None)
    store = CandidateStore(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"cannot write the residual of odd to .*gone"):
        store.write("odd", (3, 77), stored(DEFAULT_CANDIDATES), encoded)


def test_names_that_are_no_file_names(tmp_path):
    store = CandidateStore(tmp_path / "candidates")
    (tmp_path / "candidates").mkdir()
    fmt = ResidualFormat(bits=4, rounding="feedback")
    residual, hessian = make((3, 77))
    for name in ("../a/b", "x" * 300):
        store.write(name, (3, 77), stored((fmt,)), encode_all(residual, (fmt,), hessian, name, None))
        assert store.read(name, 0).scale.shape == (3, 2)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["candidates"]


def test_what_another_process_stored_is_taken_if_it_is_the_same(tmp_path):
    residual, hessian = make((24, 128))
    encoded = encode_all(residual, DEFAULT_CANDIDATES, hessian, "a", None)
    store = CandidateStore(tmp_path)
    store.write("a", (24, 128), stored(DEFAULT_CANDIDATES), encoded)
    digest = store.digest("a")
    again = CandidateStore(tmp_path)
    assert again.restore("a", (24, 128), stored(DEFAULT_CANDIDATES), digest)
    assert again.entry("a", 3) == store.entry("a", 3)
    assert torch.equal(again.read("a", 3).codes, store.read("a", 3).codes)
    other = CandidateStore(tmp_path)
    assert not other.restore("a", (24, 128), stored(DEFAULT_CANDIDATES), "0" * 64)
    assert not other.restore("b", (24, 128), stored(DEFAULT_CANDIDATES), digest)
    assert other.candidates == {}
