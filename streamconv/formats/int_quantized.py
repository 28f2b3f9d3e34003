"""compressed-tensors' int-quantized storage: 8-bit integers with a scale a row, whose activations a server quantizes.

Source: compressed-tensors `compressors/naive_quantized` and `quantization/utils/helpers.py`. For a module P with a
weight [out, in]:

    P.weight        int8 [out, in]
    P.weight_scale  [out, 1], in the weight's own dtype; some files have one of all, [1]

An element is the integer times its scale, rounded once, to the scale's dtype. Of activations the config alone tells
(a scale a token, found while it runs); where a file has such scales and zero points, they are kept beside, and the
config is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, I8, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    Constant,
    Decoder,
    Json,
    Marks,
    Order,
    ScaleScope,
    Weight,
    config_says,
    refusal,
    wrong,
)
from streamconv.formats.compressed import (
    METHOD,
    InGroups,
    arguments,
    formats_of,
    groups_of,
    part_of,
    weights_of,
)
from streamconv.formats.fp8 import ACTIVATIONS, is_static
from streamconv.formats.undecoded import find_each
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import ROW, TableGrid, integers

STORAGE = "int-quantized"
MAIN = "weight"
SCALES = "weight_scale"
_STORAGES = frozenset({STORAGE, "naive-quantized"})
_ZEROS = "weight_zero_point"
# Last components of tensors about activations.
_BESIDE = (*ACTIVATIONS, "input_zero_point", "output_zero_point")
# Code 0 is -128: two's complement but for its highest bit.
_SIGN = 0x80
_HALF = 128.0
# Integer that the greatest magnitude of a block is given.
_REACH = 127.5
INT8_ROWS = integers("int8 in rows", bits=8, block=ROW)
"""As compressed-tensors has it: from -128 on, a scale of the greatest magnitude over 127.5."""


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8RowsDecoder:
    """Decoder of rows of integers; `dtype` is that of the scales, and of what is decoded."""

    name: str
    dtype: Dtype
    rows: int
    grid: TableGrid
    main: str = MAIN
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return row * self.grid.block

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        found = side[SCALES].reshape(-1).float().mul(_HALF)
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self.name.removesuffix(MAIN)}{SCALES}: a stored scale is NaN or infinite; the checkpoint is damaged,"
                " download it again"
            )
        return found.expand(self.rows).contiguous()

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        del rows
        return raw ^ _SIGN

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals dequantize bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.grid.block)
        kernels_for(raw.device).decode(self.codes(raw, rows), self.grid, scales, self.dtype, out.view(-1))
        return out


def _find_weight(name: str, free: Mapping[str, StoredTensor], activations: str | None) -> Weight:
    """The weight `name`; CheckpointError unless its parts agree. `activations`: how these differ from usual ones."""
    module, main = name.removesuffix(MAIN), free[name]
    if module + _ZEROS in free:
        raise UnsupportedError(
            f"{name}: its integers are asymmetric ({_ZEROS}), which is not read; give the 16-bit base model instead"
        )
    if len(main.shape) != 2 or not math.prod(main.shape):
        raise wrong(main, "I8 [out, in], to go with its scales")
    rows, columns = main.shape
    scales = free[module + SCALES]
    if scales.dtype.name not in DENSE or scales.shape not in ((rows, 1), (rows,), (1,), ()):
        raise wrong(scales, f"a float type and [{rows}, 1] or [1]")
    others = {role: free[module + role] for role in _BESIDE if module + role in free}
    decoder = Int8RowsDecoder(name, scales.dtype, rows, INT8_ROWS.of_width(columns))
    is_one = scales.shape in ((1,), ()) and rows > 1
    remarks = [
        *(["a scale a tensor"] if is_one else []),
        *(["scales in one axis"] if not is_one and len(scales.shape) == 1 else []),
        *([activations] if activations is not None else []),
    ]
    stored_as = ", ".join(("w8a8", *remarks))
    kind = Int8TensorEncoder if is_one else Int8RowsEncoder
    spec = TensorSpec(scales.name, scales.dtype, scales.shape)
    own = kind(stored_as, name, (rows, columns), scales.dtype, decoder.grid, spec)
    keep = own if remarks else None
    parts = {MAIN: main, SCALES: scales, **others}
    return Weight(name, main.shape, scales.dtype, stored_as, decoder, parts, keep)


def _activations(quantization: Mapping[str, Any]) -> str | None:
    """Activations in words, where they are quantized otherwise than in what is written here."""
    inputs = [group.get("input_activations") for group in groups_of(part_of(quantization, _STORAGES))]
    is_skewed = any(isinstance(each, Mapping) and each.get("symmetric") is False for each in inputs)
    found = {"static": is_static(quantization), "asymmetric": is_skewed}
    words = " ".join(word for word, holds in found.items() if holds)
    return f"{words} activations" if words else None


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8RowsEncoder:
    """Encoder of a weight [out, in], with scales of its own `dtype`, which are stored in the tensor `scale`."""

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    grid: TableGrid
    scale: TensorSpec
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    order: Order | None = None
    constants: tuple[Constant, ...] = ()

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return TensorSpec(self.name, I8, self.shape), self.scale

    def row_offset(self, row: int) -> int:
        return row * self.grid.block

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        torch.bitwise_xor(values, _SIGN, out=out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return self._stored(scales).float().mul(_HALF)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            found = kept[SCALES]
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            found = self._stored(scales)
        if not bool(found.isfinite().all()):
            raise InputError(
                f"{self.name} holds NaN or infinity, or values too large for a scale of {self.dtype.name}, which "
                f"{self.format} cannot store"
            )
        return (bytes(tensor_bytes(found.cpu().contiguous())),)

    def _stored(self, scales: Tensor) -> Tensor:
        return scales.div(_HALF).to(self.dtype.torch)


@dataclass(frozen=True, slots=True)
class Int8TensorEncoder(Int8RowsEncoder):
    """Encoder with one scale for all of a weight, that of its `greatest` magnitude; None until that is known."""

    greatest: float | None = None
    scope: ScaleScope = ScaleScope.WEIGHT

    @property
    def is_known(self) -> bool:
        return self.greatest is not None

    def knowing(self, greatest: float) -> Self:
        return replace(self, greatest=greatest)

    def following(self, decoder: Decoder) -> Self:
        """See Surveyed. Where the base's scale will do is known once the targets are: see `outgrows`."""
        del decoder
        return self

    def outgrows(self, scales: Tensor) -> bool:
        """See Surveyed: beyond the greatest integer by more than any other value is from the nearest one."""
        if self.greatest is None or not scales.numel():
            return False
        return self.greatest * _HALF > _REACH * float(scales[0])

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder: the same for all, whatever they are."""
        return self._stored(scales).float().mul(_HALF).expand(scales.shape).contiguous()

    def _stored(self, scales: Tensor) -> Tensor:
        assert self.greatest is not None, f"{self.name}: its greatest magnitude is not known"
        found = torch.full((1,), self.greatest / _REACH, device=scales.device).to(self.dtype.torch)
        return found.masked_fill_(found == 0, 1.0)


# -- the config --------------------------------------------------------------------------------------------


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings of weights other than integers of 8 bits with a scale a row, or one of all."""
    config = part_of(config, _STORAGES)
    if not formats_of(config) or formats_of(config) - _STORAGES:
        raise refusal(config_says(where), f"{METHOD}, and its format is {shown(config.get('format'))}")
    for weights in weights_of(config):
        if (weights.get("type", "int"), weights.get("num_bits", 8)) != ("int", 8):
            raise refusal(
                config_says(where),
                f"{METHOD}, {STORAGE} with weights of {shown(weights.get('num_bits'))} bits, type "
                f"{shown(weights.get('type'))}",
            )
        if weights.get("strategy") not in ("channel", "tensor"):
            raise refusal(
                config_says(where), f"{METHOD}, {STORAGE} with the strategy {shown(weights.get('strategy'))}"
            )
    if not groups_of(config):
        raise CheckpointError(f"{where}: config_groups is missing from quantization_config, or empty")


