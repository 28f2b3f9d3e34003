"""BOFT: diag(s) W Mᵀ with M orthogonal, a product of butterfly factors (Liu et al. 2023, arXiv 2311.06243), as
`peft/tuners/boft/layer.py` has it:

    M = M_N-1 … M_0,   M_k = P_k diag(R_k) P_kᵀ,   R = (I - S)(I + S)⁻¹ of each block, S = (D - Dᵀ)/2

P_k, a permutation, takes blocks of size·2ᵏ inputs apart in halves of `size`: the even ones come first, then the odd
ones. P_0 changes nothing. PEFT uses one factor alone where it cannot compile its CUDA kernel, whatever the config says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parameter, Parts, State, Update, WholeWeight
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig, Neutral
from streamconv.adapters.method import Method
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>boft_[Rs])")
# Columns that are turned at a time: a cell's memory has no room for another of its size.
_STRETCH = 4096
# Rows of a whole weight that are turned together.
_ROWS = 64
# Entries of the blocks that are transformed together, or those of one.
_BLOCK_ENTRIES = 1 << 18
# float64 matrices alive at once while blocks are transformed: S, two sums, the result, a solver's own.
_COPIES = 6


@dataclass(frozen=True, slots=True)
class BoftUpdate(ByRows):
    """Parts `boft_R` [factors, blocks, size, size] and `boft_s` [out, 1]; the weight is [out, in]."""

    parameter: str
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        return _held_bytes(self.parts["boft_R"].shape)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return _prepared(parts, device)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` turned and scaled, in place."""
        return _turn(cell, prepared).mul_(prepared["scales"][rows.start : rows.stop])

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts, constants)


@dataclass(frozen=True, slots=True)
class WholeBoftUpdate(WholeWeight):
    """BOFT of a convolution, kernels flattened: `boft_s` is [1, out]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        """The weight, what some rows of it are turned in, and the blocks."""
        some = 3 * _ROWS * math.prod(self.shape[1:])
        return 4 * (math.prod(self.shape) + some) + _held_bytes(self.parts["boft_R"].shape)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return _prepared(parts, device)

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        """The turned and scaled weight."""
        rows = whole.view(self.shape[0], -1)
        for first in range(0, len(rows), _ROWS):
            _turn(rows[first : first + _ROWS], prepared)
        return rows.mul_(prepared["scales"]).view(whole.shape)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts, constants)


def _prepared(parts: Parts, device: torch.device) -> Parts:
    """R of all blocks [factors, blocks, size, size], the places that columns of a strip are taken from before each
    factor and after the last, [factors + 1, strip], and scales [out, 1].
    """
    raw = parts["boft_R"]
    factors, blocks, size, _ = raw.shape
    found = torch.empty_like(raw)
    flat, out = raw.flatten(0, 1), found.flatten(0, 1)
    step = _blocks_at_once(size)
    for first in range(0, len(flat), step):
        out[first : first + step] = _rotations(flat[first : first + step])
    places = _places(factors, _strip(factors, blocks, size), size)
    scales = parts["boft_s"].reshape(-1, 1)
    return {"blocks": found, "places": places.to(device), "scales": scales}


def _strip(factors: int, blocks: int, size: int) -> int:
    """Columns that are turned together: no factor takes one farther than the blocks of the last."""
    farthest = size << (factors - 1)
    return min(blocks * size, farthest * max(1, _STRETCH // farthest))


def _rotations(raw: Tensor) -> Tensor:
    """The Cayley transform of the skew-symmetric part of each, float64."""
    skew = raw.double()
    skew = (skew - skew.mT) / 2
    one = torch.eye(raw.shape[-1], dtype=torch.float64, device=raw.device)
    # I + S is never singular; `solve` would have a GPU waited for to find that out.
    found: Tensor = torch.linalg.solve_ex(one + skew, one - skew, left=False).result
    return found


def _places(factors: int, columns: int, size: int) -> Tensor:
    """Row k: where the columns before factor k are taken from, of those after the factor before it; last: after all."""
    found = torch.empty(factors + 1, columns, dtype=torch.long)
    last = torch.arange(columns)
    for number in range(factors):
        order = _butterfly(columns, size << number, size // 2) if number else torch.arange(columns)
        found[number] = last[torch.argsort(order)]
        last = order
    found[factors] = last
    return found


def _butterfly(columns: int, block: int, half: int) -> Tensor:
    """Columns in the order that P has them: in each block the even halves, then the odd ones."""
    halves = torch.arange(columns).view(-1, block // (2 * half), 2, half)
    return halves.transpose(1, 2).reshape(-1)


def _turn(rows: Tensor, prepared: Parts) -> Tensor:
    """`rows` [n, in] times Mᵀ, in place, a strip of columns at a time, or of some rows where a strip is wide."""
    places = prepared["places"]
    width = places.shape[1]
    height = max(1, len(rows) * _STRETCH // width) if width > _STRETCH else len(rows)
    for first in range(0, rows.shape[1], width):
        for top in range(0, len(rows), height):
            some = rows[top : top + height, first : first + width]
            some.copy_(_turned(some.T.contiguous(), first, prepared).T)
    return rows


def _turned(columns: Tensor, first: int, prepared: Parts) -> Tensor:
    """M times `columns` [strip, n], which are those of a weight from `first` on, one below the other."""
    blocks, places = prepared["blocks"], prepared["places"][:, : len(columns)]
    factors, _, size, _ = blocks.shape
    own = slice(first // size, (first + len(columns)) // size)
    for number in range(factors):
        if number:
            columns = columns.index_select(0, places[number])
        columns = torch.bmm(blocks[number, own], columns.view(-1, size, columns.shape[1])).view(columns.shape)
    return columns if factors == 1 else columns.index_select(0, places[factors])


def _blocks_at_once(size: int) -> int:
    return max(1, _BLOCK_ENTRIES // size**2)


def _held_bytes(shape: Shape) -> int:
    """Bytes of all blocks, of those that are being transformed, and of the places, here and on the device."""
    factors, blocks, size, _ = shape
    transformed = 8 * _COPIES * min(factors * blocks, _blocks_at_once(size)) * size**2
    places = 2 * 8 * (factors + 4) * _strip(factors, blocks, size)
    return 4 * math.prod(shape) + transformed + places


def _is_neutral(parts: Mapping[str, StoredTensor], constants: Mapping[str, float]) -> bool:
    """Blocks of one value have no skew-symmetric part."""
    return parts["boft_R"].name in constants and constants.get(parts["boft_s"].name) == 1


# -- reading -------------------------------------------------------------------------------------------------------


def read_boft(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a BOFT adapter. Raises AdapterError where tensors are missing or do not fit."""
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts, source, base) for module, parts in modules)


