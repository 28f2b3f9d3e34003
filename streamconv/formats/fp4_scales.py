"""Scales of 4-bit float (E2M1) blocks, as NVFP4 and MXFP4 files hold them, and what they do to the codes' values.

NVFP4: blocks of 16, each with a scale in E4M3, and a float32 scale for the weight: 448 · 6 / its greatest magnitude,
which divides (compressed-tensors `quantization/utils/helpers.py`, generate_gparam and calculate_qparams), or the
inverse, which multiplies (ModelOpt). MXFP4: blocks of 32, each with a power of two, whose biased exponent is stored
(E8M0, OCP Microscaling specification v1.0).

Effective scales are of the grid E2M1, which is in units of 8: a power of two times what an element is multiplied by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from streamconv.checkpoint.types import Shape
from streamconv.dtypes import DTYPES, U8, Dtype
from streamconv.kernels.grids import E2M1, E2M1_UNIT, TableGrid

# Of a normal distribution many a block does better with its greatest magnitude at 4, half a step below the end, than at
# 6: error of a search 26 % below that of nearest rounding with these, and 18 % without. Powers of two are far apart.
NVFP4_GRID = replace(E2M1, scale_ratios=(1.375, 1.5, 1.625))
MXFP4_GRID = replace(E2M1.of_block(32), scale_ratios=(1 / 2, 1.0, 2.0))
DIVISOR, FACTOR = "weight_global_scale", "weight_scale_2"
# E4M3: its greatest number, its least, and that which a block of zeros has for a scale.
_GREATEST, _LEAST, _OF_ZEROS = 448.0, 0x01, 0x20
_REACH = np.float32(_GREATEST * 6)
# Numbers up to half a step beyond the greatest of E4M3 would be rounded to it.
_ROUNDED_TO_GREATEST = (_GREATEST + 16) / _GREATEST
_BIAS, _NOT_A_NUMBER = 127, 255


class BlockScales(Protocol):
    """Storage of the scales of one weight's blocks. Plain data."""

    @property
    def grid(self) -> TableGrid: ...

    @property
    def dtype(self) -> Dtype:
        """Type that a block's scale is stored in."""

    @property
    def whole(self) -> tuple[str, Shape] | None:
        """Role and shape of the float32 scale over the whole weight; None where there is none."""

    @property
    def is_known(self) -> bool:
        """Whether the scale over the whole weight is known, if there is one."""

    def knowing(self, greatest: float) -> Self:
        """The same for a weight of that greatest magnitude."""

    def following(self, other: BlockScales) -> Self:
        """The same with the scale over the whole weight that `other`, of this kind, has."""

    def raised(self, greatest: float) -> Self:
        """The same with a scale over the whole weight that a magnitude `greatest` is not far beyond."""

    def stored(self, scales: Tensor) -> Tensor:
        """Scales (float32, effective ones or others) as they are stored, of `dtype`; NaN for what is not finite."""

    def effective(self, stored: Tensor) -> Tensor:
        """Effective scales, float32, of stored ones."""

    def whole_bytes(self) -> tuple[bytes, ...]:
        """Content of the scale over the whole weight, if there is one."""


