"""Weights that are stored in a way that is not decoded: copied byte for byte, and refused where they would change.

Of a checkpoint whose quantization is not known, the tensors of a module with codes in it are one weight, by the name
that its module has for it in 16 bit. Names are those of HQQ (`P.W_q`), torchao (`P._weight_qdata`, and before
`P.weight:_weight_qdata`), quanto (`P.weight._data`), AQLM (`P.codes`), gpt-oss (`P_blocks`) and their like. Experts
fused in one tensor, as in FP8 (`experts.gate_up_proj` and `experts.gate_up_proj_scale_inv`), are by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import DENSE
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Order, Weight, matrix_shape
from streamconv.kernels.grids import Grid

# Never codes: counters, masks, tables of numbers; of a module that has codes, they are parts.
_NO_CODES = frozenset({"I64", "U64", "BOOL", "F64", "C64"})
_PARAMETER = re.compile(
    r"(?P<weight>.+\.weight)[.:][^.]+(\.[^.]+)?|(?P<fused>.+_proj)_(blocks|scales|scale|scale_inv)"
    r"|(?P<bare>.+\.experts\.[a-z_]+_proj)"
)


@dataclass(frozen=True, slots=True)
class UndecodedDecoder:
    """Decoder that refuses with `reason`, a message that says what to do instead. `main` is its largest part."""

    name: str
    reason: str
    main: str
    rows: int
    nbytes: int
    grid: Grid | None = None
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return self.nbytes * row // max(self.rows, 1)

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        del side
        raise self.refusal()

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        del raw, rows
        raise self.refusal()

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        del raw, rows, scales, out
        raise self.refusal()

    def refusal(self) -> UnsupportedError:
        return UnsupportedError(f"{self.name} is not decoded: {self.reason}")


def undecoded_weight(name: str, tensors: Iterable[StoredTensor], kind: str, reason: str) -> Weight:
    """The weight `name` that `tensors` hold, stored as `kind`; its shape and type are those of the largest of them."""
    parts = {tensor.name: tensor for tensor in tensors}  # their roles are not known
    main = max(parts, key=lambda role: parts[role].nbytes)
    found = parts[main]
    decoder = UndecodedDecoder(name, reason, main, matrix_shape(found.shape)[0], found.nbytes)
    format_name = f"{kind} (not decoded)"
    return Weight(name, found.shape, found.dtype, format_name, decoder, parts, undecoded=reason)


def find_each(
    modules: Iterable[str],
    find: Callable[[str], Weight | None],
    free: Mapping[str, StoredTensor],
    kind: str,
) -> list[Weight]:
    """Weights of modules as `find` reads them; where that raises UnsupportedError, one that is not decoded, with all
    tensors of its module. Those for which it returns None are left out.
    """
    found: list[Weight] = []
    tensors: Mapping[str, Sequence[StoredTensor]] = {}
    for module in modules:
        try:
            weight = find(module)
        except UnsupportedError as error:
            tensors = tensors or parameters_in(free)
            name = f"{module}.weight"
            weight = undecoded_weight(name, tensors[name], kind, str(error))
        if weight is not None:
            found.append(weight)
    return found


def parameter_of(name: str) -> str:
    """The parameter in 16 bit that a tensor of a quantized module is a part of."""
    if match := _PARAMETER.fullmatch(name):
        return match["weight"] or match["fused"] or match["bare"]
    module = name.rpartition(".")[0]
    return f"{module}.weight" if module else name


def parameters_in(free: Mapping[str, StoredTensor]) -> Mapping[str, Sequence[StoredTensor]]:
    """Tensors by the parameter that they may be parts of; a bias is a parameter of its own."""
    found: dict[str, list[StoredTensor]] = {}
    for name, tensor in free.items():
        if name.rpartition(".")[2] != "bias":
            found.setdefault(parameter_of(name), []).append(tensor)
    return MappingProxyType(found)


def has_codes(parameter: str, tensors: Iterable[StoredTensor]) -> bool:
    """Whether tensors are those of a quantized weight, by their types: codes, and no weight in floating point."""
    found = list(tensors)
    if any(tensor.name == parameter and is_plain(tensor) for tensor in found):
        return False
    return any(not is_plain(tensor) and tensor.dtype.code not in _NO_CODES for tensor in found)


def is_plain(tensor: StoredTensor) -> bool:
    """Whether a tensor is of a type in which weights are merged."""
    return tensor.dtype.name in DENSE
