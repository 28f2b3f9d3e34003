"""The cost of choosing codes, against arithmetic by hand; and the hours that docs/guide-calibration.md gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from streamconv.calibration.cost import (
    CARD,
    Rates,
    Sizes,
    TextSize,
    cpu_seconds,
    device_seconds,
    groups_of,
    layer_work,
    weight_work,
)
from streamconv.rounding.feedback import FeedbackOptions
from tools.study.cost import LARGE, guide_table

ONCE = FeedbackOptions(sweeps=1, refits=0)
ROWS, COLUMNS = 128, 256


def test_one_weight_by_hand() -> None:
    """out 128, in 256, 1,000 tokens, gradients of 100: two feedbacks and one sweep."""
    work = weight_work(ROWS, COLUMNS, TextSize(1000, 100), ONCE)
    assert work.gradients == 100 * (6 * 32_768 + 2 * 16_384)
    assert work.factors == pytest.approx(128**3 / 3 + 2 * 128 * 65_536)
    assert work.systems == 0
    assert work.rounding == (2 + 2) * 32_768 * 384 + 2 * 128 * 65_536
    assert work.settled == 3 * 32_768
    assert (work.tiles, work.columns) == (3 * 2 * 4, 0)
    assert work.copied == 16 * 32_768 + 3 * 26 * 32_768


def test_without_gradients_columns_are_settled_by_calls() -> None:
    work = weight_work(5000, COLUMNS, TextSize(1000, 0), ONCE)
    assert (work.gradients, work.tiles, work.columns) == (0, 0, 3 * 256 * 2)
    assert work.factors == 2 * 5000 * 65_536
    assert work.copied == 16 * 5000 * 256


def test_inputs_are_factored_once_a_group() -> None:
    text = TextSize(1000, 0)
    sizes = Sizes([(256, [128, 64, 64])], 256)
    work = layer_work(sizes, text, ONCE, stored=0, on_gpu=True)
    alone = [weight_work(rows, 256, text, ONCE).factors for rows in (128, 64, 64)]
    assert work.factors == pytest.approx(256**3 / 3 + sum(alone))


def test_refits_are_counted_with_their_sweeps() -> None:
    work = weight_work(ROWS, COLUMNS, TextSize(1000, 100), FeedbackOptions(sweeps=3, refits=2))
    assert work.settled == (4 + 9) * 32_768
    assert work.refits == 2 * 2 * 32_768 * (2 * 256 + 128)
    assert work.blocks == 2 * 4  # 4 of 64 in a row, all rows at once
    assert work.systems == pytest.approx(2 * 128 * 4**3 * 2 / 3)
    assert work.rounding == (4 + 18) * 32_768 * 384 + 2 * 128 * 65_536


def test_time_is_work_over_rates() -> None:
    work = weight_work(ROWS, COLUMNS, TextSize(1000, 100), replace(ONCE, refits=1))
    rates = Rates(products=1e9, factors=1e8, systems=1e7, code_s=1e-6, call_s=1e-3, copies=1e7, reading=1e6)
    products = (work.gradients + work.rounding + work.refits) / 1e9
    solved = work.factors / 1e8 + work.systems / 1e7
    assert device_seconds(work, rates) == pytest.approx(
        products + solved + work.settled * 1e-6 + (10 * work.tiles + 6 * 4) * 1e-3 + work.copied / 1e7
    )
    assert cpu_seconds(work, rates, 4) == pytest.approx((products + solved) / 4 + work.settled * 1e-6)


def test_weights_that_share_an_input_are_known_by_name() -> None:
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    weights = [(names[0], 64, 64), (names[1], 16, 64), (names[2], 16, 64), (names[3], 64, 64)]
    weights += [(f"model.layers.0.mlp.{name}_proj.weight", 128, 64) for name in ("gate", "up")]
    weights += [("model.layers.0.mlp.down_proj.weight", 64, 128)]
    assert groups_of(weights) == [(64, [64, 16, 16]), (64, [64]), (64, [128, 128]), (128, [64])]


def test_the_guide_has_the_hours() -> None:
    guide = Path(__file__).parents[2] / "docs/guide-calibration.md"
    assert guide_table(CARD) in guide.read_text()
    assert len(LARGE) == 3
