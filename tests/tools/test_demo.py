"""The demo fails when the table does not show what it says."""

import pytest

from tools.demo import ROWS, judge

SHOWN = {
    "base": 30.02,
    "unmerged": 26.00,
    "bf16": 26.01,
    "base-nf4": 40.39,
    "unmerged-nf4": 27.42,
    "nf4-nearest-T": 39.71,
    "nf4-auto-T": 28.0,
    "nf4-F": 28.5,
}


def test_every_row_is_judged_or_shown() -> None:
    assert {row.name for row in ROWS} == SHOWN.keys()


def test_what_was_measured_passes() -> None:
    said, failed = judge(SHOWN)
    assert not failed
    assert len(said) == 2


@pytest.mark.parametrize(
    ("row", "perplexity", "claim"),
    [
        ("bf16", 26.2, "merged bf16"),
        ("nf4-nearest-T", 35.0, "nearest"),
        ("nf4-auto-T", 32.0, "auto"),
        ("nf4-F", 32.0, "bf16 base"),
    ],
)
def test_a_claim_that_does_not_hold_fails(row: str, perplexity: float, claim: str) -> None:
    _, failed = judge(SHOWN | {row: perplexity})
    assert len(failed) == 1
    assert claim in failed[0]
