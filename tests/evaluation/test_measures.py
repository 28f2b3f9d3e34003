"""Sums over tiles of the vocabulary against torch over all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from streamconv.evaluation.measures import Divergence

SHAPE = (3, 5)
VOCABULARY = 50


def both(close: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 6 * torch.randn(*SHAPE, VOCABULARY, generator=generator)
    model = reference + close * torch.randn(*SHAPE, VOCABULARY, generator=generator)
    return reference, model, torch.randint(VOCABULARY, SHAPE, generator=generator)


def tiled(reference: Tensor, model: Tensor, targets: Tensor, height: int) -> Divergence:
    found = Divergence.between(targets)
    for first in range(0, VOCABULARY, height):
        rows = range(first, min(first + height, VOCABULARY))
        for sequences in (slice(0, 2), slice(2, 4)):
            found.add(
                sequences,
                rows,
                reference[sequences, :, rows.start : rows.stop],
                model[sequences, :, rows.start : rows.stop],
            )
    return found


@pytest.mark.parametrize("height", [1, 7, 50])
@pytest.mark.parametrize("close", [0.01, 3.0])
def test_tiles_change_nothing(height: int, close: float) -> None:
    reference, model, targets = both(close)
    found = tiled(reference, model, targets, height)
    logs = [logits.double().log_softmax(-1) for logits in (reference, model)]
    kl = kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl(), kl, rtol=1e-4, atol=2e-6)
    for tally, log in zip((found.reference, found.model), logs, strict=True):
        losses = cross_entropy(log.flatten(0, 1), targets.flatten(), reduction="none").view(SHAPE)
        torch.testing.assert_close(tally.losses(), losses, rtol=1e-6, atol=2e-6)
        assert torch.equal(tally.best, log.argmax(-1))
    assert torch.equal(found.agreement(), logs[0].argmax(-1) == logs[1].argmax(-1))


def test_sums_lie_where_the_logits_are() -> None:
    """Here on a device that has no numbers: whatever came back of them would fail."""
    reference, model, targets = (tensor.to("meta") for tensor in both(0.5))
    found = Divergence.between(targets)
    found.add(slice(0, 2), range(7), reference[0:2, :, :7], model[0:2, :, :7])


def test_a_model_does_not_differ_from_itself() -> None:
    reference, _, targets = both(0.0)
    found = tiled(reference, reference.clone(), targets, 7)
    assert found.kl().abs().max() < 1e-12
    assert found.agreement().all()


def test_great_logits_do_not_overflow() -> None:
    reference, model, targets = (1000 * both(0.5)[0], 1000 * both(0.5)[1], both(0.5)[2])
    found = tiled(reference, model, targets, 7)
    assert found.kl().isfinite().all()
    assert found.model.losses().isfinite().all()
