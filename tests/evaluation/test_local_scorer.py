"""Scores over kept keys and values against plain passes over whole sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_models import TINY_LLAMA
from small_models import write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation import local
from srd_modifier.evaluation.load import LoadedModel
from srd_modifier.evaluation.local import LocalScorer
from srd_modifier.evaluation.scorer import Request, SequenceScores

BATCH_SIZES = [1, 2, 7, None]


class Wrapped(nn.Module):
    """A model around another, of which a scorer sees what `forward` accepts."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """The least that a model accepts."""
        self.shapes.append(tuple(input_ids.shape))
        return CausalLMOutput(logits=self.inner(input_ids=input_ids, use_cache=False).logits)


class Forgetful(Wrapped):
    """Keeps keys and values, and later computes as if there were none."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True
    ) -> CausalLMOutput:
        logits = super().forward(input_ids).logits
        self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=True)
        return CausalLMOutput(logits=logits)


class Careless(Wrapped):
    """Never keeps anything in what it is given to keep it in."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True
    ) -> CausalLMOutput:
        return super().forward(input_ids)


@pytest.fixture(scope="module")
def llama(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Five of its seven layers see a window of 16 tokens."""
    directory = write_model("gemma3", tmp_path_factory.mktemp("gemma3"), vocab_size=64, eos_token_id=1)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def make(request: pytest.FixtureRequest, llama: LlamaForCausalLM) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        if name in ("llama", "gemma"):
            return request.getfixturevalue(name)
        return {"no cache": Wrapped, "forgetful": Forgetful, "careless": Careless}[name](llama)

    return make


def scorer_of(model: Any, *, tokenizer: Any = None, **options: Any) -> LocalScorer:
    return LocalScorer(LoadedModel("the model", model, Path("model"), tokenizer), **options)


def plain(model: Any, requests: Sequence[Request]) -> list[SequenceScores]:
    """One whole sequence at a time."""
    found = []
    for request in requests:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([request.tokens])).logits[0]
        predicting = logits[-request.scored - 1 : -1].double()
        targets = torch.tensor(request.tokens[-request.scored :])
        found.append(
            SequenceScores(
                predicting.log_softmax(-1)[torch.arange(request.scored), targets], predicting.argmax(-1) == targets
            )
        )
    return found


def assert_equal(found: Sequence[SequenceScores], expected: Sequence[SequenceScores]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.log_probabilities.dtype == torch.float64
        torch.testing.assert_close(ours.log_probabilities, theirs.log_probabilities, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.greedy, theirs.greedy)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def choices(context: tuple[int, ...], lengths: Sequence[int], seed: int = 0) -> list[Request]:
    return [Request(context + tokens(length, seed + 31 * place), length) for place, length in enumerate(lengths)]


PRIMER = tokens(24, 1)
CASES: dict[str, list[Request]] = {
    "a shared primer": [
        request
        for seed, length in enumerate([3, 5, 3, 8, 1])
        for request in choices(PRIMER + tokens(length, 10 + seed), [2, 4, 1, 6], seed)
    ],
    "shared contexts": [
        request for seed in range(4) for request in choices(tokens(6 + 5 * (seed % 2), 20 + seed), [1, 3, 9], seed)
    ],
    "single tokens": [request for seed in range(3) for request in choices(tokens(9, 30 + seed), [1, 1, 1, 1], seed)],
    "nothing shared": [Request(tokens(length, length), 1 + length % 4) for length in (5, 40, 6, 19, 33, 7, 12)],
    "one request": [Request(tokens(30, 40), 12)],
    "contexts of one token": [*choices((5,), [3, 1, 20], 50), *choices((6,), [2, 2], 51)],
    "one request twice": [*choices(tokens(12, 60), [4, 2], 60), *choices(tokens(12, 60), [4, 2], 60)],
    "one's context is another's whole": [
        Request(tokens(20, 70), 4),
        Request(tokens(20, 70), 15),
        Request(tokens(20, 70)[:16], 3),
        Request(tokens(20, 70) + (7, 8), 2),
    ],
    "a primer and nothing else before what is scored": [
        Request(PRIMER + ending, len(ending)) for ending in ((1,), (2, 3), (1, 5, 6))
    ],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "gemma", "no cache"])
