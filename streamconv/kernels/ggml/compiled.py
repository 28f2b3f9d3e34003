"""The kernels of ggml's types compiled by numba: tensors in, loops over their super-blocks, the same bits as in torch.

What is done once a super-block is left to torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from streamconv.kernels.ggml import decode_loops, fit_loops, pack_loops, scale_loops
from streamconv.kernels.ggml.decoding import (
    FP4_VALUES,
    IQ4_VALUES,
    powers_of_two,
    small_floats,
    ternary_digits,
)
from streamconv.kernels.ggml.fitting import MARGIN, Tries, fit, starting_scales
from streamconv.kernels.ggml.in_torch import TorchBlockKernels
from streamconv.kernels.ggml.iq_grids import IQ_TYPES, iq_grid
from streamconv.kernels.ggml.packing import CODES_AT, centre, codes_of, pack_scales, unpack_scales
from streamconv.kernels.ggml.scales import joined, split
from streamconv.kernels.ggml.types import BlockType, Codes

Array = fit_loops.Array
_TORCH = TorchBlockKernels()
_NO_INTEGERS = torch.empty(0, dtype=torch.int16)


@functools.cache
def _halves() -> Array:
    """The float32 value of every 16-bit float."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _table(name: str) -> Array:
    """Lookup table of a type, as its loop wants it; of types without one, nothing."""
    return iq_grid(name).numpy() if name in IQ_TYPES else _own_table(name)


@functools.cache
def _own_table(name: str) -> Array:
    fp4, iq4 = (torch.tensor(each, dtype=torch.float32) for each in (FP4_VALUES, IQ4_VALUES))
    tables = {
        "mxfp4": torch.cat((powers_of_two(), fp4)),
        "nvfp4": torch.cat((small_floats(), fp4)),
        "iq4_nl": iq4,
        "iq4_xs": iq4,
        "tq1_0": ternary_digits(),
    }
    # A loop is compiled for one number of axes: tq1_0 alone looks up in two.
    return tables[name].numpy() if name in tables else np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class CompiledBlockKernels:
    """See BlockKernels."""

    name: str = "compiled"

    def decode(self, kind: BlockType, raw: Tensor, out: Tensor) -> None:
        loop = decode_loops.LOOPS.get(kind.name)
        if loop is None:  # floats of 16 and 32 bits
            _TORCH.decode(kind, raw, out)
        else:
            loop(raw.numpy(), _halves(), _table(kind.name), out.numpy())

    def unpack(self, kind: BlockType, raw: Tensor, codes: Tensor) -> Tensor:
        place, shift = CODES_AT[kind.name], np.uint8(-centre(kind))
        pack_loops.UNPACK[kind.name](raw.numpy(), shift, place, codes.numpy())
        return unpack_scales(kind, raw)

    def pack(self, kind: BlockType, codes: Tensor, scales: Tensor, raw: Tensor) -> None:
        known = codes_of(kind)
        if known.is_nested:
            pack_scales(kind, *split(kind, scales, _nested), raw)
        else:
            pack_scales(kind, _halves_of(scales).view(len(raw), -1), _NO_INTEGERS, raw)
        self.pack_codes(kind, codes, raw)

    def pack_codes(self, kind: BlockType, codes: Tensor, raw: Tensor) -> None:
        place, shift = CODES_AT[kind.name], np.uint8(-centre(kind))
        pack_loops.PACK[kind.name](codes.numpy(), shift, place, raw.numpy())

    def stored(self, kind: BlockType, scales: Tensor) -> Tensor:
        if not codes_of(kind).is_nested:
            return _halves_of(scales)
        return joined(kind, *split(kind, scales, _nested))

    def nearest(self, kind: BlockType, values: Tensor, scales: Tensor, codes: Tensor) -> None:
        known = codes_of(kind)
        loop = pack_loops.nearest_above if known.has_offset else pack_loops.nearest
        loop(_blocks(kind, values), scales.numpy(), *_limits(known), _blocks(kind, codes))

    def starting_scales(self, kind: BlockType, values: Tensor) -> Tensor:
        known = codes_of(kind)
        if known.is_nested:
            return self.stored(kind, starting_scales(kind, values, _ranges))
        low, high = _ranges(values.reshape(-1, kind.block))
        out = torch.empty(len(low), 2) if known.has_offset else torch.empty(len(low))
        divisor = np.float32(known.highest if known.has_offset else known.peak)
        given = low.numpy(), high.numpy(), divisor, known.has_offset
        scale_loops.plain_start(*given, out.numpy().reshape(-1))
        return self.stored(kind, out)

    def fit(self, kind: BlockType, values: Tensor, weights: Tensor | None) -> Tensor:
        return fit(kind, values, weights, _CompiledSearches(), _nested)


