"""Scores by vLLM's server over HTTP, against Transformers; both in float32, so that they agree closely."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import environment

from srd_modifier.errors import SRDError
from srd_modifier.evaluation.scorer import Request, Scorer
from srd_modifier.evaluation.servers import connect

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (EXAMPLES / "text" / "demo.txt").read_text(encoding="utf-8")
TEXTS = [text[:300] for text in TEXT.split("\n\n") if len(text) > 300][:6]
AWKWARD = ["", " ", "  Timber\n\n\tfor <|endoftext|> 1234", "A smile 😀, an über, two 漢字."]
CONTEXT = 256
EOS = 0
TOLERANCE = 1e-4


class Reference:
    """The model in Transformers."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def distributions(self, tokens: tuple[int, ...]) -> Tensor:
        """Log-probabilities of what follows each token, float64 [tokens, vocabulary]."""
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

    def continuation(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest next tokens, up to the end of a text."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count and tokens[-1] != EOS:
            tokens.append(int(self.distributions(tuple(tokens))[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.fixture(scope="module")
def address(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the plain model, started and stopped as the example does it."""
    spec = importlib.util.spec_from_file_location("serve_vllm", EXAMPLES / "serve_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--served-model-name", "tiny", "again"]
    # all that would be compiled is the function that ranks tokens, which takes longer than every test here
    inherited = environment() | {"TORCHDYNAMO_DISABLE": "1"}
    del inherited["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server has its engine in another process
    with pytest.MonkeyPatch.context() as patch, (tmp_path_factory.mktemp("server") / "LOG").open("a+b") as log:
        for name, value in inherited.items():
            patch.setenv(name, value)
        with example.server(example.serve_command(str(tiny_llama), settings), log) as running:
            yield running


@pytest.fixture(scope="module")
def scorer(address: str) -> Scorer:
    return connect(f"{address}/v1#tiny")


def test_of_several_names_one_must_be_given(address: str) -> None:
    with pytest.raises(SRDError, match=f"the server has 2 models; .* as in {address}#tiny: tiny, again"):
        connect(address)
    with pytest.raises(SRDError, match="the server has no model 'other', but tiny, again"):
        connect(f"{address}#other")


def test_texts_become_the_tokens_of_transformers(scorer: Scorer, reference: Reference) -> None:
    for text in [*AWKWARD, *TEXTS]:
        assert scorer.encode(text) == reference.tokenizer(text)["input_ids"]
        assert (
            scorer.encode(text, add_special=False) == reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_a_tokenizer_that_adds_no_bos_shows_none(scorer: Scorer) -> None:
    assert scorer.prefix_token is None


def test_tokens_have_the_probabilities_of_transformers(scorer: Scorer, reference: Reference) -> None:
    sequences = [tuple(reference.tokenizer(text)["input_ids"]) for text in [*TEXTS, *AWKWARD[2:]]]
    sequences.append((*sequences[0], EOS, *sequences[1][:3]))
    requests = [Request(tokens, 1 + (number * 7) % (len(tokens) - 1)) for number, tokens in enumerate(sequences)]
    for request, scores in zip(requests, scorer.score(requests), strict=True):
        expected = reference.distributions(request.tokens)[-request.scored - 1 : -1]
        own = torch.tensor(request.tokens[-request.scored :])
        assert scores.log_probabilities.dtype == torch.float64
        torch.testing.assert_close(
            scores.log_probabilities, expected.gather(1, own[:, None])[:, 0], rtol=0, atol=TOLERANCE
        )
        assert scores.greedy.tolist() == (expected.argmax(1) == own).tolist()


def test_prompts_are_continued_as_by_transformers(scorer: Scorer, reference: Reference) -> None:
    for text in TEXTS[:3]:
        prompt = reference.tokenizer(text)["input_ids"]
        expected = reference.tokenizer.decode(reference.continuation(prompt, 16), skip_special_tokens=True)
        assert scorer.generate(prompt, max_tokens=16, stop=[]) == expected
        stop = expected[6:9]
        assert scorer.generate(prompt, max_tokens=16, stop=["never", stop]) == expected[: expected.index(stop)]


def test_a_request_fills_the_context_but_for_one_token(scorer: Scorer, reference: Reference) -> None:
    tokens = tuple(torch.randint(1, 4096, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist())
    assert scorer.max_length == CONTEXT - 2
    (scores,) = scorer.score([Request(tokens[:-1], 1)])
    assert float(scores.log_probabilities) == pytest.approx(
        float(reference.distributions(tokens[:-2])[-1, tokens[-2]]), abs=TOLERANCE
    )
    with pytest.raises(SRDError, match="a sequence of 256 tokens does not fit the server's context"):
        scorer.score([Request(tokens, 1)])


def test_vllm_has_no_room_for_one_more(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "_context", CONTEXT + 1)
    with pytest.raises(SRDError, match="answers /v1/completions with HTTP 400: max_tokens must be at least 1, got 0"):
        scorer.score([Request((5,) * CONTEXT, 1)])


def test_a_continuation_fills_the_context(scorer: Scorer) -> None:
    assert scorer.generate([5] * (CONTEXT - 3), max_tokens=3, stop=[])
    with pytest.raises(SRDError, match="a prompt of 253 tokens and 4 to generate do not fit"):
        scorer.generate([5] * (CONTEXT - 3), max_tokens=4, stop=[])


def test_a_token_outside_the_vocabulary_is_a_sentence(scorer: Scorer) -> None:
    with pytest.raises(SRDError, match="answers /v1/completions with HTTP 400: "):
        scorer.score([Request((5, 10**6), 1)])