def _check_described(weights: Iterable[Weight], config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for scales of which the config tells otherwise, by which loaders go."""
    strategies = {each.get("strategy") for each in weights_of(part_of(config, _STORAGES))}
    for weight in weights:
        if isinstance(weight.decoder, Int8RowsDecoder):
            stored = "channel" if weight.parts[SCALES].shape[:1] == weight.shape[:1] else "tensor"
            if stored not in strategies and weight.shape[0] > 1:
                raise CheckpointError(
                    f"{where}: {weight.name} has scales of the strategy {stored}, and config.json says "
                    f"{', '.join(sorted(map(str, strategies)))}; loaders go by the config: correct it, or download the "
                    "checkpoint again"
                )


_MARKS = Marks(
    side_suffixes=(f".{SCALES}",),
    owned=(MAIN, SCALES, *_BESIDE),
    methods=MappingProxyType({METHOD: _check_config}),
    described=_check_described,
)


@dataclass(frozen=True, slots=True)
class Int8RowsFormat(InGroups):
    """Integers of 8 bits, a scale a row; activations are quantized token by token while a server runs."""

    name: str = "w8a8"
    grid: TableGrid = INT8_ROWS
    bits_per_weight: float = 8 + 16 / 4096
    layout: str = "compressed-tensors, 8-bit integers with a scale a row; 8-bit activations, too"
    loaders: str = "vLLM, transformers with compressed-tensors"
    library: str = METHOD
    family: str = METHOD
    has_partners: bool = True
    load_in: None = None
    skips_by_path: bool = True
    expert_loaders: tuple[str, ...] = ("vLLM",)
    config_copy: str | None = None
    marks: Marks = _MARKS

    def fits(self, name: str, shape: Shape) -> bool:
        """Any matrix whose scales, of 16 bit, start at an even byte. A single row is a gate, left in 16 bit."""
        del name
        return len(shape) == 2 and shape[0] > 1 and math.prod(shape) > 0 and math.prod(shape) % 2 == 0

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Weights of 8-bit integers with scales of these names beside them."""
        activations = _activations(quantization)
        mains = [
            name
            for name, tensor in free.items()
            if tensor.dtype == I8 and name.endswith(f".{MAIN}") and name.removesuffix(MAIN) + SCALES in free
        ]
        return find_each(
            [name.removesuffix(f".{MAIN}") for name in mains],
            lambda module: _find_weight(f"{module}.{MAIN}", free, activations),
            free,
            STORAGE,
        )

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Int8RowsEncoder:
        """See Format."""
        if dtype.name not in DENSE or not self.fits(name, shape) or not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name} is {dtype} {list(shape)}; {self.name} stores matrices of modules, of {', '.join(DENSE)}: "
                "exclude it with --ignore"
            )
        scale = TensorSpec(name.removesuffix(MAIN) + SCALES, dtype, (shape[0], 1))
        return Int8RowsEncoder(self.name, name, shape, dtype, self.grid.of_width(shape[1]), scale)

    def module_config(self) -> Json:
        """See Mixable."""
        return {
            "format": STORAGE,
            "input_activations": arguments("int", 8, "token", dynamic=True),
            "output_activations": None,
            "weights": arguments("int", 8, "channel"),
        }
