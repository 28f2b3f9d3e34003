"""FP8 weights as DeepSeek, compressed-tensors, FBGEMM and ModelOpt store them, for reading.

    P.weight            F8_E4M3 [out, in]
    P.weight_scale_inv  float32 [⌈out/128⌉, ⌈in/128⌉]: DeepSeek-V3 (`inference/fp8_cast_bf16.py`), `quant_method` fp8
    P.weight_scale      a scale for the tensor, a row, a block: compressed-tensors (`float-quantized`), FBGEMM, ModelOpt

Scales multiply. Those of activations lie beside and say nothing of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import Dtype
from streamconv.errors import CheckpointError
from streamconv.formats.base import Marks, Weight, config_says, refusal
from streamconv.formats.block_scaled import BlockScaledDecoder, Scales, check_tensor
from streamconv.formats.compressed import METHOD, formats_of, weights_of
from streamconv.formats.dense import largest_dtype
from streamconv.formats.undecoded import find_each

_CODE = "F8_E4M3"
_SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "input_scale_ub",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "input_zero_point",
)
"""Last components of tensors about activations, which a weight in 16 bit has no use for."""
_BLOCK = 128


def find_fp8(free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
    """Weights with scales of either name. Raises CheckpointError where those of one are missing or do not fit."""
    mains = [
        tensor for name, tensor in free.items() if tensor.dtype.code == _CODE and name.endswith(".weight")
    ]
    dtype = largest_dtype(free, but=(*_SCALES, *ACTIVATIONS))
    return find_each(
        [main.name.removesuffix(".weight") for main in mains],
        lambda module: _weight(free[f"{module}.weight"], free, quantization, dtype),
        free,
        "fp8",
    )


def _weight(
    main: StoredTensor, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any], dtype: Dtype
) -> Weight:
    module = main.name.removesuffix("weight")
    role = next((role for role in _SCALES if module + role in free), None)
    if role is None and module + "scale" in free:
        raise refusal(f"{main.name} is", f"{main.dtype} with another kind of scales beside it (scale)")
    if role is None:
        raise CheckpointError(
            f"{main.name} is {main.dtype}, and has no {' or '.join(_SCALES)} beside it; the checkpoint is incomplete,"
            " download it again"
        )
    scales = free[module + role]
    if scales.dtype.code in ("F8_E8M0", "U8"):
        raise refusal(f"{main.name} is", f"{main.dtype} with exponents as scales ({role} is {scales.dtype})")
    rows, columns = _matrix(main)
    block = _block(scales, rows, columns, quantization)
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    shapes = (blocks, *(((), (1,)) if blocks == (1, 1) else ((rows,),) if blocks == (rows, 1) else ()))
    check_tensor(scales, ("F32", "BF16", "F16"), shapes)
    others = {each: free[module + each] for each in ACTIVATIONS if module + each in free}
    decoder = BlockScaledDecoder(main.name, "weight", columns, "e4m3", *block, Scales(role), dtype)
    form = f"fp8, blocks of {block[0]} x {block[1]}" if role == _SCALES[0] else "fp8"
    return Weight(main.name, main.shape, dtype, form, decoder, {"weight": main, role: scales, **others})


def _matrix(main: StoredTensor) -> tuple[int, int]:
    if len(main.shape) != 2 or not min(main.shape):
        raise CheckpointError(f"{main.file.name}: {main.name}: found {list(main.shape)}, expected a matrix")
    return main.shape[0], main.shape[1]


def _block(scales: StoredTensor, rows: int, columns: int, quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, by the scales' shape, and by the config where they are many."""
    if scales.shape in ((), (1,), (1, 1)) and rows * columns > 1:
        stated = _stated(quantization)
        return (
            stated if stated is not None and stated[0] >= rows and stated[1] >= columns else (rows, columns)
        )
    if scales.shape in ((rows,), (rows, 1)):
        stated = _stated(quantization)
        return stated if stated is not None and stated[0] == 1 and stated[1] < columns else (1, columns)
    return _stated(quantization) or (_BLOCK, _BLOCK)


def _stated(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block that the config states: `weight_block_size`, or the `block_structure` of a group."""
    found = [quantization.get("weight_block_size")]
    found += [weights.get("block_structure") for weights in weights_of(quantization)]
    for each in found:
        if (
            isinstance(each, list)
            and len(each) == 2
            and all(isinstance(side, int) and side > 0 for side in each)
        ):
            return each[0], each[1]
    return None


def _check_codes(config: Mapping[str, Any], where: str) -> None:
    """Refuse what `fp8` and `fbgemm_fp8` may say of codes other than E4M3; the tensors tell the rest."""
    fmt = config.get("fmt", "e4m3")
    if fmt != "e4m3":
        raise refusal(config_says(where), f"fp8 with fmt {shown(fmt)}")


def _check_modelopt(config: Mapping[str, Any], where: str) -> None:
    algorithm = config.get("quant_algo")
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"):
        raise refusal(config_says(where), f"modelopt, {shown(algorithm)}")


def _check_compressed(config: Mapping[str, Any], where: str) -> None:
    weights = weights_of(config)
    are_fp8 = bool(weights) and all(
        (each.get("type"), each.get("num_bits")) == ("float", 8) for each in weights
    )
    if not are_fp8 or formats_of(config) - {"float-quantized", "naive-quantized"}:
        raise refusal(config_says(where), f"{METHOD}, and its format is {shown(config.get('format'))}")


_MARKS = Marks(
    side_suffixes=tuple(f".{role}" for role in _SCALES),
    owned=("weight", *_SCALES, *ACTIVATIONS),
    methods=MappingProxyType(
        {
            "fp8": _check_codes,
            "fbgemm_fp8": _check_codes,
            "modelopt": _check_modelopt,
            METHOD: _check_compressed,
        }
    ),
)


@dataclass(frozen=True, slots=True)
class Fp8Reader:
    """Reader of FP8 weights."""

    marks: Marks = _MARKS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        return find_fp8(free, quantization)
