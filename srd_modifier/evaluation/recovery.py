"""How much of the reference's score a model keeps, with a confidence interval from differences on the same items.

Two models are asked the same questions and read the same windows, so most of the scatter of either is common to both:
the interval of their ratio is far narrower than two standard errors would make believe.
"""

import math

import numpy as np

from srd_modifier.evaluation.results import Interval
from srd_modifier.evaluation.tasks.base import Items

_Z = 1.959964  # 95 % of a normal distribution lie within


def perplexity_recovery(reference: Items, model: Items) -> Interval | None:
    """Percent: the reference's perplexity over the model's.

    Windows are the items: tokens of one window are not independent, and its mean takes that into account. `None` for
    fewer than two windows.
    """
    weights = np.array(reference.weights)
    difference = np.array(model.values) - np.array(reference.values)
    if len(weights) < 2:
        return None
    mean = float((weights * difference).sum() / weights.sum())
    spread = weights * (difference - mean)
    count = len(weights)
    stderr = float(np.sqrt((spread**2).sum() * count / (count - 1)) / weights.sum())
    return Interval(*(100 * math.exp(-value) for value in (mean, mean + _Z * stderr, mean - _Z * stderr)))


def mean_recovery(reference: Items, model: Items, *, higher_is_better: bool = True) -> Interval | None:
    """Percent: the model's mean over the reference's, or the reverse where lower is better.

    The interval is that of a ratio of means of paired items (delta method). `None` for fewer than two items and where
    the mean below the line is 0.
    """
    above, below = (model, reference) if higher_is_better else (reference, model)
    numerator, denominator = np.array(above.values), np.array(below.values)
    count = len(denominator)
    if count < 2 or denominator.mean() == 0:
        return None
    ratio = float(numerator.mean() / denominator.mean())
    residual = numerator - ratio * denominator
    stderr = float(np.sqrt((residual**2).sum() / (count * (count - 1))) / abs(denominator.mean()))
    return Interval(100 * ratio, 100 * (ratio - _Z * stderr), 100 * (ratio + _Z * stderr))
