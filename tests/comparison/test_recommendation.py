"""The rule: of those that cannot be told from the best, the smallest, then the one that loads in the least memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streamconv.comparison.recommendation import recommend
from streamconv.comparison.result import Numbers, Row
from tests.comparison.found import LOSSES, failed, numbers, row


def named(rows: list[Row], max_bits: float | None = 16) -> str | None:
    (advice,) = recommend(rows, max_bits)
    return advice.name


def noisy(kl: float, seed: int, bits: float = 5.0, load: int | None = 10**8) -> Numbers:
    """KL that varies a lot from sequence to sequence."""
    noise = np.random.default_rng(seed).normal(0, kl, len(LOSSES))
    return replace(numbers(kl, bits, load=load), kl_by_sequence=tuple((kl + noise - noise.mean()).tolist()))


def test_the_lowest_kl_where_it_is_lower_beyond_chance() -> None:
    rows = [row("small", numbers(0.05, 4.5)), row("near", numbers(0.01, 9)), row("far", numbers(0.2, 4))]
    assert named(rows) == "near"
    (advice,) = recommend(rows, 16)
    assert advice.as_good == ("near",)
    assert "the lowest KL of 3" in advice.reason


def test_the_smallest_of_those_that_cannot_be_told_apart() -> None:
    rows = [row("best", noisy(0.0100, 1, 9)), row("small", noisy(0.0101, 2, 5)), row("far", numbers(0.2, 4))]
    assert named(rows) == "small"
    (advice,) = recommend(rows, 16)
    assert advice.as_good == ("best", "small")
    assert "the smallest of them" in advice.reason


def test_a_higher_perplexity_is_not_as_good_whatever_kl_says() -> None:
    worse = replace(noisy(0.0101, 2, 5), losses=tuple(loss + 0.05 for loss in LOSSES))
    assert named([row("best", noisy(0.0100, 1, 9)), row("small", worse)]) == "best"


def test_of_equal_size_the_one_that_loads_in_less_memory() -> None:
    rows = [
        row("best", noisy(0.0100, 1, 5.0, load=200)),
        row("light", noisy(0.0101, 2, 5.04, load=100)),
        row("unknown", noisy(0.0102, 3, 5.0, load=None)),
        row("lighter, larger", noisy(0.0101, 4, 5.2, load=50)),
    ]
    assert named(rows) == "light"
    rows[1] = row("light", noisy(0.0101, 2, 5.04, load=None))
    assert named(rows) == "best"


def test_bits_are_a_limit() -> None:
    rows = [row("near", numbers(0.01, 9)), row("small", numbers(0.05, 4.5)), row("smaller", numbers(0.2, 4))]
    assert [named(rows, bits) for bits in (9, 8.9, 4.2)] == ["near", "small", "smaller"]
    (advice,) = recommend(rows, 3)
    assert (advice.name, advice.as_good) == (None, ())
    assert "no strategy" in advice.reason


def test_without_a_limit_one_for_each_width() -> None:
    rows = [
        row("sixteen", numbers(0.001, 16), quant="none"),
        row("eight", numbers(0.01, 9), quant="int8"),
        row("four", numbers(0.05, 6)),
        row("four, worse", numbers(0.06, 5)),
    ]
    assert [(each.need, each.name) for each in recommend(rows, None)] == [
        ("4-bit codes", "four"),
        ("8-bit codes", "eight"),
        ("16 bit", "sixteen"),
    ]
    assert [each.name for each in recommend(rows[:1], None)] == ["sixteen"]


def test_a_residual_adapter_has_a_recommendation_of_its_own() -> None:
    rows = [row("feedback", numbers(0.05, 6)), row("residual", numbers(0.001, 7))]
    advice = recommend(rows, None)
    assert [(each.need, each.name) for each in advice] == [
        ("4-bit codes", "feedback"),
        ("4-bit codes and an adapter", "residual"),
    ]
    assert "do not merge" not in advice[1].reason
    assert [each.need for each in recommend(rows[1:], None)] == ["4-bit codes and an adapter"]
    assert [each.name for each in recommend(rows, 8)] == ["feedback", "residual"]
    assert [each.name for each in recommend(rows, 6.5)] == ["feedback"]


def test_what_needs_no_merge_is_told_beside_a_residual_adapter() -> None:
    unmerged = row("unmerged-T", numbers(0.0, 7), quant=None)
    residual = row("residual", numbers(0.001, 7))
    exact = "; unmerged-T is exact: where adapters can be loaded, do not merge"
    assert recommend([unmerged, residual], None)[0].reason.endswith(exact)
    assert recommend([unmerged, residual], 7)[1].reason.endswith(exact)
    of_f, other_reference = replace(residual, target="F"), replace(unmerged, numbers=numbers(0.003, 7))
    large = replace(unmerged, numbers=numbers(0.0, 16))
    for rows in (
        [unmerged, of_f],
        [other_reference, residual],
        [row("base", numbers(0.0), quant=None, target="base"), residual],
    ):
        assert "exact" not in recommend(rows, None)[0].reason
    assert "exact" not in recommend([large, residual], 7)[1].reason


def test_what_is_not_a_model_on_disk_or_failed_is_not_recommended() -> None:
    rows = [row("unmerged", numbers(0.0, 16), quant=None), failed("broken"), row("four", numbers(0.05, 6))]
    assert named(rows) == "four"
    assert named(rows[:2]) is None
    assert recommend(rows[:2], None) == ()
