"""MLX's affine storage (`mlx.core.quantize`, mode affine): integers in groups of a row, each with a scale and a bias.

    P.weight   uint32 [out, in · bits / 32], codes from the lowest bit on, one after the other
    P.scales   [out, in / group], P.biases likewise, in the type of the model

An element is code * scale, rounded to that type, plus bias, rounded again (`mlx/ops.cpp`, affine_dequantize). Experts
are stored stacked, with an axis more in front (`formats/stacks.py`). A scale is negative where a group's greatest value
is farther from 0 than its least.

config.json has `quantization` with `group_size` and `bits`, and entries by module path where one has others; mlx-lm
takes a module for quantized if it has scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import DENSE, U32, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats.base import (
    CELL_ROWS,
    GROUP_SIZES,
    Constant,
    Format,
    Json,
    Marks,
    Mixable,
    Order,
    Weight,
    check_tensor,
    config_says,
    grouped_name,
    parts_of,
    refusal,
    wrong,
)
from streamconv.formats.bits import packed_bits, unpacked_bits
from streamconv.formats.linear import module_of
from streamconv.formats.stacks import FAMILIES, MOST_EXPERTS, ROUNDED_AGAIN, expert_names, stacked_expert
from streamconv.formats.undecoded import find_each
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid, divided, integers

METHOD = "mlx"
"""Name given to a `quantization` that names none itself, as MLX writes it."""
USUAL_GROUP = 64
_BITS = (2, 3, 4, 5, 6, 8)
_WORD_BITS = 32
_LEAST_SCALE = 1e-7  # mlx/ops.cpp, affine_quantize: eps


def is_mlx(quantization: Mapping[str, Any]) -> bool:
    """Whether settings without a `quant_method` are MLX's."""
    return "quant_method" not in quantization and {"group_size", "bits"} <= quantization.keys()


