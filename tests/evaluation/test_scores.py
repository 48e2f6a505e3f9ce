import math

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation import scores as scores_module
from srd_modifier.evaluation.scores import NamedModel, TokenScores, divergence, perplexity, score_tokens
from srd_modifier.evaluation.windows import Convention, Window, window_rule


class FixedLogits(nn.Module):
    """The least a model can be: no `logits_to_keep`, no `use_cache`, logits looked up by the token read."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits[input_ids])


def fixed(logits: Tensor, name: str = "fixed") -> NamedModel:
    return NamedModel(name, FixedLogits(logits))


def score_one_by_one(model: nn.Module, tokens: Tensor, windows: list[Window], first: int | None = None) -> Tensor:
    """Log-probabilities float64 [scored, vocabulary], one forward pass per scored token."""
    rows = []
    for window in windows:
        for position in range(window.stop - window.scored, window.stop):
            context = tokens[window.start : position].clone()
            if first is not None:
                context[0] = first
            with torch.no_grad():
                logits = model(input_ids=context[None]).logits
            rows.append(logits[0, -1].double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize(
    "rule",
    [window_rule(ctx=32, stride=8), window_rule(ctx=32, stride=32), window_rule(Convention.LLAMACPP, ctx=16)],
    ids=["sliding", "no-overlap", "llamacpp"],
)
def test_scores_match_one_forward_pass_per_token(make_model, tokens, rule, batch_size):
    model, reference = make_model(seed=0), make_model(seed=1)
    first = 0 if rule.convention is Convention.LLAMACPP else None
    tokens = tokens[:80]
    windows = rule.windows(len(tokens))
    ours = score_tokens(
        NamedModel("model", model),
        tokens,
        windows,
        reference=NamedModel("reference", reference),
        first_token=first,
        batch_size=batch_size,
    )
    expected = score_one_by_one(model, tokens, windows, first)
    expected_reference = score_one_by_one(reference, tokens, windows, first)
    targets = torch.cat([tokens[window.stop - window.scored : window.stop] for window in windows])
    kld = kl_divergence(Categorical(logits=expected_reference), Categorical(logits=expected))
    torch.testing.assert_close(ours.nll, functional.nll_loss(expected, targets, reduction="none").float())
    torch.testing.assert_close(ours.divergence, kld.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.same_top, expected.argmax(-1) == expected_reference.argmax(-1))


def test_perplexity_matches_the_loss_of_transformers_on_separate_windows(make_model, tokens):
    model = make_model()
    tokens = tokens[:128]
    windows = window_rule(ctx=32, stride=32).windows(len(tokens))
    ours = perplexity(score_tokens(NamedModel("model", model), tokens, windows))
    with torch.no_grad():
        loss = model(input_ids=tokens.view(4, 32), labels=tokens.view(4, 32)).loss
    assert ours.tokens == 4 * 31
    assert ours.ppl == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_matches_the_hugging_face_guide(make_model, tokens):
    model, ctx, stride = make_model(), 32, 12
    previous_end, negative_log_likelihood, count = 0, 0.0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + ctx, len(tokens))
        target_length = end - previous_end
        input_ids = tokens[None, begin:end]
        labels = input_ids.clone()
        labels[:, :-target_length] = -100
        valid = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            negative_log_likelihood += float(model(input_ids=input_ids, labels=labels).loss) * valid
        count += valid
        previous_end = end
        if end == len(tokens):
            break
    windows = window_rule(ctx=ctx, stride=stride).windows(len(tokens))
    ours = perplexity(score_tokens(NamedModel("model", model), tokens, windows))
    assert ours.tokens == count
    assert ours.ppl == pytest.approx(math.exp(negative_log_likelihood / count), rel=1e-5)


def test_a_model_does_not_diverge_from_itself_at_all(make_model, tokens):
    model = NamedModel("model", make_model())
    windows = window_rule(ctx=32, stride=8).windows(len(tokens))
    scores = score_tokens(model, tokens, windows, reference=model)
    assert torch.equal(scores.divergence, torch.zeros_like(scores.nll))
    summary = divergence(scores)
    assert (summary.kld_mean, summary.kld_p99, summary.kld_stderr, summary.top1_agreement) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("change", [1e-5, 1e-4, 1e-2])
def test_small_divergences_are_not_drowned_by_rounding(change):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, 500, generator=generator) * 4 + 20
    changed = logits + torch.randn(500, 500, generator=generator) * change
    tokens = torch.arange(500)
    windows = window_rule(ctx=100, stride=50).windows(500)
    scores = score_tokens(fixed(changed), tokens, windows, reference=fixed(logits))
    # To second order the divergence is half the variance of the change under the reference, which needs no
    # log-sum-exp and so does not share the rounding under test.
    p = logits[:-1].double().softmax(-1)
    step = changed[:-1].double() - logits[:-1].double()
    expected = ((p * step**2).sum(-1) - (p * step).sum(-1) ** 2) / 2
    torch.testing.assert_close(scores.divergence.double(), expected, rtol=0.03, atol=1e-15)
    assert bool((scores.divergence >= 0).all())


def test_scoring_in_slices_of_rows_changes_nothing(make_model, tokens, monkeypatch):
    model, reference = NamedModel("model", make_model(seed=0)), NamedModel("reference", make_model(seed=1))
    windows = window_rule(ctx=32, stride=8).windows(len(tokens))
    whole = score_tokens(model, tokens, windows, reference=reference)
    monkeypatch.setattr(scores_module, "_SLICE_VALUES", 64 * 5)
    sliced = score_tokens(model, tokens, windows, reference=reference)
    assert torch.equal(whole.nll, sliced.nll)
    assert torch.equal(whole.divergence, sliced.divergence)
    assert torch.equal(whole.same_top, sliced.same_top)


def test_likelihoods_do_not_depend_on_a_reference(make_model, tokens):
    model, reference = NamedModel("model", make_model(seed=0)), NamedModel("reference", make_model(seed=1))
    windows = window_rule(ctx=32, stride=8).windows(len(tokens))
    alone = score_tokens(model, tokens, windows)
    assert torch.equal(alone.nll, score_tokens(model, tokens, windows, reference=reference).nll)
    assert alone.divergence is None
    assert alone.same_top is None
    assert divergence(alone) is None


def test_results_per_token_are_small_vectors(make_model, tokens):
    model = NamedModel("model", make_model())
    scores = score_tokens(model, tokens, window_rule(ctx=32, stride=8).windows(len(tokens)), reference=model)
    assert scores.nll.shape == scores.divergence.shape == scores.same_top.shape == (149,)
    assert (scores.nll.dtype, scores.divergence.dtype, scores.same_top.dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )


def test_progress_reaches_the_number_of_windows(make_model, tokens):
    calls = []
    windows = window_rule(ctx=32, stride=8).windows(len(tokens))
    score_tokens(
        NamedModel("model", make_model()),
        tokens,
        windows,
        batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[0] == (0, len(windows))
    assert calls[-1] == (len(windows), len(windows))
    assert calls == sorted(calls)


def test_bfloat16_logits_are_scored_without_further_rounding():
    logits = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(50)
    scores = score_tokens(fixed(logits), tokens, window_rule(ctx=10, stride=5).windows(50))
    expected = functional.cross_entropy(logits[:-1].double(), tokens[1:], reduction="none")
    assert torch.equal(scores.nll, expected.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("culprit", ["candidate", "original"])
def test_logits_that_are_not_finite_name_the_model(value, culprit):
    sound = torch.zeros(20, 20)
    broken = sound.clone()
    broken[7, 3] = value
    models = {name: fixed(broken if name == culprit else sound, name) for name in ("candidate", "original")}
    windows = window_rule(ctx=10, stride=5).windows(20)
    with pytest.raises(SRDError, match=f"^{culprit}: the model gives NaN or infinite logits in float32"):
        score_tokens(models["candidate"], torch.arange(20), windows, reference=models["original"])


def test_different_vocabularies_are_refused():
    windows = window_rule(ctx=10, stride=5).windows(20)
    with pytest.raises(SRDError, match="small has a vocabulary of 20 and the reference large one of 24"):
        score_tokens(
            fixed(torch.zeros(20, 20), "small"),
            torch.arange(20),
            windows,
            reference=fixed(torch.zeros(20, 24), "large"),
        )


def test_batch_size_below_one_is_refused(tokens):
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        score_tokens(fixed(torch.zeros(64, 64)), tokens, window_rule().windows(len(tokens)), batch_size=0)


def test_summaries_match_numpy_on_known_values():
    nll = torch.tensor([1.0, 2.0, 3.0, 6.0])
    kld = torch.tensor([0.0, 1.0, 2.0, 9.0])
    scores = TokenScores(nll=nll, divergence=kld, same_top=torch.tensor([True, True, True, False]))
    likelihood, distance = perplexity(scores), divergence(scores)
    assert likelihood.tokens == 4
    assert likelihood.ppl == pytest.approx(math.exp(3.0))
    assert likelihood.ppl_stderr == pytest.approx(math.exp(3.0) * math.sqrt(14 / 3) / 2)
    assert distance.kld_mean == pytest.approx(3.0)
    assert distance.kld_median == pytest.approx(1.5)
    assert distance.kld_p99 == pytest.approx(9.0 - 0.03 * 7)
    assert distance.kld_stderr == pytest.approx(numpy.std([0, 1, 2, 9], ddof=1) / 2)
    assert distance.top1_agreement == 0.75
