"""NVFP4 and MXFP4 weights of compressed-tensors and ModelOpt, for reading: 4-bit floats (E2M1) in groups of a row.

P.weight_packed        uint8 [out, in/2], the first of two codes in the low half (ModelOpt: P.weight)
P.weight_scale         NVFP4: F8_E4M3 [out, in/16]; MXFP4: uint8 [out, in/32], biased exponents of two
P.weight_global_scale  NVFP4: float32, which divides (compressed-tensors `compressors/nvfp4`)
P.weight_scale_2       NVFP4 of ModelOpt: float32, which multiplies
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import U8, Dtype
from streamconv.errors import CheckpointError
from streamconv.formats.base import Marks, Weight, config_says, refusal, wrong
from streamconv.formats.block_scaled import BlockScaledDecoder, Scales, check_tensor
from streamconv.formats.compressed import METHOD, formats_of, part_of
from streamconv.formats.dense import largest_dtype
from streamconv.formats.fp8 import ACTIVATIONS

_PACKED = "weight_packed"
_SCALE = "weight_scale"
_DIVISOR, _FACTOR = "weight_global_scale", "weight_scale_2"
_OTHERS = (*ACTIVATIONS, "input_global_scale", "weight_shape")
_STORAGES = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized"})


@dataclass(frozen=True, slots=True)
class Fp4Reader:
    """Reader of 4-bit floats in groups."""

    marks: Marks

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Weights packed two codes a byte, with a scale a group."""
        modules = [
            (name.removesuffix(main), main)
            for name, tensor in free.items()
            for main in (_PACKED, "weight")
            if name.endswith(f".{main}") and tensor.dtype == U8 and _is_ours(name.removesuffix(main), free)
        ]
        if not modules:
            return ()
        dtype = largest_dtype(free, but=(_SCALE, _DIVISOR, _FACTOR, *_OTHERS))
        with TensorReader() as reader:
            return [_weight(module, main, free, dtype, reader) for module, main in modules]


def _is_ours(module: str, free: Mapping[str, StoredTensor]) -> bool:
    return module + _SCALE in free


def _weight(
    module: str, main_role: str, free: Mapping[str, StoredTensor], dtype: Dtype, reader: TensorReader
) -> Weight:
    main, scales = free[module + main_role], free[module + _SCALE]
    if len(main.shape) != 2 or not min(main.shape):
        raise wrong(main, "a matrix")
    rows, columns = main.shape[0], 2 * main.shape[1]
    is_exponent = scales.dtype == U8
    group = 32 if is_exponent else 16
    check_tensor(scales, ("U8", "F8_E4M3"), ((rows, -(-columns // group)),))
    found = [role for role in (_DIVISOR, _FACTOR) if module + role in free]
    if is_exponent == bool(found):
        raise CheckpointError(
            f"{main.name} has groups of {group}, and {'also' if found else 'no'} {' or '.join(found or (_DIVISOR,))}"
            " beside it; the checkpoint is incomplete, download it again"
        )
    factor = _factor(free[module + found[0]], found[0], reader) if found else 1.0
    roles = (main_role, _SCALE, *found, *(role for role in _OTHERS if module + role in free))
    decoder = BlockScaledDecoder(
        f"{module}weight",
        main_role,
        columns,
        "e2m1",
        1,
        group,
        Scales(_SCALE, factor=factor, is_exponent=is_exponent),
        dtype,
    )
    form = "mxfp4" if is_exponent else "nvfp4"
    return Weight(
        f"{module}weight", (rows, columns), dtype, form, decoder, {r: free[module + r] for r in roles}
    )


def _factor(tensor: StoredTensor, role: str, reader: TensorReader) -> float:
    check_tensor(tensor, ("F32",), ((), (1,)))
    value = float(reader.load(tensor).reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise CheckpointError(
            f"{tensor.file.name}: {tensor.name} is {value}, expected a positive number; the checkpoint is damaged,"
            " download it again"
        )
    return 1 / value if role == _DIVISOR else value


def _check_compressed(config: Mapping[str, Any], where: str) -> None:
    config = part_of(config, _STORAGES)
    if not formats_of(config) or formats_of(config) - _STORAGES:
        raise refusal(config_says(where), f"{METHOD}, and its format is {config.get('format')!r}")


def _check_modelopt(config: Mapping[str, Any], where: str) -> None:
    if config.get("quant_algo") != "NVFP4":
        raise refusal(config_says(where), f"modelopt, {config.get('quant_algo')}")


PACKED = Fp4Reader(
    Marks(
        side_suffixes=(f".{_DIVISOR}", ".input_global_scale"),
        owned=(_PACKED, _SCALE, _DIVISOR, *_OTHERS),
        methods=MappingProxyType({METHOD: _check_compressed}),
    )
)
MODELOPT = Fp4Reader(
    Marks(
        side_suffixes=(f".{_FACTOR}",),
        owned=("weight", _SCALE, _FACTOR, *_OTHERS),
        methods=MappingProxyType({"modelopt": _check_modelopt}),
    )
)
