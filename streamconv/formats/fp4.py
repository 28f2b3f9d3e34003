"""NVFP4 and MXFP4 weights of compressed-tensors and ModelOpt: 4-bit floats (E2M1) in blocks of a row.

P.weight_packed        uint8 [out, in/2], the first of two codes in the low half (ModelOpt: P.weight)
P.weight_scale         NVFP4: F8_E4M3 [out, in/16]; MXFP4: uint8 [out, in/32], biased exponents of two
P.weight_global_scale  NVFP4: float32, which divides (compressed-tensors `compressors/nvfp4`)
P.weight_scale_2       NVFP4 of ModelOpt: float32, which multiplies
P.input_global_scale   NVFP4 with 4-bit activations: float32, 448 · 6 / the greatest magnitude of what enters P, by
                       which a loader scales blocks of 16 of that (ModelOpt: P.input_scale, the inverse)

An element is what its code stands for times its block's scale, itself divided or multiplied first by the scale of the
whole weight: in float32, rounded once to the type of the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import BF16, DENSE, F32, U8, Dtype
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
    check_tensor,
    config_says,
    refusal,
    wrong,
)
from streamconv.formats.compressed import METHOD, InGroups, formats_of, part_of
from streamconv.formats.dense import largest_dtype
from streamconv.formats.fp4_scales import DIVISOR, FACTOR, BlockScales, Mxfp4Scales, Nvfp4Scales
from streamconv.formats.fp8 import ACTIVATIONS
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

_PACKED = "weight_packed"
_MODELOPT = "weight"
_SCALE = "weight_scale"
_INPUT, _INPUT_FACTOR = "input_global_scale", "input_scale"
_OTHERS = (*ACTIVATIONS, "weight_shape")
NVFP4_STORAGE, MXFP4_STORAGE = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_STORAGES = frozenset({NVFP4_STORAGE, MXFP4_STORAGE})


def _part_name(weight: str, role: str) -> str:
    """`P.weight_scale` of `P.weight`."""
    return weight.removesuffix("weight") + role


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fp4Decoder:
    """Decoder of packed rows; `dtype` is what is decoded to, `inputs` has the scale of what the weight is multiplied
    by, where there is one.
    """

    name: str
    main: str
    columns: int
    block_scales: BlockScales
    dtype: Dtype
    order: Order | None = None
    inputs: StoredTensor | None = None

    @property
    def grid(self) -> TableGrid:
        return self.block_scales.grid

    def row_offset(self, row: int) -> int:
        return row * self.columns // 2

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        scales = self.block_scales.effective(side[_SCALE].reshape(-1))
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{_part_name(self.name, _SCALE)}: a stored scale is NaN or infinite; the checkpoint is damaged, "
                "download it again"
            )
        return scales

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        codes = torch.empty(len(rows) * self.columns, dtype=torch.uint8, device=raw.device)
        kernels_for(raw.device).unpack_pairs(raw, codes, low_first=True)
        return codes

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals compressed-tensors' decompress bit for bit."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        kernels_for(raw.device).decode_pairs(raw, self.grid, scales, self.dtype, out.view(-1), low_first=True)
        return out


def _find(
    main_role: str, free: Mapping[str, StoredTensor], config: Mapping[str, Any], kind: str | None = None
) -> Sequence[Weight]:
    """Weights packed two codes a byte, with a scale a block, whose main part is called `main_role`.

    With `kind`, those alone that are called so.
    """
    found = {
        name.removesuffix(main_role): _kind(name.removesuffix(main_role), main_role, free, config)
        for name, tensor in free.items()
        if name.endswith(f".{main_role}") and tensor.dtype == U8 and _has_scales(name, main_role, free)
    }
    modules = {module: each for module, each in found.items() if kind in (None, each)}
    if not modules:
        return ()
    dtype = largest_dtype(free, but=(_SCALE, DIVISOR, FACTOR, *_OTHERS), otherwise=BF16)
    with TensorReader() as reader:
        return [_weight(module, main_role, free, dtype, each, reader) for module, each in modules.items()]


def _has_scales(name: str, main_role: str, free: Mapping[str, StoredTensor]) -> bool:
    return name.removesuffix(main_role) + _SCALE in free


def _weight(
    module: str,
    main_role: str,
    free: Mapping[str, StoredTensor],
    dtype: Dtype,
    kind: str,
    reader: TensorReader,
) -> Weight:
    main, scales = free[module + main_role], free[module + _SCALE]
    if len(main.shape) != 2 or not min(main.shape):
        raise wrong(main, "a matrix")
    rows, columns = main.shape[0], 2 * main.shape[1]
    block_scales = _block_scales(main, module, scales.dtype == U8, free, reader)
    block = block_scales.grid.block
    if columns % block:
        raise wrong(main, f"rows of whole blocks of {block} codes, two a byte")
    check_tensor(scales, (block_scales.dtype.code,), ((rows, columns // block),))
    whole = (block_scales.whole[0],) if block_scales.whole else ()
    roles = (main_role, _SCALE, *whole, *(role for role in _OTHERS if module + role in free))
    name, shape = f"{module}weight", (rows, columns)
    inputs = next((free[module + role] for role in (_INPUT, _INPUT_FACTOR) if role in roles), None)
    decoder = Fp4Decoder(name, main_role, columns, block_scales, dtype, inputs=inputs)
    keep = Fp4Encoder(kind, name, shape, dtype, block_scales, main_role)
    return Weight(name, shape, dtype, kind, decoder, {role: free[module + role] for role in roles}, keep)


def _kind(module: str, main_role: str, free: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str:
    """The name in FORMATS, or in words what is kept only."""
    if free[module + _SCALE].dtype == U8:
        return "mxfp4" if _quantizes_inputs(config) else "mxfp4a16"
    if main_role == _MODELOPT:
        return "nvfp4a16, of modelopt"
    return "nvfp4" if module + _INPUT in free else "nvfp4a16"


def _quantizes_inputs(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return any(isinstance(group, Mapping) and group.get("input_activations") for group in found)


def _block_scales(
    main: StoredTensor, module: str, is_exponent: bool, free: Mapping[str, StoredTensor], reader: TensorReader
) -> BlockScales:
    """Raises CheckpointError where the scale over the whole weight is missing, or there and not wanted."""
    found = [role for role in (DIVISOR, FACTOR) if module + role in free]
    if is_exponent == bool(found):
        raise CheckpointError(
            f"{main.name} has groups of {32 if is_exponent else 16}, and "
            f"{'also' if found else 'no'} {' or '.join(found or (DIVISOR,))} beside it; the checkpoint is incomplete, "
            "download it again"
        )
    if is_exponent:
        return Mxfp4Scales()
    whole = free[module + found[0]]
    return Nvfp4Scales(_positive(whole, reader), found[0] == FACTOR, whole.shape)


def _positive(tensor: StoredTensor, reader: TensorReader) -> float:
    check_tensor(tensor, (F32.code,), ((), (1,)))
    value = float(reader.load(tensor).reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise CheckpointError(
            f"{tensor.file.name}: {tensor.name} is {value}, expected a positive number; the checkpoint is damaged,"
            " download it again"
        )
    return value


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fp4Encoder:
    """Encoder of a weight [out, in] of whole blocks, whose main part is called `main`.

    `inputs` is the scale of what it is multiplied by, where one is stored.
    """

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    block_scales: BlockScales
    main: str = _PACKED
    nested: bool = False
    rounds_scales: bool = True
    cell_rows: int = CELL_ROWS
    order: Order | None = None
    constants: tuple[Constant, ...] = ()
    scope: ScaleScope = ScaleScope.PARTNERS
    inputs: Nvfp4Scales | None = None

    @property
    def grid(self) -> TableGrid:
        return self.block_scales.grid

    @property
    def dequantized_dtype(self) -> Dtype:
        return self.dtype

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        rows, columns = self.shape
        parts = (
            TensorSpec(_part_name(self.name, self.main), U8, (rows, columns // 2)),
            TensorSpec(
                _part_name(self.name, _SCALE), self.block_scales.dtype, (rows, columns // self.grid.block)
            ),
        )
        if self.block_scales.whole is None:
            return parts
        role, shape = self.block_scales.whole
        whole = TensorSpec(_part_name(self.name, role), F32, shape)
        if self.inputs is None:
            return (*parts, whole)
        return (*parts, whole, TensorSpec(_part_name(self.name, _INPUT), F32, (1,)))

    @property
    def is_known(self) -> bool:
        return self.block_scales.is_known

    def knowing(self, greatest: float) -> Self:
        return dataclasses.replace(self, block_scales=self.block_scales.knowing(greatest))

    def raised(self, greatest: float) -> Self:
        """See Surveyed."""
        return dataclasses.replace(self, block_scales=self.block_scales.raised(greatest))

    def outgrows(self, scales: Tensor) -> bool:
        """See Surveyed. What a block has beyond its own scale is the block's to settle."""
        del scales
        return False

    def following(self, decoder: Decoder) -> Self:
        """See Surveyed. Where updates make blocks too large for the scale, `raised` is."""
        if not isinstance(decoder, Fp4Decoder) or decoder.grid != self.grid:
            return self
        return dataclasses.replace(self, block_scales=self.block_scales.following(decoder.block_scales))

    @property
    def is_measured(self) -> bool:
        return self.inputs is None or self.inputs.is_known

    def measuring(self, greatest: float) -> Self:
        """See InputMeasured."""
        return (
            self if self.inputs is None else dataclasses.replace(self, inputs=self.inputs.knowing(greatest))
        )

    def inheriting(self, decoder: Decoder) -> Self:
        """See InputMeasured. What lies beside the weight is read here."""
        if self.inputs is None or not isinstance(decoder, Fp4Decoder) or decoder.inputs is None:
            return self
        with TensorReader() as reader:
            value = _positive(decoder.inputs, reader)
        stored = Nvfp4Scales(value, multiplies=decoder.inputs.name.endswith(f".{_INPUT_FACTOR}"))
        return dataclasses.replace(self, inputs=self.inputs.following(stored))

    def row_offset(self, row: int) -> int:
        return row * self.shape[1] // 2

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have a part of their own
        kernels_for(values.device).pack_pairs(values, out, low_first=True)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return self.block_scales.effective(self.block_scales.stored(scales))

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            whole = () if self.block_scales.whole is None else (kept[self.block_scales.whole[0]],)
            return (*(_bytes_of(part) for part in (kept[_SCALE], *whole)), *self._bytes_of_inputs())
        assert scales is not None, f"{self.name} was given neither scales nor kept parts"
        if not bool(scales.isfinite().all()):
            raise InputError(f"{self.name} holds NaN or infinity, which {self.format} cannot store")
        return (
            _bytes_of(self.block_scales.stored(scales)),
            *self.block_scales.whole_bytes(),
            *self._bytes_of_inputs(),
        )

    def _bytes_of_inputs(self) -> tuple[bytes, ...]:
        return () if self.inputs is None else self.inputs.whole_bytes()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- the formats -------------------------------------------------------------------------------------------


