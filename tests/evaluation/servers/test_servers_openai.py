"""Scores by vLLM's server: what is asked, and what is made of answers. vLLM itself is in `test_vllm_scorer.py`."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Request
from srd_modifier.evaluation.servers import connect, openai


def place(token: int, log_probability: Any, **other: Any) -> dict[str, Any]:
    """What is said of a token of a prompt."""
    return {str(token): {"logprob": log_probability, "rank": 1, "decoded_token": "x", **other}}


def complete(body: dict[str, Any]) -> dict[str, Any]:
    """A model for which the token t after p has log-probability -t - p / 100 and is greedy if it is even."""
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        places = [place(token, -token - before / 100, rank=1 + token % 2) for before, token in pairwise(prompt)]
        choices.append({"index": index, "text": "!", "prompt_logprobs": [None, *places]})
    random.Random(0).shuffle(choices)
    return {"choices": choices}


@pytest.fixture
def served(fake_vllm: Any) -> Any:
    """The server with such a model."""
    fake_vllm.answers["/v1/completions"] = complete
    return fake_vllm


def test_the_last_tokens_of_each_request_are_scored_in_order(served: Any) -> None:
    requests = [Request((1, 2, 3, 4), 2), Request((9, 8), 1), Request((5, 7, 7), 2)]
    found = connect(served.address).score(requests)
    expected = [[-3.02, -4.03], [-8.09], [-7.05, -7.07]]
    for scores, values in zip(found, expected, strict=True):
        assert scores.log_probabilities.tolist() == pytest.approx(values, abs=1e-12)
    assert [scores.greedy.tolist() for scores in found] == [[False, True], [True], [False, False]]


def test_log_probabilities_of_prompts_are_asked_for_and_nothing_else(served: Any) -> None:
    connect(served.address).score([Request((1, 2), 1)])
    (body,) = served.bodies("/v1/completions")
    assert body["model"] == "tiny"
    assert body["prompt"] == [[1, 2]]
    assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0, 0)


def test_many_requests_go_in_batches(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_BATCH_SEQUENCES", 3)
    monkeypatch.setattr(openai, "_BATCH_TOKENS", 10)
    lengths = [2, 2, 2, 2, 6, 3, 15, 2]
    requests = [Request(tuple(range(1, length + 1)), 1) for length in lengths]
    seen: list[tuple[int, int]] = []
    found = connect(served.address).score(requests, progress=lambda *step: seen.append(step))
    sent = [[len(prompt) for prompt in body["prompt"]] for body in served.bodies("/v1/completions")]
    assert sent == [[2, 2, 2], [2, 6], [3], [15], [2]]
    assert seen == [(3, 8), (5, 8), (6, 8), (7, 8), (8, 8)]
    last = [-length - (length - 1) / 100 for length in lengths]
    assert [float(scores.log_probabilities) for scores in found] == pytest.approx(last)


def test_no_requests_are_no_question(served: Any) -> None:
    assert connect(served.address).score([]) == []
    assert not served.bodies("/v1/completions")


def test_text_is_generated_by_the_model_s_own_probabilities(served: Any) -> None:
    assert connect(served.address).generate([1, 2], max_tokens=3, stop=["\n"], temperature=0.5) == "!"
    (body,) = served.bodies("/v1/completions")
    assert (body["max_tokens"], body["stop"], body["temperature"]) == (3, ["\n"], 0.5)
    # generation_config.json of the model must not come in
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, -1, 0, 1)


@pytest.mark.parametrize(("bos", "expected"), [(True, 0), (False, None)])
def test_bos_is_what_the_tokenizer_adds(
    fake_vllm: Any, letters: Callable[..., Any], bos: bool, expected: int | None
) -> None:
    fake_vllm.answers["/tokenize"] = letters(bos=bos)
    assert connect(fake_vllm.address).prefix_token == expected


def test_an_end_that_the_tokenizer_adds_is_not_taken_for_bos(fake_vllm: Any) -> None:
    fake_vllm.answers["/tokenize"] = lambda body: {
        "tokens": [1, 99] if body.get("add_special_tokens", True) else [1],
        "max_model_len": 16,
    }
    assert connect(fake_vllm.address).prefix_token is None


def test_one_place_is_left_for_the_token_that_vllm_generates(served: Any) -> None:
    scorer = connect(served.address)
    assert scorer.max_length == 14
    assert scorer.score([Request((5,) * 15, 1)])
    with pytest.raises(SRDError, match=r"a sequence of 16 tokens does not fit the server's context, .* room for 15"):
        scorer.score([Request((5,) * 16, 1)])


def test_a_continuation_that_has_no_room_is_a_sentence(served: Any) -> None:
    scorer = connect(served.address)
    assert scorer.generate([5] * 12, max_tokens=4, stop=[])
    with pytest.raises(SRDError, match="a prompt of 12 tokens and 5 to generate do not fit the server's context of 16"):
        scorer.generate([5] * 12, max_tokens=5, stop=[])


def test_something_must_stand_before_what_is_scored(served: Any) -> None:
    with pytest.raises(SRDError, match="2 of 2 tokens cannot be scored"):
        connect(served.address).score([Request((5, 6), 2)])


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"prompt_logprobs": None},
        {"prompt_logprobs": [None]},
        {"prompt_logprobs": [None, None]},
        {"prompt_logprobs": [None, place(7, -1.0)]},
        {"prompt_logprobs": [None, place(6, None)]},
        {"prompt_logprobs": [None, place(6, math.nan)]},
        {"prompt_logprobs": [None, place(6, -1.0, rank=None)]},
    ],
    ids=["none", "null", "too few", "null place", "another token", "null value", "NaN", "no rank"],
)
def test_missing_log_probabilities_are_a_sentence(fake_vllm: Any, choice: dict[str, Any]) -> None:
    fake_vllm.answers["/v1/completions"] = {"choices": [choice]}
    with pytest.raises(SRDError, match=f"^{fake_vllm.address}: the server gives no log-probabilities of a prompt's "):
        connect(fake_vllm.address).score([Request((5, 6), 1)])


def test_logits_are_not_taken_for_log_probabilities(fake_vllm: Any) -> None:
    fake_vllm.answers["/v1/completions"] = {"choices": [{"prompt_logprobs": [None, place(6, 3.5)]}]}
    with pytest.raises(SRDError, match=r"the server gives logits, one of 3.5, .* start it without --logprobs-mode"):
        connect(fake_vllm.address).score([Request((5, 6), 1)])


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}, {}]}], ids=["none", "too few", "too many"])
def test_a_completion_must_come_for_each_prompt(fake_vllm: Any, answer: dict[str, Any]) -> None:
    fake_vllm.answers["/v1/completions"] = answer
    with pytest.raises(SRDError, match="/v1/completions has not one completion for each of 1 prompts; run vLLM's own"):
        connect(fake_vllm.address).score([Request((5, 6), 1)])


def test_a_completion_without_text_is_a_sentence(fake_vllm: Any) -> None:
    fake_vllm.answers["/v1/completions"] = {"choices": [{}]}
    with pytest.raises(SRDError, match="the answer to /v1/completions has no text"):
        connect(fake_vllm.address).generate([5], max_tokens=1, stop=[])


def test_a_refusal_comes_with_the_server_s_reason(served: Any) -> None:
    served.answers["/v1/completions"] = {"error": {"message": "Requested prompt logprobs of 0, no.", "code": 400}}
    served.statuses["/v1/completions"] = 400
    with pytest.raises(
        SRDError, match="answers /v1/completions with HTTP 400: Requested prompt logprobs of 0, no; the"
    ):
        connect(served.address).score([Request((5, 6), 1)])
