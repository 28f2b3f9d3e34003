"""Protocols of a format: one weight becomes tensors, and tensors become a weight again.

A *weight* is one parameter of the model, however many *parts* (stored tensors) hold it. One part, the
*main* part, is read and written in row tiles; the others (scales, tables, a JSON state) are at most 1/16 of
the 16-bit size, and are kept whole while the weight is worked on. So is a main part that a file holds in another order
than by rows.

Work is done in *cells* of consecutive rows at full width, `CELL_ROWS` or a multiple of them. 64 rows of any width are
a multiple of 64 elements, so a bitsandbytes block never straddles two cells, and the maths of a cell never depends on
how many cells a tile holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.kernels.grids import Grid

CELL_ROWS = 64

Json = dict[str, Any]


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a weight as it is worked on: all but the last axis, and the last axis."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


class Order(Protocol):
    """Order of a main part's bytes in a file where those of a row do not follow each other.

    Wherever they are worked with, they are in *row form*: row after row, `row_offset` bytes before each. A file holds
    as many bytes, in `lines` of `line_bytes` each, and a line has something of every row. Any run of lines can be
    turned on its own, so that beside the row form, which is held whole, no more than such a run is in memory.
    """

    @property
    def lines(self) -> int: ...

    @property
    def line_bytes(self) -> int: ...

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """Write `lines` of the file to `out`, from the row form of the whole part (both uint8, flat)."""

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """Put `lines`, whose bytes are `raw`, to their places in the row form."""


def parts_of(
    name: str, names: Mapping[str, str], free: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Tensors of the weight `name` by role, called as `names` says. Raises CheckpointError if one is missing."""
    for part in names.values():
        if part not in free:
            raise CheckpointError(
                f"{part} is missing, without which {name} cannot be decoded; the checkpoint is incomplete, download it "
                "again"
            )
    return {role: free[part] for role, part in names.items()}


