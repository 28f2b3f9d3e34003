"""MXFP4 experts of gpt-oss (`gpt_oss/torch/weights.py`; transformers `integrations/mxfp4.py`), for reading.

    P_blocks   uint8 [experts, out, in/32, 16], the first of two codes of a row in the low half
    P_scales   uint8 [experts, out, in/32], biased exponents of two

The parameter P is [experts, in, out]; the rows of one expert's codes, [out, in], are blocks of MXFP4 as others have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32, U8, Dtype
from streamconv.formats.base import Marks, Weight, any_config, check_tensor, parts_of, wrong
from streamconv.formats.bits import unpacked_bits
from streamconv.formats.dense import largest_dtype
from streamconv.formats.fp4 import Fp4Decoder
from streamconv.formats.fp4_scales import Mxfp4Scales
from streamconv.kernels.grids import DecodedGrid

EXPERTS_FORMAT = "mxfp4 of gpt-oss"
"""Format of such weights in words."""

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
# Values of the 4-bit float of the OCP Microscaling specification (v1.0, table 5), by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class ExpertsTurned:
    """Line e · out + o of a file holds the codes of all inputs for output o of expert e.

    In row form, row e · in + i has those of all outputs, the first of two in the low half.
    """

    experts: int
    outputs: int
    inputs: int

    @property
    def lines(self) -> int:
        return self.experts * self.outputs

    @property
    def line_bytes(self) -> int:
        return self.inputs // 2

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        codes = unpacked_bits(raw, 4, 2 * raw.numel()).view(len(lines), self.inputs)
        for expert, outputs, place in self._experts(lines):
            rows, of_expert = self._rows(form, expert), codes[place]
            low, high = (torch.arange(first, outputs.stop, 2) for first in _firsts(outputs))
            rows[:, low // 2] = (rows[:, low // 2] & 0xF0) | of_expert[low - outputs.start].T
            rows[:, high // 2] = (rows[:, high // 2] & 0x0F) | of_expert[high - outputs.start].T << 4

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        packed = out.view(len(lines), self.line_bytes)
        for expert, outputs, place in self._experts(lines):
            numbers = torch.arange(outputs.start, outputs.stop)
            shifts = (numbers % 2 * 4).to(torch.uint8)
            codes = (self._rows(form, expert)[:, numbers // 2] >> shifts & 0x0F).T
            packed[place] = codes[:, 0::2] | codes[:, 1::2] << 4

    def _rows(self, form: Tensor, expert: int) -> Tensor:
        """The rows of an expert, [in, out / 2]."""
        return form.view(self.experts, self.inputs, self.outputs // 2)[expert]

    def _experts(self, lines: range) -> Iterator[tuple[int, range, slice]]:
        """Expert, its outputs, and their places among `lines`, for every expert that has some."""
        start = lines.start
        while start < lines.stop:
            expert, first = divmod(start, self.outputs)
            stop = min(lines.stop, (expert + 1) * self.outputs)
            outputs = range(first, first + stop - start)
            yield expert, outputs, slice(start - lines.start, stop - lines.start)
            start = stop


def _firsts(outputs: range) -> tuple[int, int]:
    """The first even and the first odd number from the start on."""
    start = outputs.start
    return (start, start + 1) if start % 2 == 0 else (start + 1, start)


@dataclass(frozen=True, slots=True)
class ExpertsDecoder:
    """Decoder of experts in row form: an exponent is that of 32 rows, of one output each."""

    name: str
    outputs: int
    dtype: Dtype
    order: ExpertsTurned
    main: str = _BLOCKS

    @property
    def grid(self) -> DecodedGrid:
        """Grid of a block as wide as a row: then the scales of a cell follow each other."""
        return DecodedGrid("e2m1", _GROUP * self.outputs)

    def row_offset(self, row: int) -> int:
        return row * self.outputs // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """Exponents as they are stored, [rows of blocks, outputs]."""
        return side[_SCALES].permute(0, 2, 1).reshape(-1, self.outputs)

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise AssertionError(f"{self.name}: codes of {rows} mean something with their scales only")

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. An exponent of 255 is NaN."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.outputs)
        table, codes = torch.tensor(_E2M1, device=raw.device), unpacked_bits(raw, 4, out.numel())
        torch.index_select(table, 0, codes.to(torch.int32), out=out.view(-1))
        factors = torch.exp2(scales.float() - 127).masked_fill(scales == 255, torch.nan)
        first = rows.start // _GROUP
        numbers = torch.arange(rows.start, rows.stop, device=out.device) // _GROUP - first
        out.mul_(factors.index_select(0, numbers))
        return out if self.dtype == F32 else out.copy_(out.to(self.dtype.torch))


@dataclass(frozen=True, slots=True)
class ChosenLines:
    """Some lines of a file, which are rows: of gate and up, which have them in turns."""

    lines: int
    line_bytes: int
    chosen: range

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        start, stop, step = self.chosen.start, self.chosen.stop, self.chosen.step
        first = len(range(start, min(stop, lines.start), step))
        found = self.chosen[first : len(range(start, min(stop, lines.stop), step))]
        if found:
            whole = raw.view(len(lines), self.line_bytes)
            rows = form.view(len(self.chosen), self.line_bytes)
            rows[first : first + len(found)] = whole[
                found[0] - lines.start : found[-1] + 1 - lines.start : step
            ]

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        raise AssertionError("rows of one projection are not written alone")


@dataclass(frozen=True, slots=True)
class ExpertRowsDecoder(Fp4Decoder):
    """Decoder of `outputs` of one expert as rows, [outputs, in]."""

    outputs: range = range(0)

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        stored = side[_SCALES].view(-1, self.columns // _GROUP)
        chosen = stored[self.outputs.start : self.outputs.stop : self.outputs.step]
        return self.block_scales.effective(chosen.reshape(-1))


def expert_rows(weight: Weight, name: str, expert: int, outputs: range) -> Weight | None:
    """The weight `name`, [outputs, in], of one expert of `weight`; None where that is not stored in these blocks."""
    decoder = weight.decoder
    if not isinstance(decoder, ExpertsDecoder):
        return None
    inputs, total = decoder.order.inputs, decoder.outputs
    order = None if len(outputs) == total else ChosenLines(total, inputs // 2, outputs)
    rows = ExpertRowsDecoder(name, _BLOCKS, inputs, Mxfp4Scales(), weight.dtype, order, outputs)
    parts = {role: part_of_expert(part, expert) for role, part in weight.parts.items()}
    return Weight(name, (len(outputs), inputs), weight.dtype, weight.format, rows, parts)


def part_of_expert(part: StoredTensor, expert: int) -> StoredTensor:
    """One expert's share of a part, whose first axis they are and stay: [1, ...]."""
    nbytes = part.nbytes // part.shape[0]
    return replace(part, shape=(1, *part.shape[1:]), offset=part.offset + expert * nbytes)


