"""Scores by llama.cpp's server, against Transformers in float32, and what is made of unexpected answers."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Request, Scorer
from srd_modifier.evaluation.servers import connect
from srd_modifier.gguf.export import export_gguf
from srd_modifier.gguf.llamacpp import LlamaCpp
from srd_modifier.gguf.mixture import FileType

SHARED = Path(__file__).parents[4] / "shared" / "models"
CONTEXT = 256
EOS = 0
TOLERANCE = 1e-4
TEXTS = [
    "The river runs north through the old town and turns east below the bridge.",
    "The river runs north over 1234 stones, says <|endoftext|> the council.",
    "  Timber\n\n\tfor every family",
    # characters of which a token is a part: llama.cpp says nothing of a token that only begins one
    "A smile 😀, an über, two 漢字.",
]


class Reference:
    """The same model in Transformers, in float32."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def distributions(self, tokens: tuple[int, ...]) -> Tensor:
        """Log-probabilities of what follows each token, float64 [tokens, vocabulary]."""
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    path = tmp_path_factory.mktemp("served") / "tiny-llama.gguf"
    export_gguf(tiny_llama, path, file_type=FileType.F32)
    with LlamaCpp(path, context=CONTEXT, exact=True) as running:
        yield running


@pytest.fixture(scope="module")
def scorer(llama: LlamaCpp) -> Scorer:
    return connect(llama.address)


@pytest.fixture(scope="module")
def requests(reference: Reference) -> list[Request]:
    tokens = [tuple(reference.tokenizer(text)["input_ids"]) for text in TEXTS]
    return [Request(ids, len(ids) - 1) for ids in tokens]