def test_scores_are_those_of_whole_sequences(make, name, case):
    model, requests = make(name), CASES[case]
    expected = plain(model, requests)
    for batch_size in BATCH_SIZES:
        assert_equal(scorer_of(model, batch_size=batch_size).score(requests), expected)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each pass reads."""
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, arguments, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield read
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_what_is_shared_is_computed_once(make, name):
    """The primer, then each context, then all but the last token of each choice."""
    model = make(name)
    requests = [request for seed in range(12) for request in choices(PRIMER + tokens(6, 80 + seed), [5] * 4, 80 + seed)]
    scorer = scorer_of(model)
    scorer.score(requests)  # with the check
    with counted(model) as read:
        scorer.score(requests)
    assert sum(read) == len(PRIMER) + 12 * 6 + 48 * 4
    assert sum(len(request.tokens) - 1 for request in requests) > 5 * sum(read)


def test_the_tokenizers_padding_side_makes_no_difference(llama):
    requests = [request for case in CASES.values() for request in case]
    left, right = (
        scorer_of(llama, tokenizer=SimpleNamespace(padding_side=side)).score(requests) for side in ("left", "right")
    )
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours.log_probabilities, theirs.log_probabilities)
    assert_equal(left, plain(llama, requests))


@pytest.mark.parametrize("name", ["forgetful", "careless"])
@pytest.mark.parametrize("case", ["a shared primer", "shared contexts", "single tokens"])
def test_a_model_whose_kept_keys_are_of_no_use_is_scored_on_whole_sequences(make, name, case):
    model, requests = make(name), CASES[case]
    scorer = scorer_of(model)
    expected = plain(model.inner, requests)
    assert_equal(scorer.score(requests), expected)
    model.shapes.clear()
    assert_equal(scorer.score(requests), expected)
    if case != "single tokens":  # for which nothing has to be kept
        assert sum(rows for rows, _ in model.shapes) == len(requests)


def test_in_half_precision_the_check_has_its_tolerance(make_model):
    model = make_model().to(torch.bfloat16)
    requests = CASES["a shared primer"]
    scorer, expected = scorer_of(model), plain(model, requests)
    scorer.score(requests)
    with counted(model) as read:
        found = scorer.score(requests)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.log_probabilities, theirs.log_probabilities, rtol=0, atol=0.25)
    assert sum(read) < sum(len(request.tokens) - 1 for request in requests) / 2


def test_batches_are_limited_by_tokens_too(llama, monkeypatch):
    monkeypatch.setattr(local, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(local, "_KEPT_TOKENS", 70)
    for case in CASES.values():
        assert_equal(scorer_of(llama).score(case), plain(llama, case))


def test_progress_ends_with_all_requests(llama):
    requests = CASES["a shared primer"]
    seen: list[tuple[int, int]] = []
    scorer_of(llama).score(requests, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(requests)) for done in range(1, len(requests) + 1)]


def test_no_requests_have_no_scores(llama):
    assert scorer_of(llama).score([]) == []


# what cannot be scored


def test_a_batch_needs_one_sequence(llama):
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        scorer_of(llama, batch_size=0)


@pytest.mark.parametrize("scored", [0, 3, 4])
def test_something_must_stand_before_what_is_scored(llama, scored):
    with pytest.raises(SRDError, match=rf"^the model: {scored} of 3 tokens cannot be scored, at least one token must"):
        scorer_of(llama).score([Request((1, 2, 3), scored)])


def test_a_sequence_may_have_one_token_more_than_positions(llama):
    longest = Request(tokens(65, 0), 10)
    assert_equal(scorer_of(llama).score([longest]), plain(llama, [longest]))
    with pytest.raises(SRDError, match=r"^the model: a sequence of 65 tokens exceeds its 64 positions$"):
        scorer_of(llama).score([longest, Request(tokens(66, 0), 10)])


@pytest.mark.parametrize("case", ["one request", "shared contexts"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_a_sentence(make_model, case, value):
    model = make_model()
    model.lm_head.weight.data[3, 5] = value
    with pytest.raises(
        SRDError, match=r"^the model: the model gives NaN or infinite logits in float32, so its weights"
    ):
        scorer_of(model).score(CASES[case])


# text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture
def writer(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_model(vocab_size=4096, seed=3, eos_token_id=None, bos_token_id=None)


def follow(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token, again and again."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_what_is_generated_is_what_is_likeliest(writer, tokenizer):
    prompt = tokenizer("The river runs north")["input_ids"]
    scorer = scorer_of(writer, tokenizer=tokenizer)
    expected = follow(writer, prompt, 12)
    assert scorer.generate(prompt, max_tokens=12, stop=[]) == tokenizer.decode(expected)
    assert scorer.generate(prompt, max_tokens=5, stop=[""]) == tokenizer.decode(expected[:5])
    # so cold that nothing else has a chance
    assert scorer.generate(prompt, max_tokens=12, stop=[], temperature=1e-6) == tokenizer.decode(expected)


def test_a_text_ends_before_the_first_of_the_texts_that_end_it(writer, tokenizer):
    prompt = tokenizer("The river runs north")["input_ids"]
    whole = tokenizer.decode(follow(writer, prompt, 12))
    early, late = whole[3:6], whole[8:11]
    scorer = scorer_of(writer, tokenizer=tokenizer)
    expected = whole[: min(whole.index(early), whole.index(late))]
    assert scorer.generate(prompt, max_tokens=12, stop=[late, early, "never said"]) == expected


@pytest.mark.parametrize("named_by", ["tokenizer", "generation_config", "list"])
def test_a_text_ends_where_the_model_ends_it(writer, named_by):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    prompt = tokenizer("The river runs north")["input_ids"]
    following = follow(writer, prompt, 12)
    end = next(token for token in following[4:] if token not in following[:4])
    special = tokenizer.convert_ids_to_tokens(end)
    tokenizer.add_special_tokens({"eos_token" if named_by == "tokenizer" else "unk_token": special})
    if named_by != "tokenizer":
        writer.generation_config.eos_token_id = end if named_by == "generation_config" else [4001, end]
    expected = tokenizer.decode(following[: following.index(end)])
    found = scorer_of(writer, tokenizer=tokenizer).generate(prompt, max_tokens=12, stop=[])
    assert found == expected


def test_a_gguf_file_ends_where_its_own_metadata_says(writer, tokenizer):
    """Transformers makes up an EOS for a configuration that names none."""
    prompt = tokenizer("The river runs north")["input_ids"]
    following = follow(writer, prompt, 6)
    writer.generation_config.eos_token_id = following[1]
    own: Any = SimpleNamespace(bos_token_id=0, eos_token_id=4000, decode=tokenizer.decode)
    loaded = LoadedModel("m.gguf", writer, Path("m.gguf"), own, gguf=SimpleNamespace())  # type: ignore[arg-type]
    assert LocalScorer(loaded).generate(prompt, max_tokens=6, stop=[]) == tokenizer.decode(following)


def test_the_prefix_is_bos_or_else_eos(llama):
    for bos, eos, expected in ((5, 6, 5), (None, 6, 6), (None, None, None)):
        tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
        assert scorer_of(llama, tokenizer=tokenizer).prefix_token == expected


def test_texts_are_encoded_by_the_models_own_tokenizer(llama, tokenizer):
    scorer = scorer_of(llama, tokenizer=tokenizer)
    assert scorer.encode("The river") == tokenizer("The river")["input_ids"]
    assert (scorer.name, scorer.max_length, scorer.tokenizer) == ("the model", 64, tokenizer)
