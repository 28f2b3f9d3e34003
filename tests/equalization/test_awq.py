"""The scales that are chosen are the best of the paper's, by an independent look in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

from streamconv.dtypes import F32
from streamconv.equalization.awq import GRID, Consumer, candidate, find_scales, nearest, output_size
from streamconv.formats import FORMATS

# Codes of NF4 from the library that owns it; its scales are float32, and no value lies between two by design.
NF4 = get_4bit_type("nf4", device="cpu", blocksize=64).double()
BLOCK = 64


def same(scales: Tensor) -> Tensor:
    return scales


def consumer(weight: Tensor, quant: str = "nf4") -> Consumer:
    return Consumer(weight, FORMATS[quant].encoder("layer.weight", tuple(weight.shape), F32))


def inputs(count: int, columns: int, loud: Sequence[int], factor: float = 50.0) -> Tensor:
    """Tokens of which a few channels are `factor` times as large."""
    found: Tensor = torch.randn(count, columns, generator=torch.Generator().manual_seed(3))
    found[:, list(loud)] *= factor
    return found


def weights(rows: int, columns: int, seed: int) -> Tensor:
    found: Tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    return found


def rounded(weight: Tensor) -> Tensor:
    """Nearest codes of NF4, float64."""
    blocks = weight.view(-1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks[..., None] / scales[..., None] - NF4).abs().argmin(-1)
    found: Tensor = (NF4[codes] * scales).view(weight.shape)
    return found


def brute_force(
    x: Tensor, layers: Sequence[Tensor], spread: Callable[[Tensor], Tensor], shared: int = 1
) -> dict[float, float]:
    """By α, the squared error of all outputs, a token; everything float64 and no moments used."""
    x = x.double()
    a = x.abs().mean(0)
    a = a.view(2, shared, -1).mean(1).flatten() if shared > 1 else a
    losses = {}
    for number in range(20):
        alpha = number / 20
        s = a**alpha
        s = spread(s / (s.max() * s.min()).sqrt())
        errors = ((rounded(w.double() * s) / s - w.double()) for w in layers)
        losses[alpha] = sum(float((x @ e.T).square().sum()) / len(x) for e in errors)
    return losses


@pytest.mark.parametrize("loud", [(), (5, 70)], ids=["even", "skewed"])
def test_the_best_of_the_grid_by_float64(loud: Sequence[int]) -> None:
    x, layers = inputs(400, 128, loud), [weights(40, 128, 1), weights(130, 128, 2)]
    hessian = x.T @ x / len(x)
    found = find_scales(x.abs().mean(0), hessian, [consumer(w) for w in layers], same, same)
    expected = brute_force(x, layers, same)
    best = min(expected, key=lambda alpha: expected[alpha])
    assert found.alpha == best
    assert found.loss == pytest.approx(expected[best], rel=1e-4)
    assert found.before == pytest.approx(expected[0.0], rel=1e-4)
    assert found.size == pytest.approx(sum(float((x @ w.T).square().sum()) / 400 for w in layers), rel=1e-4)
    if loud:
        assert best > 0.2
        assert found.loss < 0.3 * found.before


def test_inputs_that_share_a_scale() -> None:
    """As query heads do that read the same values."""

    def spread(scales: Tensor) -> Tensor:
        return scales.view(2, 1, 16).expand(2, 4, 16).flatten()

    x, layer = inputs(300, 128, (5, 70)), weights(64, 128, 1)
    magnitudes = x.abs().mean(0).view(2, 4, 16).mean(1).flatten()
    found = find_scales(magnitudes, x.T @ x / len(x), [consumer(layer)], same, spread)
    expected = brute_force(x, [layer], spread, shared=4)
    assert found.scales.shape == (32,)
    assert found.alpha == min(expected, key=lambda alpha: expected[alpha]) > 0
    assert found.loss == pytest.approx(expected[found.alpha], rel=1e-4)


def test_what_is_stored_is_what_counts() -> None:
    """Where storing spoils all scales, none is better than some."""
    x, layer = inputs(300, 128, (5, 70)), consumer(weights(64, 128, 1))
    spoilt = torch.logspace(-3, 3, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    found = find_scales(x.abs().mean(0), x.T @ x / len(x), [layer], lambda _: spoilt, same)
    assert found.alpha == 0
    assert torch.equal(found.scales, torch.ones(128))
    assert found.loss == found.before


def test_scales_are_those_of_the_paper() -> None:
    a = torch.tensor([0.5, 2.0, 8.0])
    s = a.double().sqrt()
    torch.testing.assert_close(candidate(a, 0.5), (s / (s[0] * s[2]).sqrt()).float())
    torch.testing.assert_close(candidate(1e-6 * a, 0.5), candidate(a, 0.5))
    assert tuple(number / 20 for number in range(20)) == GRID


def test_an_input_that_is_never_there_does_not_decide() -> None:
    assert torch.equal(candidate(torch.zeros(4), 0.5), torch.ones(4))
    found = candidate(torch.tensor([0.0, 1.0, 2.0, 1.0]), 0.9)
    assert bool(found.isfinite().all())
    assert found[2] / found[1] == pytest.approx(2**0.9)


@pytest.mark.parametrize("quant", ["nf4", "awq", "w8a16"])
def test_rounding_is_that_of_the_output(quant: str) -> None:
    """To what storing and loading leave of nearest rounding."""
    encoder = consumer(weights(72, 128, 5), quant).encoder
    target, grid = weights(72, 128, 5), encoder.grid
    assert grid is not None
    found = nearest(target, encoder)
    scales = encoder.effective_scales(target.view(-1, grid.block).abs().amax(1) / getattr(grid, "reach", 1.0))
    values = torch.tensor(sorted(grid.decode(torch.arange(256 if "8" in quant else 16, dtype=torch.uint8))))
    near = (target.view(-1, grid.block, 1) / scales.view(-1, 1, 1) - values).abs().amin(-1)
    distance = (target - found).view(-1, grid.block).abs() / scales.view(-1, 1)
    torch.testing.assert_close(distance, near, rtol=0, atol=2e-3)  # the type that a loader hands out
    assert output_size(Consumer(target, encoder), torch.eye(128)) == pytest.approx(
        float(target.square().sum())
    )
