"""Weights of a GGUF base that stay as their file has them: types, order of rows, and bytes of all that is not changed.

Types that are only read are copied; what llama.cpp calls files of them (`llama.h`, enum llama_ftype) are formats that
an output has because its base has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Encoder, Format, Weight
from streamconv.formats.dense import DenseDecoder, DenseEncoder
from streamconv.formats.ggml_blocks import OF_GGUF, GgmlDecoder, ShiftedDecoder
from streamconv.formats.gguf import PREFIX, InGgufFile, ReorderedEncoder, ShiftedEncoder
from streamconv.formats.gguf_blocks import BLOCK_FORMATS, BlocksEncoder
from streamconv.kernels.ggml import BLOCK_TYPES, BlockType
from streamconv.kernels.ggml.grids import grid_of, overwrite, unpacked
from streamconv.kernels.grids import TableGrid

_NAMES = (
    "f32 f16 q4_0 q4_1 - - - q8_0 q5_0 q5_1 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq2_xxs iq2_xs"
    " q2_k_s iq3_xs iq3_xxs iq1_s iq4_nl iq3_s iq3_m iq2_s iq2_m iq4_xs iq1_m bf16 - - - tq1_0 tq2_0 mxfp4_moe nvfp4"
)
FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {number: name for number, name in enumerate(_NAMES.split()) if name != "-"}
)
"""What `general.file_type` calls files, by its number."""

# Types that most matrices of such files have, where they are not called by one.
_MOST = {"iq2_m": "iq2_s", "iq3_xs": "iq3_s", "iq3_m": "iq3_s", "mxfp4_moe": "mxfp4"}


@dataclass(frozen=True, slots=True)
class KeptBlocksDecoder(GgmlDecoder):
    """Rows of blocks whose codes stay on the type's own grid."""

    @property
    def grid(self) -> TableGrid:  # type: ignore[override]  # elsewhere nothing is rounded to it
        return grid_of(self.kind)


@dataclass(frozen=True, slots=True)
class KeptBlocksEncoder(BlocksEncoder):
    """See Overwriting."""

    def unpacked(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """See Overwriting."""
        return unpacked(self.kind, raw)

    def overwrite(self, codes: Tensor, out: Tensor) -> None:
        """See Overwriting."""
        overwrite(self.kind, codes, out)


def in_place(weight: Weight, spec: TensorSpec) -> tuple[Weight, Encoder] | None:
    """A weight of a GGUF file on the grid of its type, and the encoder that stores it as it is there, as `spec`.

    None for types that are only read, and for a weight of two tensors. What the adapter holds whole has `weight`'s
    place.
    """
    decoder = weight.decoder
    # Just these: another kind of theirs may hold a weight otherwise than as one tensor's rows.
    if type(decoder) not in (GgmlDecoder, ShiftedDecoder, DenseDecoder) or len(weight.parts) > 1:
        return None
    if isinstance(decoder, GgmlDecoder):
        if decoder.kind.codes is None:
            return None
        encoder = KeptBlocksEncoder(spec, decoder.kind, order=decoder.order)
        on_grid = KeptBlocksDecoder(decoder.kind, decoder.columns, decoder.order)
        return replace(weight, decoder=on_grid, format=encoder.format), encoder
    if isinstance(decoder, ShiftedDecoder):
        return weight, ShiftedEncoder(spec, shift=decoder.shift)
    if isinstance(decoder, DenseDecoder):
        dense = DenseEncoder(spec)
        return weight, dense if decoder.order is None else ReorderedEncoder(dense, decoder.order)
    return None


def type_named(weight_format: str) -> str | None:
    """Name of the type of blocks that a weight of a GGUF file says that it has; None for other weights."""
    name, ending, _ = weight_format.partition(OF_GGUF)
    return name if ending else None


@dataclass(frozen=True, slots=True)
class KeptGgufFormat(InGgufFile):
    """Files that are called so, whose tensors have many types; `kind` is that of most matrices."""

    name: str
    kind: BlockType

    @property
    def layout(self) -> str:
        """See Format."""
        return f"a GGUF file, ggml's {self.kind.name.upper()}"

    @property
    def grid(self) -> TableGrid | None:
        return grid_of(self.kind) if self.kind.codes is not None else None

    @property
    def bits_per_weight(self) -> float:
        return self.kind.bits

    def fits(self, name: str, shape: Shape) -> bool:
        del name, shape
        return False

    def encoder(self, name: str, shape: Shape, dtype: object) -> Encoder:
        """Raise UnsupportedError: it is kept, and not written anew."""
        del shape, dtype
        raise UnsupportedError(f"{name}: {self.name} is copied, and not written; choose another --quant")


def _kind(name: str) -> BlockType:
    plain = _MOST.get(name, name)
    # Of a mix, q4_k_m, the last part of the name says how much is in other types.
    return BLOCK_TYPES.get(plain) or BLOCK_TYPES[plain.rpartition("_")[0]]


KEPT_FILES: Mapping[str, KeptGgufFormat] = MappingProxyType(
    {
        PREFIX + name: KeptGgufFormat(PREFIX + name, _kind(name))
        for name in dict.fromkeys((*FILE_TYPES.values(), *BLOCK_TYPES))
    }
)
"""Formats of files by their name, those that are written as well included."""


def written_types(names: Sequence[str]) -> Mapping[str, Format]:
    """Formats of those types that are also written, by what weights of GGUF files are called."""
    found = {name: BLOCK_FORMATS.get(f"{PREFIX}{type_named(name)}") for name in names}
    return {name: each for name, each in found.items() if each is not None}


def file_format_name(file_type: object, elements: Mapping[str, int]) -> str:
    """Name of the format of a file that calls itself `file_type`, whose tensors have so many `elements` of each type.

    Of one that does not call itself by a type that it has, it is that of most elements.
    """
    for number, name in FILE_TYPES.items():
        if file_type == number and KEPT_FILES[PREFIX + name].kind.name in elements:
            return PREFIX + name
    return PREFIX + max(elements, key=lambda each: elements[each])