def test_texts_become_the_tokens_of_transformers(scorer: Scorer, reference: Reference) -> None:
    for text in ["", *TEXTS]:
        assert scorer.encode(text) == reference.tokenizer(text)["input_ids"]
        assert (
            scorer.encode(text, add_special=False) == reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_tokens_have_the_probabilities_of_transformers(
    scorer: Scorer, reference: Reference, requests: list[Request]
) -> None:
    for request, scores in zip(requests, scorer.score(requests), strict=True):
        expected = reference.distributions(request.tokens)[:-1]
        own = torch.tensor(request.tokens[1:])
        assert scores.log_probabilities.dtype == torch.float64
        assert scores.greedy.dtype == torch.bool
        torch.testing.assert_close(
            scores.log_probabilities, expected.gather(1, own[:, None])[:, 0], rtol=0, atol=TOLERANCE
        )
        assert scores.greedy.tolist() == (expected.argmax(1) == own).tolist()


def test_what_the_model_generates_is_greedy_and_another_token_is_not(scorer: Scorer, llama: LlamaCpp) -> None:
    prompt = tuple(llama.tokenize("The river"))
    generated = tuple(llama.complete(prompt, 8))
    (scores,) = scorer.score([Request((*prompt, *generated), 8)])
    assert scores.greedy.all()
    (scores,) = scorer.score([Request((*prompt, *generated[:-1], 5), 8)])
    assert scores.greedy.tolist() == [True] * 7 + [False]


def test_the_end_of_a_text_is_scored_too(scorer: Scorer, reference: Reference, requests: list[Request]) -> None:
    tokens = (*requests[0].tokens, EOS, *requests[1].tokens[:3])
    (scores,) = scorer.score([Request(tokens, 4)])
    expected = reference.distributions(tokens)[-5:-1].gather(1, torch.tensor(tokens[-4:])[:, None])[:, 0]
    torch.testing.assert_close(scores.log_probabilities, expected, rtol=0, atol=TOLERANCE)


def test_what_was_asked_before_does_not_matter(scorer: Scorer, requests: list[Request]) -> None:
    """The server goes on from what it has read: of another sequence, of a longer one, or of this one."""
    first = requests[0]
    alone = scorer.score([first])[0].log_probabilities
    shorter = Request(first.tokens[:9], 3)
    found = scorer.score([requests[1], first, requests[2], shorter, first])
    for again in (found[1], found[4]):
        torch.testing.assert_close(again.log_probabilities, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[3].log_probabilities, alone[5:8], rtol=0, atol=1e-5)


def test_progress_is_reported_for_each_request(scorer: Scorer, requests: list[Request]) -> None:
    seen: list[tuple[int, int]] = []
    short = [Request(request.tokens[:3], 1) for request in requests]
    scorer.score(short, progress=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert scorer.score([]) == []


def test_bos_is_found_though_the_tokenizer_does_not_add_it(scorer: Scorer, reference: Reference) -> None:
    assert scorer.prefix_token == reference.tokenizer.bos_token_id == EOS


def test_bos_of_a_sentencepiece_model_is_found() -> None:
    path = SHARED / "stories260K" / "stories260Ktok512.gguf"
    if not path.is_file():
        pytest.skip(f"needs the trained model {path}")
    with LlamaCpp(path) as llama:
        assert connect(llama.address).prefix_token == 1


def test_prompts_are_continued_as_by_llama_cpp(scorer: Scorer, llama: LlamaCpp, reference: Reference) -> None:
    for text in TEXTS[:3]:
        prompt = llama.tokenize(text)
        expected = reference.tokenizer.decode(llama.complete(prompt, 20), skip_special_tokens=True)
        assert scorer.generate(prompt, max_tokens=20, stop=[]) == expected


def test_a_continuation_ends_before_a_stop_text(scorer: Scorer, llama: LlamaCpp) -> None:
    prompt = llama.tokenize(TEXTS[0])
    whole = scorer.generate(prompt, max_tokens=20, stop=[])
    assert len(whole) > 12
    assert scorer.generate(prompt, max_tokens=20, stop=["never", whole[8:12]]) == whole[: whole.index(whole[8:12])]


def test_a_temperature_draws_from_all_tokens(scorer: Scorer, llama: LlamaCpp) -> None:
    prompt = llama.tokenize(TEXTS[0])
    drawn = {scorer.generate(prompt, max_tokens=12, stop=[], temperature=1.0) for _ in range(4)}
    assert len(drawn) == 4


def test_a_request_as_long_as_the_context_is_scored(scorer: Scorer, reference: Reference) -> None:
    assert scorer.max_length == CONTEXT - 1
    tokens = tuple(torch.randint(1, 4096, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist())
    (scores,) = scorer.score([Request(tokens, 2)])
    expected = reference.distributions(tokens)[-3:-1].gather(1, torch.tensor(tokens[-2:])[:, None])[:, 0]
    torch.testing.assert_close(scores.log_probabilities, expected, rtol=0, atol=TOLERANCE)


def test_a_request_that_is_longer_is_a_sentence(scorer: Scorer) -> None:
    with pytest.raises(SRDError, match=r"a sequence of 257 tokens does not fit the server's context, .* room for 256"):
        scorer.score([Request((5, 6), 1), Request((5,) * (CONTEXT + 1), 1)])


@pytest.mark.parametrize("scored", [0, 2, 3])
def test_something_must_stand_before_what_is_scored(scorer: Scorer, scored: int) -> None:
    with pytest.raises(SRDError, match=f"{scored} of 2 tokens cannot be scored"):
        scorer.score([Request((5, 6), scored)])


def test_a_continuation_that_has_no_room_is_a_sentence(scorer: Scorer) -> None:
    assert scorer.generate([5] * (CONTEXT - 4), max_tokens=4, stop=[])
    with pytest.raises(
        SRDError, match="a prompt of 252 tokens and 5 to generate do not fit the server's context of 256"
    ):
        scorer.generate([5] * (CONTEXT - 4), max_tokens=5, stop=[])


@pytest.mark.parametrize(("prompt", "count"), [([], 3), ([5], 0), ([5], -1)])
def test_a_continuation_of_nothing_is_a_sentence(scorer: Scorer, prompt: list[int], count: int) -> None:
    with pytest.raises(SRDError, match="cannot be generated, at least one of each is needed"):
        scorer.generate(prompt, max_tokens=count, stop=[])


def test_a_slot_that_is_smaller_than_it_says_is_the_server_s_sentence(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_context", None)
    with pytest.raises(SRDError, match=r"/completion with HTTP 400: request \(300 tokens\) exceeds the available cont"):
        scorer.score([Request((5,) * 301, 1)])


@pytest.mark.parametrize("token", [4096, 10**6])
def test_a_token_outside_the_vocabulary_is_a_sentence(scorer: Scorer, token: int) -> None:
    with pytest.raises(SRDError, match=f"no log-probability for token {token}"):
        scorer.score([Request((5, token), 1)])
    with pytest.raises(SRDError, match="HTTP 400: Prompt contains invalid tokens"):
        scorer.score([Request((token, 5), 1)])


def test_a_server_that_has_ended_is_a_sentence(llama: LlamaCpp) -> None:
    with LlamaCpp(llama.path) as other:
        scorer = connect(other.address)
    with pytest.raises(SRDError, match="no HTTP server answers /tokenize there"):
        scorer.encode("a")


def entry(token: int, log_probability: Any) -> dict[str, Any]:
    return {"id": token, "logprob": log_probability}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"completion_probabilities": []},
        {"completion_probabilities": [entry(6, -1.0)]},
        {"completion_probabilities": [{**entry(6, None), "top_logprobs": [entry(6, None)]}]},
        {"completion_probabilities": [{**entry(6, math.nan), "top_logprobs": [entry(6, math.nan)]}]},
        {"completion_probabilities": [{**entry(7, -1.0), "top_logprobs": [entry(7, -1.0)]}]},
        {"completion_probabilities": [{"content": "b", "probs": [{"tok_str": "b", "prob": 0.5}]}]},
    ],
    ids=["none", "empty", "no likeliest", "null", "NaN", "only another token", "before 2025"],
)
def test_missing_log_probabilities_are_a_sentence(fake_llamacpp: Any, answer: dict[str, Any]) -> None:
    fake_llamacpp.answers["/completion"] = lambda body: answer
    with pytest.raises(SRDError, match=f"^{fake_llamacpp.address}: the server gives no log-probability for token 6; "):
        connect(fake_llamacpp.address).score([Request((5, 6), 1)])


def test_a_token_that_the_server_never_generates_is_found_among_all(fake_llamacpp: Any) -> None:
    """As one that a server started with --ignore-eos has barred."""

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        ranking = [entry(8, -0.5), entry(6, -1.25), entry(7, -2.0)]
        generated = next(each for each in ranking if each["id"] != 6)
        return {"completion_probabilities": [{**generated, "top_logprobs": ranking[: body["n_probs"]]}]}

    fake_llamacpp.answers["/completion"] = complete
    (scores,) = connect(fake_llamacpp.address).score([Request((5, 6), 1)])
    assert scores.log_probabilities.tolist() == [-1.25]
    assert scores.greedy.tolist() == [False]


def test_a_probability_that_float32_cannot_hold_has_a_bound(fake_llamacpp: Any) -> None:
    found = {**entry(6, -3.4028234663852886e38), "top_logprobs": [entry(8, 0.0)]}
    fake_llamacpp.answers["/completion"] = lambda body: {"completion_probabilities": [found]}
    (scores,) = connect(fake_llamacpp.address).score([Request((5, 6), 1)])
    assert scores.log_probabilities.tolist() == [pytest.approx(-103.279, abs=1e-3)]


def test_a_completion_without_text_is_a_sentence(fake_llamacpp: Any) -> None:
    fake_llamacpp.answers["/completion"] = {}
    with pytest.raises(SRDError, match="the answer to /completion has no text"):
        connect(fake_llamacpp.address).generate([5], max_tokens=1, stop=[])


def test_bos_that_the_tokenizer_adds_comes_first(fake_llamacpp: Any, letters: Callable[..., Any]) -> None:
    fake_llamacpp.answers["/tokenize"] = letters(bos=True)
    fake_llamacpp.answers["/props"]["bos_token"] = "z"
    assert connect(fake_llamacpp.address).prefix_token == 0


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [("<s>", "</s>", 90), (",", "</s>", 91), (",", ",", None), ("", "", None), (None, None, None), ("ab", "", None)],
)
def test_an_ordinary_token_is_not_taken_for_bos(
    fake_llamacpp: Any, bos: str | None, eos: str | None, expected: int | None
) -> None:
    def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        special = {"<s>": [90], "</s>": [91]} if body["parse_special"] else {}
        return {"tokens": special.get(body["content"], [ord(letter) for letter in body["content"]])}

    fake_llamacpp.answers["/tokenize"] = tokenize
    fake_llamacpp.answers["/props"] |= {"bos_token": bos, "eos_token": eos}
    assert connect(fake_llamacpp.address).prefix_token == expected


def test_a_context_that_is_not_told_is_not_known(fake_llamacpp: Any) -> None:
    fake_llamacpp.answers["/props"] = {"default_generation_settings": {}}
    assert connect(fake_llamacpp.address).max_length is None
