"""MXFP4 experts of gpt-oss (`gpt_oss/torch/weights.py`; transformers `integrations/mxfp4.py`), read and kept.

    P_blocks   uint8 [experts, out, in/32, 16], the first of two codes of a row in the low half
    P_scales   uint8 [experts, out, in/32], biased exponents of two

The parameter P is [experts, in, out], so that a block is 32 rows of one column. The grid has 32 rows for one, whose
columns follow each other in blocks as `grid.order` says; of its scales, a row has as many as the parameter has columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import F32, U8, Dtype
from streamconv.errors import CheckpointError, InputError
from streamconv.formats.base import (
    CELL_ROWS,
    Constant,
    Json,
    Marks,
    Weight,
    any_config,
    check_tensor,
    parts_of,
    wrong,
)
from streamconv.formats.bits import unpacked_bits
from streamconv.formats.dense import largest_dtype
from streamconv.formats.fp4 import Fp4Decoder
from streamconv.formats.fp4_scales import MXFP4_GRID, Mxfp4Scales
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = MXFP4_GRID.block
_EXPONENTS = Mxfp4Scales()
NAME = "gpt-oss"


@functools.lru_cache(maxsize=8)
def grid_of(outputs: int) -> TableGrid:
    """Grid of parameters with so many columns: 32 rows of each column are a block."""
    places = torch.arange(_GROUP * outputs, dtype=torch.int32).view(_GROUP, outputs).T.contiguous()
    return dataclasses.replace(MXFP4_GRID, order=places.numpy().tobytes())


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
        packed = raw.view(len(lines), self.line_bytes)
        for expert, outputs, place in self._experts(lines):
            rows, stored = self._rows(form, expert), packed[place]
            alone, pairs = _in_pairs(outputs)
            column = slice(pairs.start // 2, pairs.stop // 2)
            even, odd = (
                stored[pairs.start - outputs.start + half : pairs.stop - outputs.start : 2] for half in (0, 1)
            )
            for half, codes in enumerate(_exchanged(even, odd)):
                rows[half::2, column] = codes.T
            for output in alone:
                codes, is_odd = unpacked_bits(stored[output - outputs.start], 4, self.inputs), output % 2
                kept = rows[:, output // 2] & (0x0F if is_odd else 0xF0)
                rows[:, output // 2] = kept | (codes << 4 if is_odd else codes)

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        packed = out.view(len(lines), self.line_bytes)
        for expert, outputs, place in self._experts(lines):
            rows, into = self._rows(form, expert), packed[place]
            alone, pairs = _in_pairs(outputs)
            column = slice(pairs.start // 2, pairs.stop // 2)
            for half, codes in enumerate(_exchanged(rows[0::2, column], rows[1::2, column])):
                into[pairs.start - outputs.start + half : pairs.stop - outputs.start : 2] = codes.T
            for output in alone:
                codes = rows[:, output // 2] >> (output % 2 * 4) & 0x0F
                into[output - outputs.start] = codes[0::2] | codes[1::2] << 4

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


def _in_pairs(outputs: range) -> tuple[list[int], range]:
    """Outputs whose other of a byte is not among them, at the ends; and those between, whole bytes of a row."""
    pairs = range(outputs.start + outputs.start % 2, outputs.stop - outputs.stop % 2)
    return [output for output in {outputs[0], outputs[-1]} if output not in pairs], pairs


def _exchanged(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the low halves of two tensors, and of their high halves; those of the first are the low ones."""
    return first & 0x0F | second << 4, first >> 4 | second & 0xF0


