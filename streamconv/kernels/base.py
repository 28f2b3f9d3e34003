"""Interface of kernels, and the order in which sums are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamconv.dtypes import Dtype
from streamconv.kernels.grids import Grid, TableGrid

# Scales tried in a search, in units of a block's starting scale; and how often the best one is then fitted.
SEARCH_FACTORS = tuple(step / 40 for step in range(22, 45))
SEARCH_STEPS = 3


@dataclass(frozen=True, slots=True)
class Start:
    """Start of an update: `codes`, and the `values` (float32) that it was added to.

    These differ by a loader's rounding to 16 bit. A target less `values` is the update, which the codes' own values
    are then moved by.
    """

    codes: Tensor
    values: Tensor


class Kernels(Protocol):
    """Loops over the elements of a cell. All implementations give the same bits.

    Tensors are flat and contiguous, on one device; codes and packed codes are uint8, everything else float32, with
    an entry an element or a block. What is written to was allocated by the caller; nothing else is changed.
    """

    @property
    def name(self) -> str:
        """Name that plans and reports call it by."""

    def starting_scales(self, values: Tensor, grid: Grid, out: Tensor) -> Tensor:
        """The scale of nearest rounding for every block of `values`, in `out`: its greatest magnitude, over the reach.

        It is what bitsandbytes stores, whose grids reach 1.
        """

    def ranges(self, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of every whole block, NaN both where one is NaN; no zero has a sign."""

    def nearest(self, values: Tensor, grid: Grid, scales: Tensor | None, codes: Tensor) -> Tensor:
        """Write the codes nearest to `values`; return the scales, the starting ones where None are given."""

    def search(self, values: Tensor, grid: Grid, scales: Tensor, weights: Tensor | None = None) -> None:
        """Write the scales with which nearest codes have the least squared error found, weighed by `weights`.

        Tried are the starting scale of a block, SEARCH_FACTORS of it, then, SEARCH_STEPS times, <t, v> / <v, v>
        with the values v that the best one's codes stand for.
        """

    def quantize_columns(
        self,
        target: Tensor,
        pull: Tensor,
        coupling: Tensor,
        rows: Tensor | None,
        grid: Grid,
        scales: Tensor,
        dtype: Dtype,
        codes: Tensor,
        errors: Tensor,
        is_first: bool,
    ) -> None:
        """Choose codes column by column, each nearest to its target plus the pull of other columns' errors.

        All are [columns, rows], with a scale an element, but for two: the change of a column's error times its row of
        `coupling` [columns, columns] is added to the pull of the columns after it. With `rows` [rows, rows], rows are
        settled one after the other: the change of a row's error times its row there is added to the change of all
        rows, itself included by the 1 on the diagonal; that is what then counts as the change of the column's error.

        Errors are those of what `dtype` can hold. A code stays unless another is strictly nearer, but where `is_first`
        says that there were none and `errors` are 0. `codes` and `errors` are written, `pull` is used up.
        """

    def add_product(self, sparse: Tensor, matrix: Tensor, out: Tensor) -> None:
        """Add `sparse` [columns, rows] times `matrix` [rows, width] to `out`, an entry that is not 0 at a time."""

    def stochastic(
        self,
        values: Tensor,
        grid: Grid,
        scales: Tensor | None,
        start: Start | None,
        noise: Tensor,
        codes: Tensor,
    ) -> Tensor:
        """Round as `nearest` does, but up or down as `noise` in [0, 1) has it; from `start` on, if it is given."""

    def uniform(self, key: int, first: int, out: Tensor) -> None:
        """Fill `out` with the numbers from place `first` on of the stream `key`; see `rounding/noise.py`."""

    def pack_pairs(self, codes: Tensor, out: Tensor, *, low_first: bool = False) -> None:
        """Write 4-bit codes, an even number, two a byte, the first one in its high or its low half."""

    def unpack_pairs(self, packed: Tensor, codes: Tensor, *, low_first: bool = False) -> None:
        """Undo `pack_pairs`; of the last byte only as much as `codes` has room for."""

    def take_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        """Write those `columns` (int32) of `matrix` [n, m] to `out` [n, columns]; of bytes or float32."""

    def put_columns(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        """Undo `take_columns` for all columns."""

    def unpack_bits(self, packed: Tensor, bits: int, codes: Tensor) -> None:
        """Write codes of 2, 3, 5 or 6 bits, one after the other from the lowest bit on, a multiple of eight."""

    def pack_bits(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """Undo `unpack_bits`."""

    def turn_words(self, words: Tensor, out: Tensor) -> None:
        """Write the transpose of `words` to `out`: int32 [n, m] and [m, n], of any strides."""

    def turn_codes(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        """Turn words of eight columns into words of eight rows: int32 [8 n, m] to [8 m, n], of any strides.

        Four bits are a code. Code i of word [r, c] is that of row r and column 8 c + i; it goes to row 8 c + i of
        `out`, word r // 8, as code p where `places[p]` is r % 8.
        """

    def turn_codes_back(self, words: Tensor, places: tuple[int, ...], out: Tensor) -> None:
        """Undo `turn_codes`: int32 [8 m, n] to [8 n, m]."""

    def decode(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        """Write what `codes` stand for, rounded to `dtype`, to `out`."""

    def decode_in_steps(self, codes: Tensor, grid: Grid, scales: Tensor, dtype: Dtype, out: Tensor) -> None:
        """Decode on a grid with offsets, codes from 0 on times the stored step, and that plus the offset, each rounded.

        The stored step is the grid's scale over the value of its code in the middle, counted from 0.
        """

    def decode_pairs(
        self,
        packed: Tensor,
        grid: TableGrid,
        scales: Tensor,
        dtype: Dtype,
        out: Tensor,
        *,
        low_first: bool = False,
    ) -> None:
        """Decode packed codes, as `decode` does others."""

    def distance(self, left: Tensor, right: Tensor, block: int) -> Tensor:
        """||`left` - `right`||², float64, summed as in `kept`."""

    def kept(
        self, codes: Tensor, grid: Grid, target: Tensor, base: Tensor, anchor: Tensor, inner: Tensor
    ) -> Tensor:
        """<`anchor`, D> and ||D||², float64 [2], of the update D = `target` - `base`.

        To `inner` goes <values of `codes`, D> of every block, in units of `scale / peak`. A block's products are summed
        in float32, blocks in float64, all by `pairwise_sum`.
        """


def pairwise_sum(terms: Tensor) -> Tensor:
    """Sums over the last axis of `terms`, which are used up: the upper half is added to the lower until one is left.

    With the order fixed, so are the bits, whatever the device and the width of its vectors. The error grows with
    the logarithm of the count.
    """
    count = terms.shape[-1]
    while count > 1:
        half = (count + 1) // 2
        terms[..., : count - half] += terms[..., half:count]
        count = half
    return terms[..., 0]


def block_dots(left: Tensor, right: Tensor, block: int) -> Tensor:
    """<`left`, `right`> of every block."""
    terms = left * right
    whole = terms.numel() - terms.numel() % block
    sums = pairwise_sum(terms[:whole].view(-1, block))
    return sums if whole == terms.numel() else torch.cat((sums, pairwise_sum(terms[whole:]).view(1)))
