"""Checks of the kernels in Triton against the torch ones, run in a process in which Triton interprets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from streamconv.dtypes import BF16, F16, F32, Dtype
from streamconv.formats.nested_scales import DYNAMIC
from streamconv.kernels import TORCH, Kernels, Start
from streamconv.kernels.grids import (
    E2M1,
    E4M3,
    FP4,
    INT4,
    INT8,
    INT8_GROUPS,
    NF4,
    Grid,
    TableGrid,
    empty_scales,
)
from streamconv.kernels.in_triton import TritonKernels

GRIDS: Mapping[str, Grid] = {
    "nf4": NF4,
    "fp4": FP4,
    "int8": INT8.of_width(96),
    "int8 of a power": INT8.of_width(32),
    "dynamic": DYNAMIC.of_block(32),
    "int4": INT4.of_block(32),
    "int4 of rows": INT4.of_block(96),
    "int8 in groups": INT8_GROUPS.of_block(32),
    "e2m1": E2M1,
    "e4m3": E4M3.of_block(96),
    "e4m3 of more than a launch folds": E4M3.of_block(150),
    "other": TableGrid("other", (0.25, 1.0, -1.0), 4),
}
# Numbers that arithmetic treats in its own way: zeros, subnormal ones, the least and greatest, infinite, none.
ODD = (0.0, -0.0, 1e-40, -1e-45, 1.1754944e-38, 3.4028234e38, -3.4028234e38, 1e-38)
WILD = (float("inf"), float("-inf"), float("nan"))


def values_of(count: int, seed: int, odd: tuple[float, ...] = ()) -> Tensor:
    """Normal numbers with `odd` ones among them, the first 40 zeros (whole blocks of some grids)."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
    values[:40] = 0
    for place, number in enumerate(odd):
        values[(41 + 13 * place) % count] = number
    return values


def check(name: str, values: Tensor) -> None:
    """Every method gives the same for `values` on the grid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of infinite and undefined results
        same(lambda kernels: _round(kernels, GRIDS[name], values))


def check_search(name: str, values: Tensor) -> None:
    weights = values.abs() * 7 + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(lambda kernels: _search(kernels, GRIDS[name], values, weights))


def check_rest(count: int) -> None:
    """The methods that know of no grid but nf4: noise, pairs, distances."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # numpy's, of integers that wrap around as they should
        same(lambda kernels: _rest(kernels, count))


def check_columns(name: str, is_first: bool) -> None:
    """A panel settled, with each of the types that a loader makes; more rows than a program takes."""
    for dtype in (F32, BF16, F16):
        same(lambda kernels: _settle(kernels, GRIDS[name], dtype, is_first))  # noqa: B023  called at once


def same(call: Callable[[Kernels], dict[str, Tensor]]) -> None:
    """Both kernels give the same bits; of a NaN, that it is one."""
    ours, theirs = call(TritonKernels()), call(TORCH)
    for name, other in theirs.items():
        assert bits(ours[name]) == bits(other), name


def bits(tensor: Tensor) -> list[int]:
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def _round(kernels: Kernels, grid: Grid, values: Tensor) -> dict[str, Tensor]:
    count, found = values.numel(), dict[str, Tensor]()

    def codes(name: str) -> Tensor:
        return found.setdefault(name, torch.empty(count, dtype=torch.uint8))

    starting = found["starting"] = empty_scales(count, grid, values.device)
    kernels.starting_scales(values, grid, starting)
    found["scales"] = kernels.nearest(values, grid, None, codes("nearest"))
    given = starting * torch.linspace(-1.2, 1.2, len(starting))
    kernels.nearest(values, grid, given, codes("nearest with scales"))
    noise = torch.rand(count, generator=torch.Generator().manual_seed(5))
    found["scales, stochastic"] = kernels.stochastic(values, grid, None, None, noise, codes("stochastic"))
    for dtype in (F32, BF16, F16):
        out = found[dtype.name] = torch.empty(count)
        kernels.decode(found["nearest"], grid, starting, dtype, out)
    start = Start(found["nearest"], found[BF16.name])
    moved = values + (noise - 0.5) * (noise > 0.5) * 0.002
    kernels.stochastic(moved, grid, given, start, noise, codes("stochastic from codes on"))
    inner = found["inner"] = torch.empty(len(starting))
    found["sums"] = kernels.kept(found["stochastic"], grid, values, found[BF16.name], found[F32.name], inner)
    return found


def _search(kernels: Kernels, grid: Grid, values: Tensor, weights: Tensor) -> dict[str, Tensor]:
    plain, weighed = (empty_scales(values.numel(), grid, values.device) for _ in range(2))
    kernels.search(values, grid, plain)
    kernels.search(values, grid, weighed, weights)
    return {"search": plain, "weighed": weighed}


def _rest(kernels: Kernels, count: int) -> dict[str, Tensor]:
    noise, more = torch.empty(count), torch.empty(count)
    kernels.uniform(-(1 << 63) + 12345, 0, noise)
    kernels.uniform((1 << 62) + 99, 2**33 + 7, more)
    codes = (noise * 16).to(torch.uint8)
    found = {"noise": noise, "noise further on": more, "distance": kernels.distance(noise, more, 50)}
    for low_first in (False, True):
        packed = found[f"packed {low_first}"] = torch.empty(count // 2, dtype=torch.uint8)
        kernels.pack_pairs(codes[: count // 2 * 2], packed, low_first=low_first)
        back = found[f"unpacked {low_first}"] = torch.empty(count // 2 * 2 - 1, dtype=torch.uint8)
        kernels.unpack_pairs(packed, back, low_first=low_first)
        out = found[f"decoded {low_first}"] = torch.empty(count // 2 * 2 - 1)
        scales = noise[: -(-len(out) // NF4.block)]
        kernels.decode_pairs(packed, NF4, scales, BF16, out, low_first=low_first)
    return found


def _settle(kernels: Kernels, grid: Grid, dtype: Dtype, is_first: bool) -> dict[str, Tensor]:
    columns, rows = 5, 131
    generator = torch.Generator().manual_seed(3)
    target, pull, left = (torch.randn(columns, rows, generator=generator) for _ in range(3))
    scales = target.abs().amax(0).expand(columns, rows) * torch.linspace(-1.1, 1.1, rows)
    coupling = torch.randn(columns, columns, generator=generator) / 9
    codes = torch.randint(0, 3, (columns, rows), generator=generator).to(torch.uint8)
    pull, errors = pull / 9, left / 99
    kernels.quantize_columns(
        target, pull, coupling, None, grid, scales.contiguous(), dtype, codes, errors, is_first
    )
    return {"codes": codes, "errors": errors, "pull": pull}
