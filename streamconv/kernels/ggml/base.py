"""Interface of the kernels of ggml's types."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from streamconv.kernels.ggml.types import BlockType


class BlockKernels(Protocol):
    """Decoding and encoding of super-blocks. All implementations give the same bits.

    Tensors are contiguous, on one device. `raw` is uint8 [n, bytes], as rows lie in a file, which are whole
    super-blocks. Codes are uint8 [n, super_block] in two's complement, values float32 of the same shape. Scales are
    float32 [n * blocks], or [n * blocks, 2] with offsets, as a loader has them: a code c stands for s * c + o, each
    operation rounded. What is written to was allocated by the caller.
    """

    @property
    def name(self) -> str:
        """Name that plans and reports call it by."""

    def decode(self, kind: BlockType, raw: Tensor, out: Tensor) -> None:
        """Write the values of super-blocks of any type; UnsupportedError if a lookup table is not to be had."""

    def unpack(self, kind: BlockType, raw: Tensor, codes: Tensor) -> Tensor:
        """Write the codes of super-blocks; return their scales."""

    def pack(self, kind: BlockType, codes: Tensor, scales: Tensor, raw: Tensor) -> None:
        """Write super-blocks of codes and scales; these are ones that `stored` gives."""

    def pack_codes(self, kind: BlockType, codes: Tensor, raw: Tensor) -> None:
        """Write codes into super-blocks whose scales stay as they are."""

    def stored(self, kind: BlockType, scales: Tensor) -> Tensor:
        """Scales that can be stored, nearest to finite ones wished for; of those that can be, themselves.

        Only the sign of a zero may change. Nested scales of one super-block share a sign where the type has offsets,
        and so do these: what would need the other sign becomes 0.
        """

    def nearest(self, kind: BlockType, values: Tensor, scales: Tensor, codes: Tensor) -> None:
        """Write the codes nearest to (value - offset) * (1 / scale), halves to even; 0 where a scale is 0."""

    def starting_scales(self, kind: BlockType, values: Tensor) -> Tensor:
        """Scales of nearest rounding, as stored: each block's range, or greatest magnitude, on the last code."""

    def fit(self, kind: BlockType, values: Tensor, weights: Tensor | None) -> Tensor:
        """Scales with which nearest codes have the least squared error found, weighed by `weights`.

        These are not negative, and as many as the values, or as those of one row, for rows that are weighed alike.
        """
