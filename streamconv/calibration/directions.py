"""The input directions in which an adapter changes a weight: what a rounding should not disturb."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamconv.adapters.base import Update
from streamconv.calibration.targets import Held
from streamconv.equalization.equalizer import COLUMNS

# Of an update that is not a product of factors; LoRA's own default is 8.
_RANK = 16
_ITERATIONS = 4


def directions_of(held: Held, target: Tensor) -> Tensor | None:
    """Rows [r, in] that span the inputs which the update of a weight acts on; None where it has none.

    They are what its updates know of them, A of LoRA; of several, one below the other; of an equalized one A diag(s),
    as its D is. Where an update has no such factor or scales its product, they are the first right singular vectors of
    D = `target` - B.
    """
    updates: Sequence[Update] = held.step.updates
    if not updates:
        return None
    each = [update.input_directions(parts) for update, parts in zip(updates, held.work.parts, strict=False)]
    known = [rows for rows in each if rows is not None]
    if len(known) == len(each):
        found = torch.cat(known)
        equalizer = held.step.equalizer
        return found * held.work.parts[-1][COLUMNS] if equalizer and COLUMNS in equalizer.roles else found
    ranks = [update.low_rank for update in updates if update.low_rank is not None]
    return singular_directions(held.difference(target), max(ranks, default=_RANK))


def singular_directions(delta: Tensor, count: int) -> Tensor:
    """Right singular vectors [count, in] of `delta` [out, in], about the first `count`, by subspace iteration.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4; always from the same start.
    """
    count = min(count, *delta.shape)
    start = torch.randn(delta.shape[0], count, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(delta.T @ start.to(delta.device))
    for _ in range(_ITERATIONS):
        left, _ = torch.linalg.qr(delta @ basis)
        basis, _ = torch.linalg.qr(delta.T @ left)
    found: Tensor = basis.T.contiguous()
    return found
