"""Intervals over sequences, against the normal theory and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamconv.comparison import bootstrap


def test_an_interval_is_that_of_the_normal_theory_where_that_holds() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400).tolist()
    found = bootstrap.mean(values)
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)


def test_sequences_are_drawn_in_pairs() -> None:
    shared = np.random.default_rng(0).normal(3.0, 1.0, size=40)
    losses, others = (shared + 0.01).tolist(), shared.tolist()
    gap = bootstrap.difference(losses, others)
    assert (gap.low, gap.high) == pytest.approx((0.01, 0.01))
    assert bootstrap.mean(losses).high - bootstrap.mean(losses).low > 0.3
    assert gap.low > 0


def test_perplexities_and_ratios() -> None:
    worst, best = ([math.log(number)] * 3 for number in (40.0, 20.0))
    assert bootstrap.perplexity(worst).value == pytest.approx(40)
    assert bootstrap.perplexity_difference(worst, best).value == pytest.approx(20)
    assert bootstrap.ratio([1.0, 3.0], [4.0, 4.0]).value == pytest.approx(0.5)
