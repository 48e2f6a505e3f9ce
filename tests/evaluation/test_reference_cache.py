"""What a reference said, kept on disk: how exact it is, and that nothing wrong is ever read from it."""

import copy
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from random_models import TINY_LLAMA
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from srd_modifier.errors import SRDError
from srd_modifier.evaluation import cache
from srd_modifier.evaluation.cache import FLOOR, HALF_STEP, StoredReference, TooLargeError, store
from srd_modifier.evaluation.scores import NamedModel, TokenScores, divergence, score_tokens
from srd_modifier.evaluation.windows import Window, window_rule

VOCABULARY = 64
REPOSITORY = Path(__file__).parents[2]

# rows


@st.composite
def rows_of_logits(draw: st.DrawFn) -> Tensor:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 40)))
    logits = draw(arrays(np.float64, shape, elements=st.floats(-60, 60, allow_subnormal=False)))
    return torch.from_numpy(logits)


@given(rows_of_logits())
def test_rows_come_back_within_half_a_step_where_not_below_the_floor(logits):
    expected = logits.log_softmax(-1)
    rows = store(expected, torch.zeros(len(logits), dtype=torch.int64))
    assert rows.vocabulary == logits.shape[-1]
    found = rows.log_probabilities(0, len(logits))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(logits), dtype=torch.float64), rtol=0, atol=1e-12)
    # a row as a whole is moved until it sums to one, by no more than its values were rounded
    coded = rows.codes.int().double() * rows.step + rows.floor
    highest = expected.amax(-1, keepdim=True)
    kept = expected >= highest - FLOOR
    assert float((coded - expected)[kept].abs().max()) <= HALF_STEP * (1 + 1e-9)
    assert float((found - expected)[kept].abs().max()) <= 2 * HALF_STEP
    assert bool((coded <= (highest - FLOOR) + 1e-9)[~kept].all())


@given(rows_of_logits(), st.integers(0, 2**31))
def test_the_likeliest_token_and_the_texts_own_are_exact(logits, seed):
    expected = logits.log_softmax(-1)
    targets = torch.randint(0, logits.shape[-1], (len(logits),), generator=torch.Generator().manual_seed(seed))
    rows = store(expected, targets)
    assert torch.equal(rows.top, expected.argmax(-1))
    assert torch.equal(rows.nll, -expected[torch.arange(len(logits)), targets])


