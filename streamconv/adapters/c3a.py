"""C3A: W + Δ / in with Δ of circulant blocks (Chen et al. 2024, arXiv 2407.19342), as `peft/tuners/c3a/layer.py`
has it. Block m, n of Δ is n_b x n_b, made of a kernel w of n_b numbers:

    Δ[m·n_b + p, n·n_b + j] = w[m, n, (j - p) mod n_b]

Every row of a block is the one above it moved on by one, so it lies in two copies of w side by side: no block is made,
and no Fourier transform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.ranks import OwnPatterns, own_patterns
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>c3a_kernel)")
# Columns that are added at a time: a cell's memory has no room for all of their numbers once more.
_STRETCH = 4096


@dataclass(frozen=True, slots=True)
class C3aUpdate(ByRows):
    """Part `c3a_kernel` [out/n_b, in/n_b, n_b] of a weight [out, in]."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]

    @property
    def held_bytes(self) -> int:
        """Two copies of every kernel."""
        return 2 * 4 * math.prod(self.parts["c3a_kernel"].shape)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Kernels twice, side by side: [out/n_b, in/n_b, 2 n_b]."""
        kernels = parts["c3a_kernel"]
        return {"twice": torch.cat([kernels, kernels], dim=2)}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, in place."""
        twice = prepared["twice"]
        size = twice.shape[2] // 2
        step = max(1, _STRETCH // size)
        for block, first, place in _runs(rows, size):
            target = cell[place.start : place.stop].view(len(place), -1, size)
            for column in range(0, twice.shape[1], step):
                kernels = twice[block, column : column + step]
                # Rows from the last to the first, each of which begins one number further on.
                begin = kernels.storage_offset() + size - first - len(place) + 1
                upward = kernels.as_strided((len(place), len(kernels), size), (1, 2 * size, 1), begin)
                target[:, column : column + step].add_(upward.flip(0), alpha=1 / self.shape[1])
        return cell

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


def _runs(rows: range, size: int) -> Iterator[tuple[int, int, range]]:
    """Rows that are of one row of blocks: its number, that of the first of them in it, and their place among `rows`."""
    start = rows.start
    while start < rows.stop:
        block, first = divmod(start, size)
        stop = min(start - first + size, rows.stop)
        yield block, first, range(start - rows.start, stop - rows.start)
        start = stop


# -- reading -------------------------------------------------------------------------------------------------------


def read_c3a(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a C3A adapter. Raises AdapterError where tensors do not fit base or config."""
    modules = by_module(source, _KEY).items()
    sizes = own_patterns(source.config, "block_size_pattern")
    return tuple(_update(module, parts["c3a_kernel"], source, base, sizes) for module, parts in modules)


def _update(
    module: str, kernels: StoredTensor, source: Source, base: BaseParameters, sizes: OwnPatterns
) -> Update:
    parameter = base.get(f"{module}.weight", kernels.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    rows, columns, size = kernels.shape if len(kernels.shape) == 3 else (0, 0, 0)
    sides = (rows * size, columns * size)
    if not all(sides) or is_transposed(parameter, shape, *sides, config, base) is not False:
        raise AdapterError(
            f"{kernels.name} has shape {list(kernels.shape)}, expected [outputs/n, inputs/n, n] for {parameter.name} of"
            f" the base, {list(parameter.shape)}; was the adapter trained on this base?"
        )
    expected = sizes.of(source.trained(module), config.rank("block_size"))
    if size != expected:
        raise AdapterError(
            f"{kernels.name} has blocks of {size}, but {config.name} gives {expected} (block_size and"
            " block_size_pattern); config and tensors are not of one adapter"
        )
    return C3aUpdate(parameter.name, shape, MappingProxyType({"c3a_kernel": kernels}))


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del fields
    return {"block_size": sorted({tensor.shape[-1] for tensor in _kernels(tensors)})}


def _kernels(tensors: Mapping[str, StoredTensor]) -> Iterator[StoredTensor]:
    return (tensor for name, tensor in tensors.items() if name.endswith("c3a_kernel") and tensor.shape)


C3A = Method(
    label="C3A",
    read=read_c3a,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "block_size": USED,
            "block_size_pattern": USED,
            "bias": Neutral("expected none, all or c3a_only", ("none", "all", "c3a_only")),
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"c3a_\w+",
    orients=True,
    neutral="zero (all c3a_kernel)",
    formula="W + Δ / in, Δ of circulant blocks",
    facts=_facts,
)
