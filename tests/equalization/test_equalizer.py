"""Rows and columns of a weight times its factors; norms that multiply by 1 + w."""

from __future__ import annotations

import pytest
import torch

from streamconv.equalization.equalizer import COLUMNS, ROWS, Equalizer


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_scale_of_one_changes_nothing(shift: float) -> None:
    norm = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = Equalizer("norm", (50,), (COLUMNS,), shift).apply(
        norm.clone(), range(1), {COLUMNS: torch.ones(50)}, ()
    )
    assert torch.equal(found, norm)


def test_one_weight_is_divided_and_multiplied() -> None:
    cell = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    equalizer = Equalizer("w", (5, 4), (COLUMNS, ROWS))
    r, s = torch.rand(5) + 0.5, torch.rand(4) + 0.5
    found = equalizer.apply(cell.clone(), range(2, 5), {ROWS: r, COLUMNS: s}, ())
    torch.testing.assert_close(
        found.double(), torch.diag(r[2:].double()) @ cell.double() @ torch.diag(s.double())
    )
    with pytest.raises(AssertionError, match="scales are not known yet"):
        equalizer.apply(cell, range(2, 5), {}, ())