class Decoder(Protocol):
    """Reader of a stored weight. Plain data found in headers; `main` names the part read in row tiles."""

    @property
    def main(self) -> str: ...

    @property
    def order(self) -> Order | None:
        """Order of the main part in the file; None where that is its row form."""

    @property
    def grid(self) -> Grid | None:
        """The grid its codes lie on; None for dense storage."""

    def row_offset(self, row: int) -> int:
        """Bytes of the main part before `row`; `row` is a multiple of CELL_ROWS, or the number of rows."""

    def scales(self, side: Mapping[str, Tensor]) -> Tensor | None:
        """Effective float32 scale of every block, from the other parts; None for dense storage.

        On a grid with offsets, [blocks, 2]: scale and offset. On the device of `side`. Raises CheckpointError where a
        scale is not finite.
        """

    def codes(self, raw: Tensor, rows: range) -> Tensor:
        """Codes (uint8, one an element, flat) of `rows` from their bytes in the main part's row form."""

    def decode(self, raw: Tensor, rows: range, scales: Tensor | None, out: Tensor) -> Tensor:
        """Write what a loader would see of `rows` to `out` (float32 [rows, columns]); return it.

        `raw` holds just the bytes of these rows (uint8, flat), `scales` just those of their blocks; `rows`
        start on a cell. Values are those the loader's library dequantizes to, its cast to the weight's own
        dtype included.
        """


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the model as a checkpoint stores it; `shape` and `dtype` are the decoded ones.

    Some formats decode to float32 and do not store the type the weight had; `dtype` is then that of the weights
    around it. `format` is the key in FORMATS of the encoder that would store it in the same way; else, in words, how it
    differs (`nf4, blocksize 128`, or `I64`, which can be copied but not decoded). `keep` is the encoder that stores it
    in the very way of its file, names and types included; None where that is what the format's own encoder does.
    `undecoded` says why it can only be copied, and what to do where it would have to be decoded; None where it can be.
    """

    name: str
    shape: Shape
    dtype: Dtype
    format: str
    decoder: Decoder
    parts: Mapping[str, StoredTensor]
    keep: Encoder | None = None
    undecoded: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored otherwise than as numbers, or in a way that is not known."""
        return self.decoder.grid is not None or self.undecoded is not None


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor whose bytes are known before anything is read."""

    spec: TensorSpec
    content: bytes

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


class Encoder(Protocol):
    """Writer of one weight. Made when planning; knows every part's name, type and shape."""

    @property
    def format(self) -> str:
        """Its key in FORMATS."""

    @property
    def dtype(self) -> Dtype:
        """The type of the weight, where it is stored dense."""

    @property
    def dequantized_dtype(self) -> Dtype:
        """The type in which the loader's library hands out what it decodes."""

    @property
    def grid(self) -> Grid | None: ...

    @property
    def nested(self) -> bool:
        """Whether scales are themselves quantized, so that their effective values need all of them first."""

    @property
    def rounds_scales(self) -> bool:
        """Whether storing rounds each scale on its own, so that codes are to be chosen with what becomes of it.

        Effective scales are then known cell by cell, and those of effective scales are the same again. (Or together
        with those of its cell, of whose rows a block may have several.)
        """

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Parts in file order: the main part first, then those that `finish` returns; they lie together in the file."""

    @property
    def order(self) -> Order | None:
        """Order of the main part in the file, as for Decoder."""

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Tensors beside the parts that are the same for any values, and may lie anywhere in the file."""

    @property
    def cell_rows(self) -> int:
        """Rows whose scales are decided together: CELL_ROWS, or a multiple where blocks have more rows than one."""

    def row_offset(self, row: int) -> int:
        """Bytes of the main part before `row`, as for Decoder."""

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """Write the main part's bytes of a cell, in row form, to `out` (uint8, flat).

        `values` are uint8 codes (flat) if there is a grid, else the float32 cell, rounded here once; what does not fit
        becomes infinite, and whoever asked has to look. `scales` are the effective ones of the cell's blocks, for
        storage that has them between the codes; those that will be nested are as they were chosen. None if dense.
        """

    def effective_scales(self, scales: Tensor) -> Tensor:
        """Scales that a loader will multiply codes by when `scales` (float32, one a block) have been stored."""

    def finish(self, scales: Tensor | None, kept: Mapping[str, Tensor] | None) -> tuple[bytes, ...]:
        """Bytes of the parts after the main part, in the order and lengths of `parts`.

        Raises InputError where a scale is not finite.

        `scales` are float32, one a block, with offsets [blocks, 2], as the rounding chose them. `kept` are the side
        parts of the base weight where it has this very format and its scales stay: they are then written as they are,
        because rounding nested scales a second time would move them.
        """


