"""Intervals of recovery against a bootstrap over the same items."""

import numpy as np
import pytest
from numpy.typing import NDArray

from srd_modifier.evaluation.recovery import mean_recovery, perplexity_recovery
from srd_modifier.evaluation.results import Interval
from srd_modifier.evaluation.tasks.base import Items

Values = NDArray[np.float64]
RESAMPLES = 4000


def items(values: Values, weights: Values | None = None) -> Items:
    weights = np.ones(len(values)) if weights is None else weights
    return Items(tuple(map(float, values)), tuple(map(float, weights)))


def draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, count, (RESAMPLES, count))


def assert_is(found: Interval | None, resampled: Values, value: float) -> None:
    """Its ends lie within a tenth of its width of the bootstrap's."""
    assert found is not None
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found.value == pytest.approx(value, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.low < found.value < found.high


def test_perplexity_recovers_as_a_bootstrap_over_windows_says():
    generator = np.random.default_rng(0)
    reference = generator.normal(2.5, 0.4, 150)
    model = reference + generator.normal(0.03, 0.02, 150)
    weights = generator.integers(100, 500, 150).astype(float)
    picked = draws(150)
    mean = ((model - reference) * weights)[picked].sum(1) / weights[picked].sum(1)
    value = 100 * np.exp(np.average(reference, weights=weights) - np.average(model, weights=weights))
    found = perplexity_recovery(items(reference, weights), items(model, weights))
    assert_is(found, 100 * np.exp(-mean), value)


def test_perplexity_recovery_is_far_narrower_than_two_independent_errors():
    generator = np.random.default_rng(0)
    reference = generator.normal(2.5, 0.4, 150)
    model = reference + generator.normal(0.03, 0.02, 150)
    found = perplexity_recovery(items(reference), items(model))
    assert found is not None
    independent = 1.96 * np.hypot(reference.std(ddof=1), model.std(ddof=1)) / np.sqrt(150)
    assert found.high - found.low < 100 * independent / 10


@pytest.mark.parametrize("agreement", [0.95, 0.6])
def test_accuracy_recovers_as_a_bootstrap_over_questions_says(agreement):
    generator = np.random.default_rng(2)
    reference = (generator.random(500) < 0.6).astype(float)
    model = np.where(generator.random(500) < agreement, reference, 1 - reference)
    picked = draws(500)
    resampled = 100 * model[picked].mean(1) / reference[picked].mean(1)
    assert_is(mean_recovery(items(reference), items(model)), resampled, 100 * model.mean() / reference.mean())


def test_where_lower_is_better_the_reference_stands_above():
    generator = np.random.default_rng(3)
    reference = generator.gamma(4, 1, 300)
    model = reference * generator.normal(1.05, 0.05, 300)
    picked = draws(300)
    resampled = 100 * reference[picked].mean(1) / model[picked].mean(1)
    found = mean_recovery(items(reference), items(model), higher_is_better=False)
    assert_is(found, resampled, 100 * reference.mean() / model.mean())


@pytest.mark.parametrize("recovery", [perplexity_recovery, mean_recovery])
def test_identical_models_recover_all_of_it(recovery):
    values = items(np.array([1.0, 0.0, 3.0, 2.5]), np.array([5.0, 5.0, 5.0, 2.0]))
    assert recovery(values, values) == Interval(100.0, 100.0, 100.0)


def test_a_better_model_recovers_more_than_all():
    found = perplexity_recovery(items(np.array([3.0, 3.1, 2.9])), items(np.array([2.8, 2.9, 2.7])))
    assert found is not None
    assert found.value == pytest.approx(100 * np.exp(0.2))


def test_of_a_reference_that_knows_nothing_there_is_no_share():
    nothing, something = items(np.zeros(20)), items(np.array([0.0, 1.0] * 10))
    assert mean_recovery(nothing, something) is None
    assert mean_recovery(something, nothing, higher_is_better=False) is None
    found = mean_recovery(something, nothing)
    assert found == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("recovery", [perplexity_recovery, mean_recovery])
def test_one_item_has_no_interval(recovery):
    one = items(np.array([1.0]))
    assert recovery(one, one) is None
