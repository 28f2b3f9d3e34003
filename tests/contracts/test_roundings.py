"""What every entry of ROUNDINGS promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamconv.kernels.grids import NF4
from streamconv.rounding import ROUNDINGS, Context, uniform
from streamconv.rounding.adaptive import Adaptive
from tests.formats.stored import choose, normal

# Those that choose by cells. The others are given whole weights (tests/rounding/test_feedback.py), or are one of these
# as soon as a weight's first rows are there (tests/rounding/test_adaptive.py).
every_rounding = pytest.mark.parametrize(
    "name",
    [name for name, row in ROUNDINGS.items() if not row.calibrated and not isinstance(row, Adaptive)],
)


def context(
    count: int, codes: Tensor | None = None, scales: Tensor | None = None, base: Tensor | None = None
) -> Context:
    return Context(codes, scales, base, uniform(0, "w", range(1), count, torch.empty(count)))


def test_names_are_keys() -> None:
    assert {key: entry.name for key, entry in ROUNDINGS.items()} == {key: key for key in ROUNDINGS}


@every_rounding
@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_there_is_a_code_for_every_element_and_a_scale_for_every_block(name: str, count: int) -> None:
    target = normal((count,))
    codes, scales = choose(ROUNDINGS[name], target, NF4, context(count))
    assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
    assert (scales.dtype, scales.shape) == (torch.float32, (-(-count // 64),))
    values = NF4.decode(codes) * scales.repeat_interleave(64)[:count]
    step = 0.31 * scales.repeat_interleave(64)[:count]  # the widest of the grid
    assert bool(((values - target).abs() <= step).all())


@every_rounding
def test_what_lies_on_the_grid_stays(name: str) -> None:
    codes = torch.randint(0, 16, (128,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.3, 7e-5])
    target = NF4.decode(codes) * scales.repeat_interleave(64)
    chosen, kept = choose(ROUNDINGS[name], target, NF4, context(128, codes, scales, target))
    assert torch.equal(chosen, codes)
    assert torch.equal(kept, scales)


@every_rounding
def test_cells_equal_the_whole(name: str) -> None:
    target = normal((330,))
    whole = context(330)
    assert whole.noise is not None
    codes, scales = choose(ROUNDINGS[name], target, NF4, whole)
    first = choose(ROUNDINGS[name], target[:128], NF4, Context(None, None, None, whole.noise[:128]))
    second = choose(ROUNDINGS[name], target[128:], NF4, Context(None, None, None, whole.noise[128:]))
    assert torch.equal(torch.cat((first[0], second[0])), codes)
    assert torch.equal(torch.cat((first[1], second[1])), scales)


@pytest.mark.gpu
@every_rounding
def test_the_gpu_chooses_the_same(name: str) -> None:
    target = normal((3330,))
    whole = context(3330)
    assert whole.noise is not None
    on_gpu = Context(None, None, None, whole.noise.cuda())
    expected = choose(ROUNDINGS[name], target, NF4, whole)
    found = choose(ROUNDINGS[name], target.cuda(), NF4, on_gpu)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
