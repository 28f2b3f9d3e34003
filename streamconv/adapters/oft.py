"""OFT: W Rᵀ with R orthogonal and block-diagonal (Qiu et al. 2023, arXiv 2306.07280), each block the Cayley transform
of a skew-symmetric Q, which is stored as its upper triangle, row by row (`peft/tuners/oft/layer.py`):

    exact      R = (I - Q)(I + Q)⁻¹
    Neumann    R = I + 2Q + 2Q² + … + 2Qᵏ⁻² + Qᵏ⁻¹      of k terms (Qiu et al. 2025, arXiv 2506.19847, §4.2)

The second is near (I + Q)(I - Q)⁻¹: to PEFT's adapters Q has another sign with either, and the config says which. COFT
scales a block's Q to a norm of eps/√blocks at most; a shared block stands for all. Inputs are rotated, so
an embedding's rows are as outputs are: E R, and `Conv1D`, stored [in, out], is R W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parameter, Parts, State, Update, WholeWeight
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig, Neutral
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>oft_R|oft_embedding_R)\.weight")
# PEFT up to 0.15.2: blocks of full matrices, and a scale.
_OLD = re.compile(r".+\.oft_[rs](\..+)?")
# Columns that are rotated at a time: a cell's memory has no room for the product of all.
_STRETCH = 4096
# Entries of the blocks that are transformed together, or those of one.
_ENTRIES = 1 << 18
# float64 matrices alive at once while blocks are transformed: Q, its indices, two powers, the result, a solver's own.
_COPIES = 8


@dataclass(frozen=True, slots=True)
class Cayley:
    """Q to R: `terms` of the Neumann series, None for the exact transform; `norm` that a block of Q may have."""

    terms: int | None
    norm: float | None

    def blocks(self, triangles: Tensor, size: int) -> Tensor:
        """R [blocks, size, size] in float64, of the upper triangles [blocks, size·(size - 1)/2]."""
        q = torch.zeros(len(triangles), size, size, dtype=torch.float64, device=triangles.device)
        q[:, *torch.triu_indices(size, size, 1, device=triangles.device)] = triangles.double()
        q -= q.mT.clone()
        if self.norm is not None:
            norms = torch.linalg.matrix_norm(q, keepdim=True)
            q = torch.where(norms <= self.norm, q, q * (self.norm / norms))
        one = torch.eye(size, dtype=torch.float64, device=q.device)
        if self.terms is None:
            # I + Q is never singular; `solve` would have a GPU waited for to find that out.
            exact: Tensor = torch.linalg.solve_ex(one + q, one - q, left=False).result
            return exact
        return _series(one, q, self.terms)


def _series(one: Tensor, q: Tensor, terms: int) -> Tensor:
    """Terms as PEFT counts them: three are as good as four."""
    found, power = one.expand_as(q).clone(), q
    if terms < 2:
        return found
    found.add_(q, alpha=2)
    if terms < 3:
        return found
    power = q @ q
    found.add_(power, alpha=2)
    for _ in range(3, terms - 1):
        power = power @ q
        found.add_(power, alpha=2)
    return found.add_(power @ q)


@dataclass(frozen=True, slots=True)
class OftUpdate(ByRows):
    """Part `triangles` [blocks, size·(size - 1)/2], one block for all if they are shared; rows of the weight are
    multiplied by Rᵀ, those of an embedding by R.
    """

    parameter: str
    parts: Mapping[str, StoredTensor]
    cayley: Cayley
    size: int
    is_embedding: bool

    @property
    def held_bytes(self) -> int:
        return _held_bytes(self.parts["triangles"], self.size)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The blocks that rows are multiplied by."""
        blocks = _rotations(self.cayley, parts["triangles"], self.size)
        return {"blocks": blocks if self.is_embedding else blocks.mT}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` rotated, some blocks of columns at a time, in place."""
        return _rotate(cell, prepared["blocks"])

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts["triangles"], constants, self.cayley)


@dataclass(frozen=True, slots=True)
class WholeOftUpdate(WholeWeight):
    """OFT of a weight whose rows are not those of outputs: [in, out] of Conv1D (`transposed`), or a 1 x 1 kernel."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    cayley: Cayley
    size: int
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """The weight, a copy of it while it is rotated, and the blocks."""
        return 2 * 4 * math.prod(self.shape) + _held_bytes(self.parts["triangles"], self.size)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return {"blocks": _rotations(self.cayley, parts["triangles"], self.size).mT}

    def changed(self, whole: Tensor, prepared: Parts) -> Tensor:
        """The rotated weight."""
        if self.transposed:
            return _rotate(whole.T.contiguous(), prepared["blocks"]).T
        return _rotate(whole.view(self.shape[0], -1), prepared["blocks"]).view(whole.shape)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return _is_neutral(self.parts["triangles"], constants, self.cayley)


def _rotate(rows: Tensor, blocks: Tensor) -> Tensor:
    """`rows` [n, in], each block of its columns times the block of `blocks` [blocks or 1, size, size], in place."""
    size = blocks.shape[-1]
    step = max(1, _STRETCH // size)
    for first in range(0, rows.shape[1] // size, step):
        some = rows[:, first * size : (first + step) * size].view(len(rows), -1, size).transpose(0, 1)
        some.copy_(some @ (blocks if len(blocks) == 1 else blocks[first : first + step]))
    return rows


def _rotations(cayley: Cayley, triangles: Tensor, size: int) -> Tensor:
    """R [blocks, size, size] in float32, made some blocks at a time."""
    found = triangles.new_empty(len(triangles), size, size)
    step = _blocks_at_once(size)
    for first in range(0, len(triangles), step):
        some = slice(first, first + step)
        found[some] = cayley.blocks(triangles[some], size)
    return found


def _blocks_at_once(size: int) -> int:
    return max(1, _ENTRIES // size**2)


def _held_bytes(triangles: StoredTensor, size: int) -> int:
    """Bytes of all blocks, and of those that are being transformed."""
    blocks = triangles.shape[0]
    return size**2 * (4 * blocks + 8 * _COPIES * min(blocks, _blocks_at_once(size)))


def _is_neutral(triangles: StoredTensor, constants: Mapping[str, float], cayley: Cayley) -> bool:
    return constants.get(triangles.name) == 0 or (cayley.terms is not None and cayley.terms < 2)


# -- reading -------------------------------------------------------------------------------------------------------


def read_oft(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of an OFT adapter.

    Raises AdapterError where tensors do not fit, UnsupportedError for what other versions of PEFT trained.
    """
    _check_version(source)
    modules = by_module(source, _KEY).items()
    return tuple(
        _update(module, role, tensor, source, base)
        for module, parts in modules
        for role, tensor in parts.items()
    )


def _check_version(source: Source) -> None:
    config = source.config
    old = next((tensor.name for key, tensor in source.tensors.items() if _OLD.fullmatch(key)), None)
    if old is not None or "oft_block_size" not in config.fields:
        found = f"holds {old}" if old else "has no oft_block_size"
        raise UnsupportedError(
            f"{config.name}: this OFT adapter {found}, as those of PEFT 0.15.2 and before, whose rotations are stored"
            " and applied in another way, which later versions of PEFT do not load either; merge it with that"
            " version, or train it anew"
        )
    version = str(config.fields.get("peft_version") or "")
    numbers = tuple(int(number) for number in re.findall(r"\d{1,9}", version)[:2])
    if config.flag("use_cayley_neumann") and numbers < (0, 18):
        raise UnsupportedError(
            f"{config.name}: this OFT adapter uses the Cayley-Neumann series of PEFT {version or 'before 0.18'},"
            " which was changed in 0.18: the same tensors mean other rotations since; merge it with PEFT 0.17,"
            " or train it anew"
        )


def _update(module: str, role: str, tensor: StoredTensor, source: Source, base: BaseParameters) -> Update:
    parameter = base.get(f"{module}.weight", tensor.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    is_embedding = role == "oft_embedding_R"
    size = _block_size(tensor)
    config = source.config
    count = None if config.flag("block_share") else tensor.shape[0] * size
    parts = MappingProxyType({"triangles": tensor})
    cayley = _cayley(config, tensor.shape[0])
    if len(shape) > 2:
        _check_kernel(tensor, parameter, shape)
        inputs, transposed = shape[1], False
    elif is_embedding and len(shape) == 2:
        inputs, transposed = shape[1], False
    else:
        found = is_transposed(parameter, shape, None, count, config, base)
        if found is None:
            raise _misfit(tensor, parameter)
        inputs, transposed = shape[0 if found else 1], found
    if inputs != (count or inputs) or inputs % size or (count is None and tensor.shape[0] != 1):
        raise _misfit(tensor, parameter)
    _check_size(config, tensor, inputs, size)
    if transposed or len(shape) > 2:
        return WholeOftUpdate(parameter.name, shape, parts, cayley, size, transposed)
    return OftUpdate(parameter.name, parts, cayley, size, is_embedding)


def _cayley(config: AdapterConfig, blocks: int) -> Cayley:
    if not isinstance(config.fields.get("use_cayley_neumann"), bool):
        raise AdapterError(
            f"{config.name}: use_cayley_neumann must be true or false, as it was in training: it decides what the"
            " tensors mean"
        )
    terms = config.rank("num_cayley_neumann_terms") if config.flag("use_cayley_neumann") else None
    norm = config.number("eps") / math.sqrt(blocks) if config.flag("coft") else None
    return Cayley(terms, norm)


def _block_size(tensor: StoredTensor) -> int:
    """Rows of a block, of which the tensor has the upper triangles."""
    entries = tensor.shape[1] if len(tensor.shape) == 2 else 0
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    if len(tensor.shape) != 2 or 0 in tensor.shape or size * (size - 1) // 2 != entries:
        raise AdapterError(
            f"{tensor.name} has shape {list(tensor.shape)}, expected [blocks, n·(n - 1)/2], the upper triangles of"
            " blocks of n rows"
        )
    return size


def _check_size(config: AdapterConfig, tensor: StoredTensor, inputs: int, size: int) -> None:
    """Raise AdapterError where the config gives another block size; PEFT changes one that does not divide `inputs`."""
    asked, blocks = config.fields.get("oft_block_size"), config.fields.get("r")
    if not asked and isinstance(blocks, int) and blocks > 0 and inputs % blocks == 0:
        asked = inputs // blocks
    if isinstance(asked, int) and 0 < asked <= inputs and inputs % asked == 0 and asked != size:
        raise AdapterError(
            f"{tensor.name} has blocks of {size} rows, but {config.name} gives {asked} (oft_block_size, or r); config"
            " and tensors are not of one adapter"
        )


def _check_kernel(tensor: StoredTensor, parameter: Parameter, shape: Shape) -> None:
    if len(shape) != 4:
        raise _misfit(tensor, parameter)
    if shape[2:] != (1, 1):
        raise UnsupportedError(
            f"{tensor.name} is for {parameter.name}, a convolution with a kernel of {shape[2]} x {shape[3]}: in"
            " training, PEFT adds up the rotated patches of an image where they overlap, so no merged weights are equal"
            " to it, and PEFT's own merge is another model; serve it unmerged, with PEFT"
        )


def _misfit(tensor: StoredTensor, parameter: Parameter) -> AdapterError:
    return AdapterError(
        f"{tensor.name} has shape {list(tensor.shape)}, which does not fit {parameter.name} of the base,"
        f" {list(parameter.shape)}; was the adapter trained on this base, and with this block_share?"
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    of_blocks = [tensor for name, tensor in tensors.items() if name.endswith("_R.weight")]
    return {
        "block_size": sorted({_block_size(tensor) for tensor in of_blocks}),
        "coft": bool(fields.get("coft")),
        "block_share": bool(fields.get("block_share")),
    }


OFT = Method(
    label="OFT",
    read=read_oft,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "oft_block_size": USED,
            "fan_in_fan_out": USED,
            "coft": USED,
            "eps": USED,
            "block_share": USED,
            "use_cayley_neumann": USED,
            "num_cayley_neumann_terms": USED,
            "bias": Neutral("expected none, all or oft_only", ("none", "all", "oft_only")),
            "module_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"oft_\w+",
    neutral="a rotation by nothing (all oft_R are zero)",
    formula="W Rᵀ, R orthogonal and block-diagonal",
    layers=("Linear", "Conv1D", "convolutions", "Embedding"),
    facts=_facts,
    multiplies=True,
    orients=True,
)