def _update(module: str, parts: Mapping[str, StoredTensor], source: Source, base: BaseParameters) -> Update:
    check_roles(module, parts, ("boft_R", "boft_s"))
    blocks, scales = parts["boft_R"], parts["boft_s"]
    parameter = base.get(f"{module}.weight", blocks.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    is_conv = len(shape) == 4 and shape[2] == shape[3]
    expected = (1, shape[0]) if is_conv else (shape[0], 1) if len(shape) == 2 else None
    if scales.shape != expected:
        raise _misfit(scales, parameter)
    _check_blocks(blocks, parameter, math.prod(shape[1:]))
    _check_size(source.config, blocks, math.prod(shape[1:]))
    found = MappingProxyType(dict(parts))
    return WholeBoftUpdate(parameter.name, shape, found) if is_conv else BoftUpdate(parameter.name, found)


def _check_blocks(blocks: StoredTensor, parameter: Parameter, inputs: int) -> None:
    """Raise AdapterError unless the factors have a place for each input, and butterflies for halves of their blocks."""
    if len(blocks.shape) != 4 or 0 in blocks.shape:
        raise _misfit(blocks, parameter)
    factors, count, size, other = blocks.shape
    fits = size == other and count * size == inputs
    if not fits or (factors > 1 and (size % 2 or factors > 32 or count % (1 << (factors - 1)))):
        raise _misfit(blocks, parameter)


def _check_size(config: AdapterConfig, blocks: StoredTensor, inputs: int) -> None:
    """Raise AdapterError where the config gives another size or number of blocks."""
    size, count = config.fields.get("boft_block_size"), config.fields.get("boft_block_num")
    asked: Sequence[object] = (size or blocks.shape[2], count or blocks.shape[1])
    if asked != (blocks.shape[2], blocks.shape[1]):
        raise AdapterError(
            f"{blocks.name} has {blocks.shape[1]} blocks of {blocks.shape[2]} rows for {inputs} inputs, but"
            f" {config.name} has boft_block_size {size} and boft_block_num {count}; config and tensors are not of one"
            " adapter"
        )


def _misfit(tensor: StoredTensor, parameter: Parameter) -> AdapterError:
    return AdapterError(
        f"{tensor.name} has shape {list(tensor.shape)}, which does not fit {parameter.name} of the base,"
        f" {list(parameter.shape)}; expected boft_R [factors, blocks, n, n] with n·blocks inputs, and in boft_s a"
        " number for each output; was the adapter trained on this base?"
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del fields
    shapes = {tensor.shape for name, tensor in tensors.items() if name.endswith("boft_R")}
    return {
        "block_size": sorted({shape[-1] for shape in shapes if shape}),
        "factors": sorted({shape[0] for shape in shapes if shape}),
    }


BOFT = Method(
    label="BOFT",
    multiplies=True,
    read=read_boft,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "boft_block_size": USED,
            "boft_block_num": USED,
            # How many factors there are shows in the tensors, and PEFT may have trained fewer.
            "boft_n_butterfly_factor": NO_EFFECT,
            "fan_in_fan_out": Neutral("PEFT trains BOFT of nn.Linear and Conv2d only, which need it off"),
            "bias": Neutral("expected none, all or boft_only", ("none", "all", "boft_only")),
            "boft_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"boft_\w+",
    neutral="a rotation by nothing (all boft_R are symmetric, and all boft_s one)",
    formula="diag(s) W Mᵀ, M a product of butterfly factors",
    layers=("Linear", "convolutions"),
    facts=_facts,
)