@dataclass(frozen=True, slots=True)
class ExpertsDecoder:
    """Decoder of experts in row form: an exponent is that of 32 rows, of one output each."""

    name: str
    outputs: int
    dtype: Dtype
    order: ExpertsTurned
    main: str = _BLOCKS

    @property
    def grid(self) -> TableGrid:
        return grid_of(self.outputs)

    def row_offset(self, row: int) -> int:
        return row * self.outputs // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder: of 32 rows after the other, [rows of blocks, outputs], flat."""
        scales = _EXPONENTS.effective(side[_SCALES].permute(0, 2, 1).reshape(-1))
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{self.name}{_SCALES}: a stored scale is NaN or infinite; the checkpoint is damaged, download it again"
            )
        return scales

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        codes = torch.empty(len(rows) * self.outputs, dtype=torch.uint8, device=raw.device)
        kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
        return codes

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals transformers' convert_moe_packed_tensors bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.outputs)
        # By rows, as they lie: values are in units of 8, and the product with a power of two is exact.
        out.view(-1).copy_(self.grid.decode_pairs(raw, low_first=True).view(-1))
        out.view(-1, _GROUP, self.outputs).mul_(scales.view(-1, 1, self.outputs))
        return out if self.dtype == F32 else out.copy_(out.to(self.dtype.torch))


@dataclass(frozen=True, slots=True)
class ExpertsEncoder:
    """Encoder of a parameter [experts, in, out] in the layout of its file."""

    name: str
    shape: Shape
    dtype: Dtype
    format: str = NAME
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    constants: tuple[Constant, ...] = ()

    @property
    def grid(self) -> TableGrid:
        return grid_of(self.shape[2])

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def order(self) -> ExpertsTurned:
        experts, inputs, outputs = self.shape
        return ExpertsTurned(experts, outputs, inputs)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        experts, inputs, outputs = self.shape
        scales = (experts, outputs, inputs // _GROUP)
        return (
            TensorSpec(self.name + _BLOCKS, U8, (*scales, _GROUP // 2)),
            TensorSpec(self.name + _SCALES, U8, scales),
        )

    def row_offset(self, row: int) -> int:
        return row * self.shape[2] // 2

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        kernels_for(values.device).pack_pairs(values, out, low_first=True)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return _EXPONENTS.effective(_EXPONENTS.stored(scales))

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            found = kept[_SCALES]
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            if not bool(scales.isfinite().all()):
                raise InputError(f"{self.name} holds NaN or infinity, which MXFP4 cannot store")
            experts, inputs, outputs = self.shape
            found = _EXPONENTS.stored(scales).view(experts, inputs // _GROUP, outputs).permute(0, 2, 1)
        return (found.cpu().contiguous().view(-1).numpy().tobytes(),)


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
    rows = ExpertRowsDecoder(name, _BLOCKS, inputs, _EXPONENTS, weight.dtype, order, outputs=outputs)
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
    shape = experts, groups * _GROUP, outputs
    dtype = largest_dtype(free, but=_SCALES)
    decoder = ExpertsDecoder(name, outputs, dtype, ExpertsTurned(experts, outputs, groups * _GROUP))
    return Weight(name, shape, dtype, NAME, decoder, parts, ExpertsEncoder(name, shape, dtype))


_LEFT_IN_16_BIT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
_MARKS = Marks(
    owned=("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"),
    methods=MappingProxyType({"mxfp4": any_config}),
)


@dataclass(frozen=True, slots=True)
class GptOssFormat:
    """Experts in MXFP4 as gpt-oss has them, which a base keeps."""

    name: str = NAME
    grid: TableGrid = MXFP4_GRID
    bits_per_weight: float = 4 + 8 / _GROUP
    layout: str = "gpt-oss's, experts as 4-bit floats (E2M1) in blocks of 32 with powers of two"
    loaders: str = "transformers, vLLM"
    library: None = None
    load_in: None = None
    skips_by_path: bool = True
    # All in one tensor; nothing takes these apart.
    expert_loaders: tuple[str, ...] = ("transformers", "vLLM")
    config_copy: None = None
    marks: Marks = _MARKS

    def fits(self, name: str, shape: Shape) -> bool:
        """Nothing: it is not written but where a base has it."""
        del name, shape
        return False

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Parameters stored as blocks."""
        del quantization
        return [
            _find_weight(name.removesuffix(_BLOCKS), free)
            for name in free
            if name.endswith(f"_proj{_BLOCKS}")
        ]

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> ExpertsEncoder:
        """See Format."""
        return ExpertsEncoder(name, shape, dtype)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format. What it leaves in 16 bit is named as in the config of openai/gpt-oss-20b."""
        del dtype, quantized, skipped
        return {"modules_to_not_convert": list(_LEFT_IN_16_BIT), "quant_method": "mxfp4"}