def test_rows_that_are_all_the_same_have_no_step():
    rows = store(torch.zeros(2, 5, dtype=torch.float64).log_softmax(-1), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(rows.log_probabilities(0, 2).exp(), torch.full((2, 5), 0.2, dtype=torch.float64))


# a small reference in several shards


@dataclass
class Kept:
    """A reference of two layers over a directory, and how often its model was asked for."""

    directory: Path
    model: NamedModel
    tokens: Tensor
    windows: list[Window]
    loads: int = 0
    progress: list[tuple[int, int]] | None = None

    def open(self, tokens: Tensor | None = None, **options: Any) -> StoredReference:
        """As a new run opens it."""

        def load() -> NamedModel:
            self.loads += 1
            return self.model

        key = options.pop("key", {"digest": "1"})
        stream = self.tokens if tokens is None else tokens
        return StoredReference("original", self.directory, key, stream, self.windows, load, **options)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        (folder,) = self.directory.iterdir()
        return folder

    def shard(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"


RULE = window_rule(ctx=16, stride=8)


@pytest.fixture
def kept(make_model, tokens, tmp_path, monkeypatch) -> Kept:
    """Six windows in four shards: the first, which scores twice as many tokens, is alone; the last is what is left."""
    monkeypatch.setattr(cache, "_SHARD_BYTES", 2 * 2 * VOCABULARY * 8)
    tokens = tokens[:53]
    return Kept(tmp_path / "cache", NamedModel("original", make_model(seed=1)), tokens, RULE.windows(len(tokens)))


@pytest.fixture
def candidate(make_model: Callable[..., LlamaForCausalLM]) -> NamedModel:
    return NamedModel("candidate", make_model(seed=0))


def score(candidate: NamedModel, kept: Kept, reference: Any, **options: Any) -> TokenScores:
    return score_tokens(candidate, kept.tokens, kept.windows, reference=reference, **options)


def assert_agrees(found: TokenScores, fresh: TokenScores) -> None:
    """With what is measured beside the model itself."""
    assert torch.equal(found.nll, fresh.nll)
    assert torch.equal(found.same_top, fresh.same_top)
    ours, theirs = divergence(found), divergence(fresh)
    assert ours is not None
    assert theirs is not None
    assert ours.kld_mean == pytest.approx(theirs.kld_mean, rel=1e-3, abs=1e-6)
    assert ours.top1_agreement == theirs.top1_agreement


@pytest.mark.parametrize("first_token", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_a_kept_reference_gives_what_the_model_gives(kept, candidate, batch_size, first_token):
    options = {"batch_size": batch_size, "first_token": first_token}
    fresh = score(candidate, kept, kept.model, **options)
    found = score(candidate, kept, kept.open(**options), **options)
    assert_agrees(found, fresh)
    assert_agrees(score(candidate, kept, kept.open(first_token=first_token), **options), fresh)
    alone = score_tokens(kept.model, kept.tokens, kept.windows, first_token=first_token)
    torch.testing.assert_close(kept.open(first_token=first_token).nll(), alone.nll, rtol=1e-6, atol=1e-6)
    assert len(list(kept.folder.glob("*.safetensors"))) == 4


def test_a_model_does_not_diverge_from_what_it_said_itself(kept):
    found = divergence(score(kept.model, kept, kept.open()))
    assert found is not None
    assert found.kld_mean < 1e-7
    assert found.top1_agreement == 1


def test_a_complete_cache_never_loads_the_model(kept, candidate):
    first = score(candidate, kept, kept.open())
    assert kept.loads > 0
    kept.loads = 0
    again = kept.open()
    again.prepare()
    assert torch.equal(score(candidate, kept, again).divergence, first.divergence)
    assert len(again.nll()) == len(first.nll)
    assert kept.loads == 0


def test_a_vocabulary_of_another_size_has_no_divergence(kept, make_model):
    with pytest.raises(SRDError, match="candidate has a vocabulary of 65 and the reference original one of 64"):
        score(NamedModel("candidate", make_model(vocab_size=65)), kept, kept.open())


def test_an_interrupted_run_goes_on(kept, candidate, monkeypatch):
    fresh = score(candidate, kept, kept.model)
    inner, asked = cache.scored_logits, []

    def interrupted(model: Any, inputs: Tensor, scored: int) -> Tensor:
        asked.append(inputs)
        if len(asked) == 4:  # one for the size of the vocabulary, one for each window
            raise KeyboardInterrupt
        return inner(model, inputs, scored)

    monkeypatch.setattr(cache, "scored_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.open(batch_size=1).nll()
    assert [path.name for path in sorted(kept.folder.iterdir())] == ["00000.safetensors", "index.json"]
    shards = []
    monkeypatch.setattr(cache, "scored_logits", lambda *arguments: shards.append(1) or inner(*arguments))
    found = score(candidate, kept, kept.open(batch_size=1))
    assert len(shards) == len(kept.windows) - 1
    assert_agrees(found, fresh)


def test_only_what_is_missing_is_computed(kept):
    complete = kept.open().nll()
    kept.shard(1).unlink()
    kept.loads = 0
    seen: list[tuple[int, int]] = []
    again = kept.open(progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(again.nll(), complete)
    assert kept.loads == 1
    assert seen == [(1, 6), (3, 6)]


def test_progress_goes_from_nothing_to_all_windows(kept):
    seen: list[tuple[int, int]] = []
    kept.open(batch_size=1, progress=lambda done, total: seen.append((done, total))).nll()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (seen[0], seen[-1]) == ((0, len(kept.windows)), (len(kept.windows),) * 2)


# damage


def flip_a_code(path: Path) -> None:
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    first, _ = json.loads(content[8 : 8 + header])["codes"]["data_offsets"]
    content[8 + header + first + 5] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    """The same file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def other_sign(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"U16"', b'"I16"'))


SHARD_FAULTS: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the codes": flip_a_code,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "not a shard": lambda path: path.write_text("this is no shard\n" * 100),
    "another key": lambda path: rewrite(path, lambda _, metadata: metadata.update(key="0" * 64)),
    "another shard of the text": lambda path: shutil.copy(path.with_name("00000.safetensors"), path),
    "a tensor is missing": lambda path: rewrite(path, lambda tensors, _: tensors.pop("nll")),
    "a tensor of another type": other_sign,
    "no metadata": lambda path: rewrite(path, lambda _, metadata: metadata.clear()),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS.values(), ids=list(SHARD_FAULTS))
def test_a_damaged_shard_is_named_and_computed_again(kept, candidate, fault):
    before = score(candidate, kept, kept.open())
    fault(kept.shard(1))
    kept.loads = 0
    with pytest.warns(UserWarning, match=r"00001\.safetensors is damaged \(.*\); the reference original is computed"):
        found = score(candidate, kept, kept.open())
    assert kept.loads == 1
    assert torch.equal(found.divergence, before.divergence)
    score(candidate, kept, kept.open())  # and is whole again
    assert kept.loads == 1


def test_a_shard_of_another_text_is_not_taken_for_its_own(kept, candidate, recwarn):
    before = score(candidate, kept, kept.open())
    other = kept.open(kept.tokens.flip(0))
    other.nll()
    mine, theirs = (kept.directory / reference._directory.name for reference in (kept.open(), other))
    shutil.copy(theirs / "00001.safetensors", mine)
    recwarn.clear()
    assert torch.equal(score(candidate, kept, kept.open()).divergence, before.divergence)
    assert "00001.safetensors is damaged (its bytes are not those that were written)" in str(recwarn[0].message)


def edited(**values: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


INDEX_FAULTS: dict[str, Callable[[Path], Any]] = {
    "not JSON": lambda path: path.write_text("{"),
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "no vocabulary": lambda path: path.write_text("{}"),
    "a vocabulary of words": edited(vocabulary="many"),
    # with which shards would have other windows
    "half the vocabulary": edited(vocabulary=VOCABULARY // 2),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS.values(), ids=list(INDEX_FAULTS))
def test_a_damaged_index_is_named_and_written_again(kept, candidate, fault):
    before = score(candidate, kept, kept.open())
    index = kept.folder / "index.json"
    fault(index)
    if index.is_dir():
        with pytest.raises(SRDError, match=r"cannot write .*index\.json"), pytest.warns(UserWarning, match="damaged"):
            kept.open().prepare()
        return
    with pytest.warns(UserWarning, match=r"index\.json is damaged and is written again"):
        found = score(candidate, kept, kept.open())
    assert torch.equal(found.divergence, before.divergence)
    kept.loads = 0
    score(candidate, kept, kept.open())
    assert kept.loads == 0


# keys


BASE = {"digest": "1", "dtype": "torch.float32", "rule": {"ctx": 16, "stride": 8}, "first_token": None}


@pytest.mark.parametrize(
    "changed",
    [{"digest": "2"}, {"dtype": "torch.bfloat16"}, {"rule": {"ctx": 16, "stride": 16}}, {"first_token": 1}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_else_decides_the_figures_is_another_key(kept, changed):
    kept.open(key=BASE).nll()
    kept.open(key=dict(reversed(BASE.items()))).nll()
    assert len(list(kept.directory.iterdir())) == 1
    kept.open(key={**BASE, **changed}).nll()
    assert len(list(kept.directory.iterdir())) == 2


def test_another_token_is_another_key(kept):
    kept.open().prepare()
    tokens = kept.tokens.clone()
    tokens[-1] += 1
    kept.open(tokens).prepare()
    assert len(list(kept.directory.iterdir())) == 2


# room


def test_what_is_larger_than_allowed_is_refused_before_it_is_computed(kept):
    reference = kept.open(limit=1000)
    with pytest.raises(TooLargeError, match=r"log-probabilities of original take 0\.0 GB on disk, more than 0\.0 GB"):
        reference.prepare()
    assert kept.loads == 1
    assert not kept.directory.exists()
    needed = reference.bytes_needed(VOCABULARY)
    complete = kept.open(limit=needed)
    complete.nll()
    on_disk = sum(path.stat().st_size for path in kept.folder.glob("*.safetensors"))
    assert on_disk == pytest.approx(needed, rel=0.3)  # of which headers are a part in files as small as these


def test_half_of_what_is_free_is_left_alone(kept, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10_000))
    with pytest.raises(TooLargeError, match=r"0\.0 GB are free; choose another --cache-dir, fewer --max-tokens, or"):
        kept.open().prepare()


def test_a_disk_that_refuses_is_a_sentence(kept, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(SRDError, match=r"00000\.safetensors: cannot be written: .*No space left on device; choose"):
        kept.open().nll()
    assert [path.name for path in kept.folder.iterdir()] == ["index.json"]


# a model that was trained


@pytest.fixture(scope="module")
def tiny() -> tuple[LlamaForCausalLM, Tensor]:
    text = (REPOSITORY / "examples" / "text" / "demo.txt").read_text(encoding="utf-8")[:4000]
    ids = AutoTokenizer.from_pretrained(TINY_LLAMA)(text, return_tensors="pt").input_ids[0, :384]
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval(), ids


@torch.no_grad()
def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Its layers' matrices to the nearest of 16 levels, 64 weights to a scale."""
    model = copy.deepcopy(model)
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            grouped = parameter.view(-1, 64)
            scale = grouped.abs().amax(-1, keepdim=True) / 7.5
            parameter.copy_(((grouped / scale).round().clamp(-8, 7) * scale).view_as(parameter))
    return model


@torch.no_grad()
def disturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """About what is left by an 8-bit residual."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 1e-3)
    return model


@pytest.mark.parametrize(("change", "least", "per_token"), [(rounded, 1e-3, 1e-4), (disturbed, 1e-7, 1e-6)])
def test_sixteen_bits_are_enough_for_a_trained_model(tiny, tmp_path, change, least, per_token):
    model, ids = tiny
    windows = window_rule(ctx=128, stride=128).windows(len(ids))
    reference, changed = NamedModel("tiny-llama", model), NamedModel("changed", change(model))
    stored = StoredReference("tiny-llama", tmp_path, {}, ids, windows, lambda: reference)
    fresh = score_tokens(changed, ids, windows, reference=reference)
    found = score_tokens(changed, ids, windows, reference=stored)
    figures = divergence(fresh)
    assert figures is not None
    assert figures.kld_mean > least
    assert_agrees(found, fresh)
    assert float((found.divergence - fresh.divergence).abs().max()) < per_token