@dataclass(frozen=True, slots=True)
class _CompiledSearches:
    """See Searches."""

    def affine(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        out = torch.empty(len(values), 2)
        tried = np.array([*peaks, *(codes.highest - less for less in tries.below)], np.float32)
        shares = np.array([0.0] * len(peaks) + [less / codes.highest for less in tries.below], np.float32)
        margins = np.array([0.0] * len(peaks) + [MARGIN] * len(tries.below), np.float32)
        given = values.numpy(), _weights(weights), tried, shares, margins
        fit_loops.search_affine(*given, tries.refits, np.float32(codes.highest), codes.is_nested, out.numpy())
        return out

    def symmetric(
        self, values: Tensor, weights: Tensor | None, peaks: list[float], tries: Tries, codes: Codes
    ) -> Tensor:
        out = torch.empty(len(values))
        given = values.numpy(), _weights(weights), np.array(peaks, np.float32)
        fit_loops.search_symmetric(*given, tries.refits, *_limits(codes), out.numpy())
        return out

    def pairs(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        given = values.numpy(), _weights(weights), units.numpy(), np.array(tries.steps, np.float32)
        fit_loops.try_pairs(*given, np.float32(codes.highest), start.numpy())
        return start

    def integers(
        self, values: Tensor, weights: Tensor | None, units: Tensor, start: Tensor, tries: Tries, codes: Codes
    ) -> Tensor:
        given = values.numpy(), _weights(weights), units.numpy(), np.array(tries.steps, np.float32)
        fit_loops.try_integers(*given, _limits(codes), start.numpy())
        return start

    def scales(self, values: Tensor, weights: Tensor | None, trials: Tensor, codes: Codes) -> Tensor:
        out = torch.empty(len(values))
        fit_loops.try_scales(values.numpy(), _weights(weights), trials.numpy(), _limits(codes), out.numpy())
        return out


def _ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (torch.empty(len(values)) for _ in range(2))
    scale_loops.ranges(values.numpy().view(np.int32), low.numpy().view(np.int32), high.numpy().view(np.int32))
    return low, high


def _halves_of(scales: Tensor) -> Tensor:
    found = torch.empty(scales.shape)
    scale_loops.halves(scales.numpy().reshape(-1), found.numpy().reshape(-1))
    return found


def _nested(wished: Tensor, limit: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    factors, integers = torch.empty(len(wished)), torch.empty(wished.shape, dtype=torch.int16)
    scale_loops.nested(wished.contiguous().numpy(), limit, is_signed, factors.numpy(), integers.numpy())
    return factors, integers


def _weights(weights: Tensor | None) -> Array:
    return np.empty((0, 0), np.float32) if weights is None else weights.numpy()


def _limits(codes: Codes) -> tuple[Any, Any]:
    return np.float32(codes.lowest), np.float32(codes.highest)


def _blocks(kind: BlockType, tensor: Tensor) -> Array:
    return tensor.numpy().reshape(-1, kind.block)


def load() -> CompiledBlockKernels | None:
    """The kernels; None where numba was told not to compile (its switch, NUMBA_DISABLE_JIT)."""
    return None if numba.config.DISABLE_JIT else CompiledBlockKernels()