@dataclass(frozen=True, slots=True)
class Nvfp4Scales:
    """E4M3, and a float32 scale over the whole weight, `value`, which multiplies or divides; None: not known yet."""

    value: float | None = None
    multiplies: bool = False
    shape: Shape = (1,)

    @property
    def grid(self) -> TableGrid:
        return NVFP4_GRID

    @property
    def dtype(self) -> Dtype:
        return DTYPES["F8_E4M3"]

    @property
    def whole(self) -> tuple[str, Shape]:
        return FACTOR if self.multiplies else DIVISOR, self.shape

    @property
    def is_known(self) -> bool:
        return self.value is not None

    def knowing(self, greatest: float) -> Self:
        """See BlockScales. A product with the reciprocal; 1 where that is infinite, as compressed-tensors has it."""
        with np.errstate(over="ignore"):
            divisor = float(_REACH * (np.float32(1) / max(np.float32(greatest), np.finfo(np.float32).tiny)))
        divisor = divisor if np.isfinite(divisor) else 1.0
        value = float(np.float32(1) / np.float32(divisor)) if self.multiplies else divisor
        return replace(self, value=value)

    def following(self, other: BlockScales) -> Self:
        assert isinstance(other, Nvfp4Scales)
        if other.multiplies == self.multiplies or other.value is None:
            return replace(self, value=other.value)
        return replace(self, value=float(np.float32(1) / np.float32(other.value)))

    def raised(self, greatest: float) -> Self:
        """See BlockScales. By a power of two, which leaves the values of partners that share the scale what they are.

        Stored scales of their blocks are divided by it without being rounded, but for subnormal ones. (Made anew for
        the greatest magnitude, the scale would move them all by up to 2⁻⁴.) Measured on the FAQ model and its heavy
        adapter, merged 1, 2, 4, 8 and 16 times, its greatest magnitude is 1.1, 1.4, 2.1, 3.6 and 6.5 times that of the
        base: cutting blocks at the base's scale has 1.00, 1.001, 1.04, 2.5 and 14 times the squared error of this, and
        a scale made anew between 0.999 and 1.003 of it. So nothing is raised before a block's scale would be rounded
        to more than the greatest of E4M3.
        """
        if self.value is None:
            return self
        reach = float(_REACH) * self.value if self.multiplies else float(_REACH) / self.value
        if greatest <= reach * _ROUNDED_TO_GREATEST:
            return self
        factor = 2.0 ** math.ceil(math.log2(greatest / reach))
        value = self.value * factor if self.multiplies else self.value / factor
        return replace(self, value=value)

    def stored(self, scales: Tensor) -> Tensor:
        """See BlockScales. A block that is not all 0 keeps a scale above 0."""
        whole, local = self._whole(scales), scales / E2M1_UNIT
        local = local.div_(whole) if self.multiplies else local.mul_(whole)
        found = local.clamp(-_GREATEST, _GREATEST).to(self.dtype.torch)
        bits = found.view(torch.uint8)
        smallest = (local == 0).to(torch.uint8).mul_(_OF_ZEROS - _LEAST).add_(_LEAST)
        return torch.where(bits & 0x7F == 0, smallest, bits).view(self.dtype.torch)

    def effective(self, stored: Tensor) -> Tensor:
        whole, local = self._whole(stored), stored.float()
        local = local.mul_(whole) if self.multiplies else local.div_(whole)
        return local.mul_(E2M1_UNIT)

    def whole_bytes(self) -> tuple[bytes, ...]:
        assert self.value is not None, "the scale over the whole weight is not known"
        return (np.array(self.value, "<f4").tobytes(),)

    def _whole(self, like: Tensor) -> Tensor:
        """The scale over the whole weight as a tensor: CUDA would multiply by the reciprocal of a number.

        Filled in, not copied, which a GPU would have to be waited for.
        """
        assert self.value is not None, "the scale over the whole weight is not known"
        return torch.full((1,), self.value, dtype=torch.float32, device=like.device)


@dataclass(frozen=True, slots=True)
class Mxfp4Scales:
    """Biased exponents of two."""

    @property
    def grid(self) -> TableGrid:
        return MXFP4_GRID

    @property
    def dtype(self) -> Dtype:
        return U8

    @property
    def whole(self) -> None:
        return None

    @property
    def is_known(self) -> bool:
        return True

    def knowing(self, greatest: float) -> Self:
        del greatest
        return self

    def following(self, other: BlockScales) -> Self:
        del other
        return self

    def raised(self, greatest: float) -> Self:
        del greatest
        return self

    def stored(self, scales: Tensor) -> Tensor:
        """See BlockScales. From 3.5 times a power of two on, a magnitude is better off with the next one up to 7 times.

        That is compressed-tensors' rule (`quantization/utils/mxfp_utils.py`, round_to_power_2).
        """
        greatest = scales.mul(self.grid.reach).abs_().contiguous()
        field = greatest.view(torch.int32).add(1 << 21).bitwise_right_shift_(23)
        exponents = field.sub_(2).clamp_(0, _NOT_A_NUMBER - 1).to(torch.uint8)
        return exponents.masked_fill_(~greatest.isfinite(), _NOT_A_NUMBER)

    def effective(self, stored: Tensor) -> Tensor:
        bits = stored.to(torch.int32).bitwise_left_shift_(23)
        bits.masked_fill_(stored == 0, 1 << 22)  # 2⁻¹²⁷ is no normal number
        bits.masked_fill_(stored == _NOT_A_NUMBER, 0x7FC00000)
        return bits.view(torch.float32).mul_(E2M1_UNIT)

    def whole_bytes(self) -> tuple[bytes, ...]:
        return ()