def _check_compressed(config: Mapping[str, Any], where: str) -> None:
    config = part_of(config, _STORAGES)
    if not formats_of(config) or formats_of(config) - _STORAGES:
        raise refusal(config_says(where), f"{METHOD}, and its format is {shown(config.get('format'))}")


def _check_modelopt(config: Mapping[str, Any], where: str) -> None:
    if config.get("quant_algo") not in ("NVFP4", "W4A16_NVFP4"):
        raise refusal(config_says(where), f"modelopt, {shown(config.get('quant_algo'))}")


def _check_described(weights: Iterable[Weight], config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a weight that is stored as config.json says of none."""
    known = formats_of(part_of(config, _STORAGES))
    for weight in weights:
        if isinstance(weight.decoder, Fp4Decoder) and weight.decoder.main == _PACKED:
            storage = MXFP4_STORAGE if weight.decoder.block_scales.whole is None else NVFP4_STORAGE
            if storage not in known:
                raise CheckpointError(
                    f"{where}: {weight.name} is stored as {storage}, and config.json says {', '.join(sorted(known))}; "
                    "loaders go by the config: correct it, or download the checkpoint again"
                )


_MARKS = Marks(
    side_suffixes=(f".{DIVISOR}", f".{_INPUT}"),
    owned=(_PACKED, _SCALE, DIVISOR, *_OTHERS),
    methods=MappingProxyType({METHOD: _check_compressed}),
    described=_check_described,
)


@dataclass(frozen=True, slots=True)
class Fp4Format(InGroups):
    """Blocks of E2M1 with these scales, as compressed-tensors stores them; `inputs`: config of their activations."""

    name: str
    storage: str
    block_scales: BlockScales
    strategy: str
    inputs: Mapping[str, Any] | None = None
    loaders: str = "transformers with compressed-tensors, vLLM"
    library: str = METHOD
    family: str = METHOD
    load_in: None = None
    skips_by_path: bool = True
    # transformers 5.23 takes experts apart without the scale over the whole weight.
    expert_loaders: tuple[str, ...] = ("vLLM",)
    config_copy: str | None = None
    marks: Marks = _MARKS

    @property
    def layout(self) -> str:
        scales = "powers of two" if self.storage == MXFP4_STORAGE else "E4M3 scales, and one for all"
        activations = "; 4-bit activations, too" if self.inputs else ""
        return f"compressed-tensors, 4-bit floats (E2M1) in blocks of {self.grid.block} with {scales}{activations}"

    @property
    def grid(self) -> TableGrid:
        return self.block_scales.grid

    @property
    def measures_inputs(self) -> bool:
        """See InputScaled: scales of blocks are found as they come, in units of one that is stored."""
        return self.inputs is not None and self.inputs["dynamic"] == "local"

    @property
    def bits_per_weight(self) -> float:
        return 4 + 8 / self.grid.block

    def fits(self, name: str, shape: Shape) -> bool:
        """Whole blocks; and four times a number of them, or the float32 after their scales would not be aligned.

        A single row is a gate, which vLLM expects in 16 bit.
        """
        del name
        return (
            len(shape) == 2
            and shape[0] > 1
            and math.prod(shape) > 0
            and shape[1] % self.grid.block == 0
            and math.prod(shape) // self.grid.block % 4 == 0
        )

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""
        return _find(_PACKED, free, quantization, self.name)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Fp4Encoder:
        """See Format."""
        if not self.fits(name, shape) or not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}; {self.name} stores matrices of modules only, rows in blocks of "
                f"{self.grid.block}: exclude it with --ignore"
            )
        if dtype.name not in DENSE:
            raise UnsupportedError(
                f"{name} is {dtype}; {self.name} stores weights of {', '.join(DENSE)}: exclude it with --ignore"
            )
        inputs = Nvfp4Scales() if self.measures_inputs else None
        return Fp4Encoder(self.name, name, shape, dtype, self.block_scales, inputs=inputs)

    def module_config(self) -> Json:
        """See Mixable. The keys of compressed-tensors' own preset of this name."""
        weights: Json = {
            "dynamic": False,
            "group_size": self.grid.block,
            "num_bits": 4,
            "scale_dtype": str(self.block_scales.dtype.torch),
            "strategy": self.strategy,
            "symmetric": True,
            "type": "float",
        }
        return {
            "format": self.storage,
            "input_activations": None if self.inputs is None else {**weights, **self.inputs},
            "output_activations": None,
            "weights": weights,
        }


NVFP4A16 = Fp4Format("nvfp4a16", NVFP4_STORAGE, Nvfp4Scales(), "tensor_group")
NVFP4 = Fp4Format(
    "nvfp4",
    NVFP4_STORAGE,
    Nvfp4Scales(),
    "tensor_group",
    inputs=MappingProxyType({"dynamic": "local", "observer": "static_minmax"}),
)
_EXPERT_LOADERS = ("transformers with compressed-tensors", "vLLM")
MXFP4A16 = Fp4Format("mxfp4a16", MXFP4_STORAGE, Mxfp4Scales(), "group", expert_loaders=_EXPERT_LOADERS)
MXFP4 = Fp4Format(
    "mxfp4",
    MXFP4_STORAGE,
    Mxfp4Scales(),
    "group",
    inputs=MappingProxyType({"dynamic": True}),
    expert_loaders=_EXPERT_LOADERS,
)


_MODELOPT_MARKS = Marks(
    side_suffixes=(f".{FACTOR}",),
    owned=(_MODELOPT, _SCALE, FACTOR, *_OTHERS),
    methods=MappingProxyType({"modelopt": _check_modelopt}),
)


@dataclass(frozen=True, slots=True)
class ModelOptReader:
    """Reader of NVFP4 as ModelOpt stores it."""

    marks: Marks = _MODELOPT_MARKS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        return _find(_MODELOPT, free, quantization)