def config_keys(quantization: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Keys of config.json under which programs look for settings of a quantization; MLX's have two."""
    is_ours = quantization is not None and is_mlx(quantization)
    return ("quantization", "quantization_config") if is_ours else ("quantization_config",)


@dataclass(frozen=True, slots=True)
class Edges:
    """MLX's rule: the end that is farther from 0 is a value of the grid, and so is 0 itself.

    With steps of a `half`-th of the grid, code c stands for c / half - 1.
    """

    half: int

    def start(self, values: Tensor) -> Tensor:
        """See Offsets. A scale of the grid is `half` stored ones."""
        least, greatest = kernels_for(values.device).ranges(values, values.shape[1])
        size = divided(greatest - least, 2 * self.half - 1).clamp_(min=_LEAST_SCALE)
        starts_low = least.abs() > greatest.abs()
        scale, edge = torch.where(starts_low, size, -size), torch.where(starts_low, least, greatest)
        steps = (edge / scale).round_()
        scale = torch.where(steps != 0, edge / steps, scale)
        bias = torch.where(steps != 0, edge, torch.zeros_like(edge))
        return torch.stack((scale * self.half, bias), dim=1)


def grid_of(bits: int, group: int) -> TableGrid:
    """The integers of so many bits, in groups with offsets."""
    known = integers(f"affine {bits} bit", bits, group)
    return replace(known, reach=1.0, offsets=Edges(2 ** (bits - 1)))


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MlxDecoder:
    """Decoder of rows of `columns` codes of so many bits; `dtype` is that of scales, and of what is decoded."""

    name: str
    dtype: Dtype
    columns: int
    bits: int
    grid: TableGrid
    main: str = "weight"
    order: Order | None = None

    def row_offset(self, row: int) -> int:
        return row * self.columns * self.bits // 8

    def scales(self, side: Mapping[str, Tensor]) -> Tensor:
        """See Decoder."""
        found = [side[role].reshape(-1).float() for role in ("scales", "biases")]
        for role, each in zip(("scales", "biases"), found, strict=True):
            if not bool(each.isfinite().all()):
                raise CheckpointError(
                    f"{self.name.removesuffix('weight')}{role}: a stored number is NaN or infinite; the checkpoint is "
                    "damaged, download it again"
                )
        scale, bias = found
        return torch.stack((scale * 2 ** (self.bits - 1), bias), dim=1)

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        return unpacked_bits(raw, self.bits, len(rows) * self.columns)

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """See Decoder. Equals mlx.core.dequantize bit for bit: product and sum are rounded, each on its own."""
        assert scales is not None, f"{self.name} cannot be decoded without its scales"
        assert out.shape == (len(rows), self.columns)
        codes = self.codes(raw, rows)
        kernels_for(raw.device).decode_in_steps(codes, self.grid, scales, self.dtype, out.view(-1))
        return out


def _find_weight(module: str, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Weight:
    name = f"{module}.weight"
    parts = parts_of(name, {role: f"{module}.{role}" for role in ("weight", "scales", "biases")}, free)
    own = quantization.get(module)
    settings = {**quantization, **own} if isinstance(own, Mapping) else quantization
    bits, group = settings.get("bits"), settings.get("group_size")
    if (
        not (isinstance(bits, int) and isinstance(group, int))
        or not 0 < bits <= _WORD_BITS
        or group < 1
        or isinstance(group, bool)
    ):
        raise CheckpointError(
            f"{module}.weight has {shown(bits)} bits in groups of {shown(group)} by config.json, expected whole numbers"
            f" and {_WORD_BITS} bits at most; correct it, or download the checkpoint again"
        )
    if bits not in _BITS:
        raise UnsupportedError(
            f"{name} has {shown(bits)} bits in groups of {shown(group)}; of MLX, {', '.join(map(str, _BITS))} bits are "
            "read: give the 16-bit base model instead"
        )
    main = parts["weight"]
    if len(main.shape) not in (2, 3) or main.dtype != U32:
        raise wrong(main, "U32, a matrix or one for each expert")
    columns = main.shape[-1] * _WORD_BITS // bits
    if main.shape[-1] * _WORD_BITS % bits or columns % group or not columns:
        raise wrong(main, f"rows of whole groups of {group} codes of {bits} bits")
    shape = (*main.shape[:-1], columns)
    scales, biases = parts["scales"], parts["biases"]
    dtypes = tuple(each.code for each in DENSE.values())
    check_tensor(scales, dtypes, ((*shape[:-1], columns // group),))
    check_tensor(biases, (scales.dtype.code,), (scales.shape,))
    grid = grid_of(bits, group)
    decoder = MlxDecoder(name, scales.dtype, columns, bits, grid)
    stored_as = format_name(bits, group)
    keep = MlxEncoder(stored_as, name, shape, scales.dtype, bits, grid)
    return Weight(name, shape, scales.dtype, stored_as, decoder, parts, keep)


def experts_apart(weight: Weight, config: Mapping[str, Any]) -> Iterator[Weight]:
    """Each expert of a weight that is stacked, [experts, out, in], as a checkpoint with experts apart calls it; others
    as they are.
    """
    decoder, named = weight.decoder, expert_names(weight.name, config)
    count, *shape = weight.shape or (0,)
    is_stack = isinstance(decoder, MlxDecoder) and len(shape) == 2 and min(shape) > 0
    if named is None or not is_stack or not 0 < count <= MOST_EXPERTS:
        yield weight
        return
    assert isinstance(decoder, MlxDecoder)
    for number in range(count):
        name = named(number)
        keep = MlxEncoder(weight.format, weight.name, (1, *shape), weight.dtype, decoder.bits, decoder.grid)
        parts = {role: _share(part, number) for role, part in weight.parts.items()}
        own = replace(decoder, name=name)
        yield replace(weight, name=name, shape=tuple(shape), decoder=own, parts=parts, keep=keep)


def _share(part: StoredTensor, number: int) -> StoredTensor:
    """The part of one expert of a part of all."""
    alone = replace(part, shape=(1, *part.shape[1:]))
    return replace(alone, offset=part.offset + number * alone.nbytes)


def _check(config: Mapping[str, Any], where: str) -> None:
    mode = config.get("mode", "affine")
    if mode != "affine":
        raise refusal(config_says(where), f"quantized by MLX in the mode {shown(mode)}")


_MARKS = Marks(
    side_suffixes=(".biases",),
    owned=("weight", "scales", "biases"),
    methods=MappingProxyType({METHOD: _check}),
)


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MlxEncoder:
    """Encoder of a weight [..., out, in] of whole groups, with scales and biases of its own `dtype`."""

    format: str
    name: str
    shape: Shape
    dtype: Dtype
    bits: int
    grid: TableGrid
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
        *outer, columns = self.shape
        module, groups = self.name.removesuffix("weight"), (*outer, columns // self.grid.block)
        return (
            TensorSpec(self.name, U32, (*outer, columns * self.bits // _WORD_BITS)),
            TensorSpec(f"{module}scales", self.dtype, groups),
            TensorSpec(f"{module}biases", self.dtype, groups),
        )

    def row_offset(self, row: int) -> int:
        return row * self.shape[-1] * self.bits // 8

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        del scales  # they have parts of their own
        packed_bits(values, self.bits, out)

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        scale, bias = self._stored(scales)
        return torch.stack((scale.float() * 2 ** (self.bits - 1), bias.float()), dim=1)

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """See Encoder."""
        if kept is not None:
            found = (kept["scales"], kept["biases"])
        else:
            assert scales is not None, f"{self.name} was given neither scales nor kept parts"
            found = self._stored(scales)
        if not all(bool(each.isfinite().all()) for each in found):
            raise InputError(
                f"{self.name} holds NaN or infinity, or values too large for a scale of {self.dtype.name}, which "
                f"{self.format} cannot store"
            )
        first, second = (bytes(tensor_bytes(each.cpu().contiguous())) for each in found)
        return first, second

    def _stored(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.dtype.torch
        return (scales[:, 0] / 2 ** (self.bits - 1)).to(dtype), scales[:, 1].to(dtype)


def format_name(bits: int, group: int) -> str:
    """Name that encoders and weights give the storage; in words, where it is only kept."""
    return grouped_name(f"mlx{bits}", group, USUAL_GROUP)


@dataclass(frozen=True, slots=True)
class MlxFormat:
    """MLX's affine storage in so many bits."""

    bits: int
    group_size: int = USUAL_GROUP
    group_sizes: tuple[int, ...] = GROUP_SIZES
    loaders: str = "mlx-lm"
    library: str | None = None
    load_in: None = None
    config_copy: str | None = None
    marks: Marks = _MARKS
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ("mlx-lm",)
    families: frozenset[str] = FAMILIES
    takes_embeddings: bool = True
    family: str = METHOD
    has_partners: bool = False

    @property
    def rounded_again(self) -> Mapping[str, tuple[str, ...]]:
        """See ExpertStacker."""
        return ROUNDED_AGAIN

    @property
    def name(self) -> str:
        return f"mlx{self.bits}"

    @property
    def layout(self) -> str:
        return f"MLX affine, {self.bits}-bit integers in groups of {self.group_size} with scale and bias"

    @property
    def grid(self) -> TableGrid:
        return grid_of(self.bits, self.group_size)

    def of_group_size(self, size: int) -> Format:
        return replace(self, group_size=size)

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 2 * 16 / self.group_size

    def fits(self, name: str, shape: Shape) -> bool:
        """See Format."""
        del name
        return len(shape) == 2 and min(shape) > 0 and not shape[1] % max(self.group_size, _WORD_BITS)

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Weights with biases beside them, of any bits: the first of the formats finds them for all."""
        if quantization.get("quant_method") != METHOD or self.bits != min(WRITTEN_BITS):
            return ()
        modules = [name.removesuffix(".biases") for name in free if name.endswith(".biases")]
        return find_each(modules, lambda module: _find_weight(module, free, quantization), free, METHOD)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> MlxEncoder:
        """See Format. An expert's weight is its share of the tensors of all."""
        if dtype.name not in DENSE or not self.fits(name, shape):
            raise UnsupportedError(
                f"{name} is {dtype} {list(shape)}; {self.name} stores matrices of {', '.join(DENSE)} with inputs in "
                f"whole groups of {self.group_size}: exclude it with --ignore"
            )
        if (place := stacked_expert(name)) is not None:
            name, shape = f"{place.stack}.weight", (1, *shape)
        return MlxEncoder(format_name(self.bits, self.group_size), name, shape, dtype, self.bits, self.grid)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format. mlx-lm goes by which modules have scales."""
        del dtype, quantized, skipped
        return {**self.module_config(), "mode": "affine"}

    def module_config(self) -> Json:
        """See Mixable."""
        return {"group_size": self.group_size, "bits": self.bits}

    def mixed_config(
        self, dtype: Dtype, groups: Sequence[tuple[Mixable, Sequence[str]]], skipped: Sequence[str]
    ) -> Json:
        """See Mixable. Modules that differ from the others have an entry by their path."""
        config = self.quantization_config(dtype, groups[0][1], skipped)
        others = {
            _path(name): storage_format.module_config()
            for storage_format, names in groups[1:]
            for name in names
        }
        return {**config, **others}


def _path(name: str) -> str:
    """Path of the module that holds a weight, where mlx-lm has it."""
    place = stacked_expert(name)
    return module_of(name) if place is None else place.stack


WRITTEN_BITS = (4, 8)
