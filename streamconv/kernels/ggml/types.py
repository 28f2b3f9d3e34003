"""Block types of ggml: how many elements share a scale, how many bytes hold them, which codes there are.

Source: ggml `ggml-common.h`, the `block_*` structures, and `ggml.h`, `enum ggml_type`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes that we write: integers from `lowest` to `highest`, as 8-bit two's complement.

    A code c of a block with scale s and offset o stands for s * c + o, each operation rounded to float32. Without
    `has_offset`, o is 0. Stored are scales as 16-bit floats, or as integers up to `scale_limit` in magnitude that one
    16-bit float a super-block multiplies; offsets likewise. A sign is stored with the scale of a super-block alone if
    `has_offset`, with each block's own otherwise.

    `peak` is the code that the element of greatest magnitude gets by the plainest rule; without offset and with one
    more code below 0 than above, it is the lowest.
    """

    lowest: int
    highest: int
    has_offset: bool = False
    scale_limit: int = 0

    @property
    def peak(self) -> int:
        return self.highest if self.has_offset or self.highest >= -self.lowest else self.lowest

    @property
    def is_nested(self) -> bool:
        """Whether scales are integers that a 16-bit float a super-block multiplies."""
        return self.scale_limit > 0


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's types. `block` elements share a scale; `super_block` elements are stored in `bytes`.

    `number` is that of `enum ggml_type`. A row is a whole number of super-blocks. `codes` is None for what is read
    only.
    """

    name: str
    number: int
    block: int
    super_block: int
    bytes: int
    codes: Codes | None = None

    @property
    def bits(self) -> float:
        """Bits an element, scales included."""
        return 8 * self.bytes / self.super_block

    @property
    def blocks(self) -> int:
        """Blocks of a super-block."""
        return self.super_block // self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements, a whole number of super-blocks."""
        return columns // self.super_block * self.bytes


_SUPER = 256
_ALL = (
    BlockType("f32", 0, 1, 1, 4),
    BlockType("f16", 1, 1, 1, 2),
    BlockType("q4_0", 2, 32, 32, 18, Codes(-8, 7)),
    BlockType("q4_1", 3, 32, 32, 20, Codes(0, 15, has_offset=True)),
    BlockType("q5_0", 6, 32, 32, 22, Codes(-16, 15)),
    BlockType("q5_1", 7, 32, 32, 24, Codes(0, 31, has_offset=True)),
    # -128 is readable, but ggml's own quantizer never writes it.
    BlockType("q8_0", 8, 32, 32, 34, Codes(-127, 127)),
    BlockType("q2_k", 10, 16, _SUPER, 84),
    BlockType("q3_k", 11, 16, _SUPER, 110),
    BlockType("q4_k", 12, 32, _SUPER, 144, Codes(0, 15, has_offset=True, scale_limit=63)),
    BlockType("q5_k", 13, 32, _SUPER, 176, Codes(0, 31, has_offset=True, scale_limit=63)),
    BlockType("q6_k", 14, 16, _SUPER, 210, Codes(-32, 31, scale_limit=128)),
    BlockType("iq2_xxs", 16, 32, _SUPER, 66),
    BlockType("iq2_xs", 17, 16, _SUPER, 74),
    BlockType("iq3_xxs", 18, 32, _SUPER, 98),
    BlockType("iq1_s", 19, 32, _SUPER, 50),
    BlockType("iq4_nl", 20, 32, 32, 18),
    BlockType("iq3_s", 21, 32, _SUPER, 110),
    BlockType("iq2_s", 22, 16, _SUPER, 82),
    BlockType("iq4_xs", 23, 32, _SUPER, 136),
    BlockType("iq1_m", 29, 16, _SUPER, 56),
    BlockType("bf16", 30, 1, 1, 2),
    BlockType("tq1_0", 34, _SUPER, _SUPER, 54),
    BlockType("tq2_0", 35, _SUPER, _SUPER, 66),
    BlockType("mxfp4", 39, 32, 32, 17),
    BlockType("nvfp4", 40, 16, 64, 36),
)
BLOCK_TYPES: Mapping[str, BlockType] = {each.name: each for each in _ALL}
BY_NUMBER: Mapping[int, BlockType] = {each.number: each for each in _ALL}