@runtime_checkable
class Nesting(Encoder, Protocol):
    """An Encoder that may quantize scales themselves, all of a weight's together, which takes time: once is enough."""

    def nest(self, scales: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """Side parts that store `scales` (float32, one a block), as `finish` takes those of a base; and effective
        scales of these.

        Where all scales are finite: of others, `finish` raises InputError.
        """


class ScaleScope(StrEnum):
    """Weights whose greatest magnitude a scale is made of: one alone, or with those that a loader joins it with."""

    WEIGHT = "weight"
    PARTNERS = "partners"


@runtime_checkable
class Surveyed(Encoder, Protocol):
    """An Encoder with a scale for all of a weight, for which all targets are seen once before the first code is chosen.

    `planning/partners.py` says which weights a loader joins. What needs scales raises AssertionError until it is known.
    """

    @property
    def scope(self) -> ScaleScope: ...

    @property
    def is_known(self) -> bool:
        """Whether the scale is there: the base's own, say, which stays."""

    def knowing(self, greatest: float) -> Self:
        """The same with the scale for targets of that greatest magnitude (finite, not negative)."""

    def following(self, decoder: Decoder) -> Self:
        """The same with the scale of a base's weight that is stored in this way; itself where it is stored in another.

        Partners that no update touches are copied with that scale.
        """

    def raised(self, greatest: float) -> Self:
        """The same with a scale of the base raised where targets of that greatest magnitude go far beyond it; else
        itself.

        Partners that no update touches must be able to have it as well, and keep their values.
        """

    def outgrows(self, scales: Tensor) -> bool:
        """Whether targets go so far beyond effective `scales` of the base that these are not to be kept."""


@runtime_checkable
class Overwriting(Encoder, Protocol):
    """An Encoder of a base's own storage, with scales between the codes, that changes no more of its bytes than codes.

    Weights that it is for lie on its grid, and their decoders know no scales but those of a cell's bytes.
    """

    def unpacked(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8, flat) and effective scales (float32, one a block) of a cell of the base (uint8, flat)."""

    def overwrite(self, codes: Tensor, out: Tensor) -> None:
        """Write codes (uint8, flat) over those of a cell of the base (uint8, flat), whose scales stay to the byte."""


@runtime_checkable
class InputMeasured(Encoder, Protocol):
    """An Encoder that may store a scale of what the weight is multiplied by, which a text tells.

    What needs the scale raises AssertionError until it is known.
    """

    @property
    def is_measured(self) -> bool:
        """Whether the scale is there, or none is stored."""

    def measuring(self, greatest: float) -> Self:
        """The same with the scale for inputs of that greatest magnitude (finite, not negative)."""

    def inheriting(self, decoder: Decoder) -> Self:
        """The same with the scale that a base's weight has beside it; itself where it has none."""


def wrong(tensor: StoredTensor, expected: str) -> CheckpointError:
    """Error for a part that has another type or shape than `expected`, in words."""
    found = f"{tensor.dtype} {list(tensor.shape)}"
    return CheckpointError(f"{tensor.file.name}: {tensor.name}: found {found}, expected {expected}")


def check_tensor(tensor: StoredTensor, codes: tuple[str, ...], shapes: tuple[Shape, ...]) -> None:
    """Raise CheckpointError unless a part has one of these types and shapes."""
    if tensor.dtype.code in codes and tensor.shape in shapes:
        return
    expected = " or ".join(str(list(shape)) for shape in shapes)
    raise wrong(tensor, f"{' or '.join(codes)} {expected}")


def config_says(where: str) -> str:
    """Beginning of a message about the config of the checkpoint at `where`."""
    return f"{where}: config.json says that the checkpoint is"


def refusal(where: str, kind: str) -> UnsupportedError:
    """Error for a quantization of that `kind`, which is recognised but not read."""
    return UnsupportedError(f"{where} {kind}, which is not supported yet; give the 16-bit base model instead")


def any_config(config: Mapping[str, Any], where: str) -> None:
    """Check of a method all of whose variants are read."""
    del config, where


def _nothing_said(weights: Iterable[Weight], config: Mapping[str, Any], where: str) -> None:
    del weights, config, where


@dataclass(frozen=True, slots=True)
class Marks:
    """Signs of a format in a checkpoint's names, types and config, beside those that `find` goes by.

    `side_suffixes`: endings of tensors that mean nothing without the weight they belong to. `codes`: by the type of
    tensors that mean nothing alone what they hold, and what must be beside them; for messages. `owned`: last
    components of tensors that `find` takes or refuses, where the config has one of the methods and the first of them
    is in the same module. `methods`: values of the config's `quant_method` whose weights it finds, each with a check
    that raises UnsupportedError for a variant that is not read. `described` raises CheckpointError where weights are
    stored otherwise than such a config says, by which loaders go.
    """

    side_suffixes: tuple[str, ...] = ()
    codes: Mapping[Dtype, tuple[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    owned: tuple[str, ...] = ()
    methods: Mapping[str, Callable[[Mapping[str, Any], str], None]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    described: Callable[[Iterable[Weight], Mapping[str, Any], str], None] = _nothing_said


NO_MARKS = Marks()


class Format(Protocol):
    """One row of the table that `streamconv formats` prints; see FORMATS in `formats/__init__.py`."""

    @property
    def name(self) -> str: ...

    @property
    def grid(self) -> Grid | None:
        """The grid its codes lie on; None for dense storage."""

    @property
    def bits_per_weight(self) -> float: ...

    @property
    def layout(self) -> str:
        """A phrase for how it stores a weight."""

    @property
    def loaders(self) -> str:
        """Programs that open it by their documentation, with commas between them."""

    @property
    def library(self) -> str | None:
        """The package that transformers needs to open it."""

    @property
    def load_in(self) -> Mapping[str, str | bool] | None:
        """Settings of transformers' BitsAndBytesConfig that round a 16-bit base to it while loading, as QLoRA training
        does and `--merge-base` then means; None where training has no such way.
        """

    @property
    def config_copy(self) -> str | None:
        """Name of a file where older loaders look for what config.json has as quantization_config; None: nowhere."""

    @property
    def marks(self) -> Marks:
        """Signs by which checkpoints of this format are recognised, and broken ones refused."""

    @property
    def skips_by_path(self) -> bool:
        """Whether its config names modules left in 16 bit by whole paths; else as `formats/linear.py` has it."""

    @property
    def expert_loaders(self) -> tuple[str, ...]:
        """Programs that open it with experts quantized, each in tensors of its own; where none does, they stay in 16
        bit.
        """

    def fits(self, name: str, shape: Shape) -> bool:
        """Whether it can store the weight [out, in] of a Linear, and loaders expect it; else it stays in 16 bit."""

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """Weights of this format among the tensors no other format has claimed yet.

        From headers, the config's `quantization_config` (empty where it has none) and small tensors only. Raises
        CheckpointError where the parts of a weight are incomplete or disagree.
        """

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> Encoder:
        """Encoder of a weight; raises UnsupportedError where this format cannot hold such a shape."""

    def quantization_config(
        self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]
    ) -> Json | None:
        """The `quantization_config` a loader needs; None if dense.

        `quantized` are names of weights, `skipped` is the skip list that goes with them (`formats.linear`). Raises
        UnsupportedError where a config of this format cannot tell the ones from the others.
        """


class Reader(Protocol):
    """A storage that is read and not written; every Format is one."""

    @property
    def marks(self) -> Marks:
        """See Format."""

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format."""


@runtime_checkable
class Grouped(Format, Protocol):
    """A Format whose scales are each of a group of a row's elements, a number that can be chosen."""

    @property
    def group_size(self) -> int: ...

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Those that it can have."""

    def of_group_size(self, size: int) -> Format:
        """The same with groups of `size`, one of `group_sizes`."""


@runtime_checkable
class EmbeddingStore(Format, Protocol):
    """A Format whose loaders look rows of an embedding up in quantized storage, too, and take quantized heads."""

    @property
    def takes_embeddings(self) -> bool: ...


@runtime_checkable
class InputScaled(Format, Protocol):
    """A Format that may have its loaders round inputs by a scale that is stored: its encoders are InputMeasured."""

    @property
    def measures_inputs(self) -> bool: ...


@runtime_checkable
class Mixable(Format, Protocol):
    """A Format whose config can say of each module how it is stored, so that a checkpoint may have several formats."""

    @property
    def family(self) -> str:
        """Name of the formats that one checkpoint may have beside each other."""

    @property
    def has_partners(self) -> bool:
        """Whether a loader makes one layer of several modules (`targets.fused_layer`), which must share a format."""

    def module_config(self) -> Json:
        """Settings by which the config says that modules are stored in this format."""

    def mixed_config(
        self, dtype: Dtype, groups: Sequence[tuple[Mixable, Sequence[str]]], skipped: Sequence[str]
    ) -> Json:
        """The `quantization_config` of weights in several formats, this one first; as `quantization_config` else.

        `groups`: formats of this family, each with the names of its weights.
        """


GROUP_SIZES = (32, 64, 128)
USUAL_GROUP_SIZE = 128
_GROUP_SIZE = ", group size "


def grouped_name(name: str, size: int, usual: int = USUAL_GROUP_SIZE) -> str:
    """Name that encoders and weights give the format `name` with groups of `size`, which most have of the `usual`."""
    return name if size == usual else f"{name}{_GROUP_SIZE}{size}"


def group_of(name: str) -> tuple[str, int | None]:
    """Undo `grouped_name`, where it names groups of another size than the usual one."""
    plain, _, size = name.partition(_GROUP_SIZE)
    return (plain, int(size)) if size.isdecimal() else (name, None)