def _find_weight(name: str, free: Mapping[str, StoredTensor]) -> Weight:
    parts = parts_of(name, {role: name + role for role in (_BLOCKS, _SCALES)}, free)
    main = parts[_BLOCKS]
    if len(main.shape) != 4 or main.dtype != U8 or main.shape[3] != _GROUP // 2 or main.shape[1] % 2:
        raise wrong(main, f"U8 [experts, outputs, groups, {_GROUP // 2}]")
    experts, outputs, groups, _ = main.shape
    check_tensor(parts[_SCALES], ("U8",), ((experts, outputs, groups),))
    inputs = groups * _GROUP
    dtype = largest_dtype(free, but=_SCALES)
    decoder = ExpertsDecoder(name, outputs, dtype, ExpertsTurned(experts, outputs, inputs))
    return Weight(name, (experts, inputs, outputs), dtype, EXPERTS_FORMAT, decoder, parts)


_MARKS = Marks(
    owned=("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"),
    methods=MappingProxyType({"mxfp4": any_config}),
)


@dataclass(frozen=True, slots=True)
class GptOssReader:
    """Reader of MXFP4 experts."""

    marks: Marks = _MARKS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Parameters stored as blocks."""
        del quantization
        return [
            _find_weight(name.removesuffix(_BLOCKS), free)
            for name in free
            if name.endswith(f"_proj{_BLOCKS}")
        ]
