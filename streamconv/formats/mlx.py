"""MLX's affine storage (`mlx.core.quantize`, mode affine), for reading: integers in groups, each with scale and bias.

    P.weight   uint32 [out, in · bits / 32], codes from the lowest bits on
    P.scales   [out, in / group], P.biases likewise; an element is code * scale + bias

config.json has `quantization` with `group_size` and `bits`, and entries by module path where one has others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import DENSE, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats.base import Marks, Weight, config_says, parts_of, refusal, wrong
from streamconv.formats.block_scaled import BlockScaledDecoder, Scales, check_tensor
from streamconv.formats.undecoded import find_each

METHOD = "mlx"
"""Name given to a `quantization` that names none itself, as MLX writes it."""
_BITS = (2, 4, 8)
_WORD_BITS = 32


def is_mlx(quantization: Mapping[str, Any]) -> bool:
    """Whether settings without a `quant_method` are MLX's."""
    return "quant_method" not in quantization and {"group_size", "bits"} <= quantization.keys()


def _find_weight(module: str, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Weight:
    parts = parts_of(
        f"{module}.weight", {role: f"{module}.{role}" for role in ("weight", "scales", "biases")}, free
    )
    own = quantization.get(module)
    settings = {**quantization, **own} if isinstance(own, Mapping) else quantization
    bits, group = settings.get("bits"), settings.get("group_size")
    if not (isinstance(bits, int) and 0 < bits <= _WORD_BITS and isinstance(group, int) and group > 0):
        raise CheckpointError(
            f"{module}.weight has {shown(bits)} bits in groups of {shown(group)} by config.json, expected whole numbers"
            f" and {_WORD_BITS} bits at most; correct it, or download the checkpoint again"
        )
    if bits not in _BITS:
        raise UnsupportedError(
            f"{module}.weight has {shown(bits)} bits in groups of {shown(group)}; of MLX, 2, 4 and 8 bits are read:"
            " give the 16-bit base model instead"
        )
    main = parts["weight"]
    if len(main.shape) not in (2, 3) or main.dtype.code != "U32":
        raise wrong(main, "U32, a matrix or one for each expert")
    columns = main.shape[-1] * _WORD_BITS // bits
    shape = (*main.shape[:-1], columns)
    for role in ("scales", "biases"):
        check_tensor(
            parts[role], tuple(each.code for each in DENSE.values()), ((*shape[:-1], columns // group),)
        )
    dtype: Dtype = parts["scales"].dtype
    decoder = BlockScaledDecoder(
        f"{module}.weight", "weight", columns, f"u{bits}", 1, group, Scales("scales", offsets="biases"), dtype
    )
    return Weight(f"{module}.weight", shape, dtype, f"mlx, {bits} bit", decoder, parts)


def _check(config: Mapping[str, Any], where: str) -> None:
    mode = config.get("mode", "affine")
    if mode != "affine":
        raise refusal(config_says(where), f"quantized by MLX in the mode {shown(mode)}")


_MARKS = Marks(
    side_suffixes=(".biases",),
    owned=("weight", "scales", "biases"),
    methods=MappingProxyType({METHOD: _check}),
)


@dataclass(frozen=True, slots=True)
class MlxReader:
    """Reader of MLX's affine weights."""

    marks: Marks = _MARKS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Weights with biases beside them."""
        if quantization.get("quant_method") != METHOD:
            return ()
        modules = [name.removesuffix(".biases") for name in free if name.endswith(".biases")]
        return find_each(modules, lambda module: _find_weight(module, free, quantization), free, METHOD)
