"""Intervals of what was measured on a sample of sequences: the paired percentile bootstrap.

Sequences are drawn with replacement, the same draw for everything that is compared, and the statistic is computed
anew for each draw; the interval lies between the 2.5 % and the 97.5 % quantile of the results (Efron and Tibshirani
1993, An Introduction to the Bootstrap, chapter 13). All sequences have as many tokens, so means over tokens are
means over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED = 10_000, 6
QUANTILES = (2.5, 97.5)

Sample = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def perplexity(losses: Sequence[float]) -> Estimate:
    """exp of the mean of `losses`, nats a token, one a sequence."""
    return estimate(lambda mean: np.exp(mean[..., 0]), losses)


def mean(values: Sequence[float]) -> Estimate:
    return estimate(lambda found: found[..., 0], values)


def perplexity_difference(losses: Sequence[float], others: Sequence[float]) -> Estimate:
    """Perplexity by `losses` minus that by `others`, of the same sequences."""
    return estimate(lambda found: np.exp(found[..., 0]) - np.exp(found[..., 1]), losses, others)


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    return estimate(lambda found: found[..., 0] - found[..., 1], values, others)


def ratio(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of `values` over that of `others`, of the same sequences."""
    return estimate(lambda found: found[..., 0] / found[..., 1], values, others)


def estimate(statistic: Callable[[Sample], Sample], *samples: Sequence[float]) -> Estimate:
    """`statistic` of the means of `samples` [..., sample], and its interval over sequences."""
    values = np.asarray(samples, dtype=np.float64)
    count = values.shape[1]
    draws = np.random.default_rng(SEED).integers(0, count, size=(DRAWS, count))
    means = values[:, draws].mean(axis=2).T
    low, high = np.percentile(statistic(means), QUANTILES)
    found = float(statistic(values.mean(axis=1)))
    assert math.isfinite(found), "a sample holds NaN or infinity"
    return Estimate(found, float(low), float(high))
