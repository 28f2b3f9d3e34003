"""Experts of gpt-oss as GGUF files have them, [experts, out, in], gate and up apart: read as transformers' parameters.

    mlp.experts.gate_up_proj        [experts, in, 2 · inner]: columns 0, 2, ... are gate's, 1, 3, ... up's
    mlp.experts.gate_up_proj_bias   [experts, 2 · inner], alike
    mlp.experts.down_proj           [experts, inner, in]

A block is then 32 rows of one column. gate is the main part, up a side part that is held whole beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import GGML_NUMBERS, GGML_TYPES, U8, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Weight
from streamconv.formats.dense import MAIN, DenseDecoder
from streamconv.formats.ggml_blocks import OF_GGUF, gguf_weight
from streamconv.formats.gpt_oss import part_of_expert
from streamconv.kernels.ggml import BY_NUMBER, BlockType, block_kernels_for
from streamconv.kernels.grids import DecodedGrid

UP = "up"
"""Role of the side part."""
_GROUP = 32


@dataclass(frozen=True, slots=True)
class GroupsTurned:
    """Order of groups of 32 inputs: in a file those of an output follow each other, in row form those of all outputs.

    Line e · outputs + o has the groups of output o of expert e, of `group_bytes` each.
    """

    experts: int
    outputs: int
    groups: int
    group_bytes: int

    @property
    def lines(self) -> int:
        return self.experts * self.outputs

    @property
    def line_bytes(self) -> int:
        return self.groups * self.group_bytes

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        rows = form.view(self.experts, self.groups, self.outputs, self.group_bytes)
        stored = raw.view(len(lines), self.groups, self.group_bytes)
        start = lines.start
        while start < lines.stop:
            expert, first = divmod(start, self.outputs)
            stop = min(lines.stop, (expert + 1) * self.outputs)
            part = stored[start - lines.start : stop - lines.start]
            rows[expert, :, first : first + stop - start] = part.transpose(0, 1)
            start = stop

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        raise AssertionError("experts are written one by one")


@dataclass(frozen=True, slots=True)
class ExpertGroupsDecoder:
    """Decoder of a parameter [experts, in, outputs], or of two whose columns take turns; `kinds` are their types."""

    kinds: tuple[BlockType, ...]
    experts: int
    inputs: int
    outputs: int
    main: str = MAIN

    @property
    def order(self) -> GroupsTurned:
        groups = self.inputs // _GROUP
        return GroupsTurned(self.experts, self.outputs, groups, self.kinds[0].row_bytes(_GROUP))

    @property
    def grid(self) -> DecodedGrid | None:
        """Grid of one block, as scales are all of a part; None for floats."""
        blocks = [kind.name for kind in self.kinds if kind.super_block > 1]
        count = self.experts * self.inputs * self.outputs * len(self.kinds)
        return DecodedGrid(blocks[0], count) if blocks else None

    def row_offset(self, row: int) -> int:
        return row // _GROUP * self.outputs * self.kinds[0].row_bytes(_GROUP)

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        """Bytes of the second one, [1, experts, outputs, groups, bytes]: not scales, but held like them."""
        return side[UP].unsqueeze(0) if UP in side else None

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        raise AssertionError(f"codes of {rows} ({len(raw)} bytes) mean something in their blocks")

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        count, stored = len(rows) // _GROUP, [raw]
        if scales is not None:
            numbers = torch.arange(rows.start // _GROUP, rows.stop // _GROUP, device=out.device)
            groups = self.inputs // _GROUP
            stored.append(scales[0, numbers // groups, :, numbers % groups])
        columns = out.view(count, _GROUP, self.outputs, len(self.kinds))
        for place, (kind, own) in enumerate(zip(self.kinds, stored, strict=True)):
            values = torch.empty(count, self.outputs, _GROUP, device=out.device)
            blocks = own.reshape(-1, kind.bytes)
            block_kernels_for(raw.device).decode(kind, blocks, values.view(-1, kind.super_block))
            columns[..., place] = values.transpose(1, 2)
        return out


@dataclass(frozen=True, slots=True)
class TurnsDecoder(DenseDecoder):
    """Decoder of rows whose even columns are the main part's, and whose odd ones a side part's."""

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """The side part, whole: not scales, but held as such are."""
        return side[UP].float()

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder."""
        assert scales is not None, "one of two parts is missing"
        out[:, 0::2] = raw.view(self.dtype.torch).view(len(rows), self.columns)
        out[:, 1::2] = scales[rows.start : rows.stop]
        return out


def experts_weight(name: str, tensor: StoredTensor, up: StoredTensor | None, dtype: Dtype) -> Weight:
    """The parameter `name` of that `dtype`, [experts, in, out], of one stored tensor, or of two with columns in turns.

    Raises UnsupportedError for a type that is not read so.
    """
    tensors = {MAIN: tensor} if up is None else {MAIN: tensor, UP: up}
    experts, outputs, inputs = tensor.shape
    kinds = tuple(map(_kind, tensors.values()))
    decoder = ExpertGroupsDecoder(kinds, experts, inputs, outputs)
    if up is not None:
        tensors[UP] = _in_bytes(up, kinds[1])
    grid = decoder.grid
    kind = f"{tensor.dtype.name}, experts apart" if grid is None else f"{grid.name}{OF_GGUF}"
    return Weight(name, (experts, inputs, len(kinds) * outputs), dtype, kind, decoder, tensors)


def _in_bytes(tensor: StoredTensor, kind: BlockType) -> StoredTensor:
    """The tensor as bytes of groups, [experts, outputs, groups, bytes]."""
    experts, outputs, inputs = tensor.shape
    return replace(tensor, dtype=U8, shape=(experts, outputs, inputs // _GROUP, kind.row_bytes(_GROUP)))


def _kind(tensor: StoredTensor) -> BlockType:
    kind = BY_NUMBER.get(GGML_NUMBERS[tensor.dtype.code])
    if kind is None or _GROUP % kind.super_block or tensor.shape[2] % _GROUP:
        raise UnsupportedError(
            f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected experts whose"
            f" rows are whole blocks of {_GROUP}, or floats; give the original model in safetensors as --base"
        )
    return kind


def biases_weight(name: str, tensor: StoredTensor, up: StoredTensor, dtype: Dtype) -> Weight:
    """The bias `name` of that `dtype`, [experts, 2 · out], whose columns are in turns those of two."""
    for each in (tensor, up):
        gguf_weight(each, dtype, None, 0.0)  # refuses what is no float
    decoder = TurnsDecoder(tensor.dtype, tensor.shape[1])
    shape = tensor.shape[0], 2 * tensor.shape[1]
    kind = f"{tensor.dtype.name}, gate and up apart"
    return Weight(name, shape, dtype, kind, decoder, {MAIN: tensor, UP: up})


def are_apart(weight: Weight) -> bool:
    """Whether it is stored as here."""
    return isinstance(weight.decoder, ExpertGroupsDecoder)


def expert_of(weight: Weight, name: str, expert: int, columns: range) -> Weight | None:
    """The weight `name`, [columns, in], of one expert; None where `weight` is not stored as here."""
    if not isinstance(weight.decoder, ExpertGroupsDecoder):
        return None
    is_up = len(weight.decoder.kinds) > 1 and columns.start == 1
    part = part_of_expert(weight.parts[UP if is_up else MAIN], expert)
    shape = weight.decoder.outputs, weight.decoder.inputs
    dtype = GGML_TYPES[weight.decoder.kinds[is_up].number]
    return gguf_weight(replace(part, name=name, dtype=dtype, shape=shape), weight.dtype, None, 0.0)
