"""Double quantization of 4-bit storage: a weight's scales as codes of 8 bits, with scales and a mean of their own.

Source: bitsandbytes `functional.py`, quantize_4bit with compress_statistics, and create_dynamic_map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid, block_absmax, multiply_by_scales

NESTED_BLOCK = 256
_MEAN_CHUNK = 1 << 16
# Scales that a device takes at once, so that what it needs beside them does not grow with the weight: whole blocks.
_STRETCH = 1 << 20


def dynamic_values() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (Dettmers 2015, arXiv 1511.04561), as create_dynamic_map computes it."""
    magnitudes: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes += (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return tuple(sorted([*magnitudes, *(-value for value in magnitudes), 0.0, 1.0]))


DYNAMIC = TableGrid("dynamic", dynamic_values(), NESTED_BLOCK)


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """Scales as double quantization stores them: `indices` uint8, one a block; the rest float32."""

    indices: Tensor
    absmax: Tensor
    table: Tensor
    offset: float

    def effective(self) -> Tensor:
        """Scales that a loader makes of them, operation for operation (dequantize_4bit): float32, one a block."""
        values = self.table.index_select(0, self.indices.to(torch.int32))
        scales = multiply_by_scales(values, self.absmax, NESTED_BLOCK, out=values)
        return scales.add_(torch.tensor(self.offset, dtype=torch.float32))


def nest(scales: Tensor) -> NestedScales:
    """Double-quantize `scales` (float32, one a block), on the device where they are, with the bits of a CPU.

    Indices are the nearest of the table. bitsandbytes' own CPU kernel misses that now and then by a place.
    """
    kernels, count = kernels_for(scales.device), scales.numel()
    offset = nested_mean(scales)
    absmax = torch.empty(-(-count // NESTED_BLOCK), dtype=torch.float32, device=scales.device)
    indices = torch.empty(count, dtype=torch.uint8, device=scales.device)
    for start in range(0, count, _STRETCH):
        centred = scales[start : start + _STRETCH] - torch.tensor(offset, dtype=torch.float32)
        greatest = absmax[start // NESTED_BLOCK : -(-(start + len(centred)) // NESTED_BLOCK)]
        greatest.copy_(block_absmax(centred, NESTED_BLOCK))
        kernels.nearest(centred, DYNAMIC, greatest, indices[start : start + len(centred)])
    return NestedScales(indices, absmax, DYNAMIC.tables(scales.device).values, offset)


def nested_mean(scales: Tensor) -> float:
    """Mean of `scales` (float32, flat): summed in float64 in index order, so that it is the same everywhere; a float32.

    A device that adds in another order says between which bounds that sum is, and is nearly always sure of the float32.
    """
    if not scales.is_cpu and (mean := _sure_mean(scales)) is not None:
        return mean
    total = torch.zeros(1, dtype=torch.float64)
    for start in range(0, scales.numel(), _MEAN_CHUNK):
        total = torch.cat((total, scales[start : start + _MEAN_CHUNK].cpu().double())).cumsum(0)[-1:]
    return (total / scales.numel()).float().item()


def _sure_mean(scales: Tensor) -> float | None:
    """The float32 nearest to the mean of a sum in whatever order; None where that depends on the order.

    The error of a sum of n numbers is at most (n - 1) u Σ|x|, u = 2⁻⁵³ (Higham 2002, "Accuracy and Stability of
    Numerical Algorithms", §4.2); 4 n u covers that of two orders, of Σ|x| itself, and of the division.
    """
    count = scales.numel()
    sums = torch.zeros(2, dtype=torch.float64, device=scales.device)
    for start in range(0, count, _STRETCH):
        stretch = scales[start : start + _STRETCH].double()
        sums += torch.stack((stretch.sum(), stretch.abs_().sum()))
    total, magnitude = sums.tolist()
    error = 4 * count * 2.0**-53 * magnitude
    low, high = (
        torch.tensor((total + each) / count, dtype=torch.float64).float() for each in (-error, error)
    )
    return float(low) if bool(low == high) else None


# -- reading -----------------------------------------------------------------------------------------------
