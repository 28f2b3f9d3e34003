"""The header of a GGUF file: its key-value pairs, and which tensors it holds and where. Trusts nothing it reads.

    file    = "GGUF" · version u32 · tensors u64 · pairs u64 · pair* · tensor* · padding · data
    string  = length u64 · bytes
    pair    = key string · type u32 · value;  an array: type u32 · count u64 · value*
    tensor  = name string · axes u32 · size u64, fastest axis first · type u32 · offset u64, from the start of the data

Everything is little-endian; data and every tensor start at a multiple of `general.alignment` (32). Format and numbers:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import BF16, F16, F32, GGML_TYPES, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import read_start

MAGIC = b"GGUF"
_FIRST_BYTES = 2**16
_MAX_HEADER_BYTES = 2**25  # a vocabulary of a model takes a few MiB, an adapter has none
_MAX_AXES = 4  # GGML_MAX_DIMS
_MAX_BYTES = 2**63 - 1
_VERSIONS = (2, 3)

Value = str | int | float | bool | tuple[object, ...]

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9
_DENSE: Mapping[int, Dtype] = MappingProxyType(
    {number: dtype for number, dtype in GGML_TYPES.items() if dtype in (F32, F16, BF16)}
)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header. `pairs` by key, `tensors` by name, their shapes as PyTorch has them; `raw` its bytes.

    `values` are the bytes of `raw` with the value of each key, the number of its type first.
    """

    pairs: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    raw: bytes
    values: Mapping[str, range]


def read_gguf(
    file: SourceFile,
    read: Callable[[SourceFile, int], bytes] = read_start,
    types: Mapping[int, Dtype] = _DENSE,
) -> GgufFile:
    """The checked header of `file`. Raises CheckpointError; UnsupportedError for a type that is not one of `types`."""
    length = _FIRST_BYTES
    while True:
        raw = read(file, min(length, _MAX_HEADER_BYTES))
        try:
            return _parse(raw, file, types)
        except EOFError as error:
            if len(raw) >= file.size:
                raise CheckpointError(
                    f"{file.name} is cut short: its header does not end within its {file.size} bytes"
                ) from error
            if length >= _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file.name}: its header takes more than {_MAX_HEADER_BYTES} bytes, which none needs"
                ) from error
        length *= 8


def _parse(raw: bytes, file: SourceFile, types: Mapping[int, Dtype]) -> GgufFile:
    cursor = _Cursor(raw, file.name)
    if not raw.startswith(MAGIC):
        raise CheckpointError(f"{file.name} must be a GGUF file, found one that begins with {shown(raw[:4])}")
    cursor.place = len(MAGIC)
    version = cursor.number("I")
    if version not in _VERSIONS:
        is_big = int.from_bytes(int(version).to_bytes(4, "little"), "big") in _VERSIONS
        what = "written for big-endian machines" if is_big else f"of version {version}"
        raise UnsupportedError(f"{file.name} is {what}; supported is GGUF of version 2 and 3, little-endian")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    found: dict[str, Value] = {}
    values: dict[str, range] = {}
    for _ in range(int(pairs)):
        key = cursor.string()
        if key in found:
            raise CheckpointError(f"{file.name}: the key {shown(key)} stands twice")
        start = cursor.place
        found[key] = cursor.value(int(cursor.number("I")))
        values[key] = range(start, cursor.place)
    entries = [_entry(cursor) for _ in range(int(tensors))]
    alignment = found.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{file.name}: general.alignment must be a size, found {shown(alignment)}")
    start = -(-cursor.place // alignment) * alignment
    stored = _stored(entries, start, alignment, file, types)
    return GgufFile(
        MappingProxyType(found), MappingProxyType(stored), raw[: cursor.place], MappingProxyType(values)
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.string()
    axes = int(cursor.number("I"))
    if axes > _MAX_AXES:
        raise CheckpointError(
            f"{cursor.file_name}: tensor {shown(name)} has {axes} axes, a GGUF tensor {_MAX_AXES} at most"
        )
    sizes = tuple(int(cursor.number("Q")) for _ in range(axes))
    return _Entry(name, sizes[::-1], int(cursor.number("I")), int(cursor.number("Q")))


def _stored(
    entries: list[_Entry], start: int, alignment: int, file: SourceFile, types: Mapping[int, Dtype]
) -> dict[str, StoredTensor]:
    """Tensors of handled types, none beyond the file, none over another."""
    found: dict[str, StoredTensor] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        where = f"{file.name}: tensor {shown(entry.name)}"
        dtype = _dtype(entry, where, types)
        nbytes = dtype.nbytes(entry.shape)
        if entry.name in found or not entry.name:
            raise CheckpointError(f"{where} stands twice, or has no name")
        if entry.offset % alignment or entry.offset < end or nbytes > _MAX_BYTES:
            raise CheckpointError(
                f"{where} lies over another, or where none may begin, at byte {entry.offset}"
            )
        end = entry.offset + nbytes
        if start + end > file.size:
            raise CheckpointError(f"{where} ends beyond the file, which was cut short; download it again")
        found[entry.name] = StoredTensor(entry.name, dtype, entry.shape, file, start + entry.offset)
    return found


def _dtype(entry: _Entry, where: str, types: Mapping[int, Dtype]) -> Dtype:
    """Type of a tensor. Raises UnsupportedError where it is not handled, CheckpointError for rows in broken blocks."""
    dtype = types.get(entry.type)
    if dtype is None:
        known = GGML_TYPES.get(entry.type)
        kind = known.code if known is not None else f"type {entry.type}"
        raise UnsupportedError(f"{where} is stored as {kind}, expected F32, F16 or BF16")
    if dtype.block > 1 and (not entry.shape or entry.shape[-1] % dtype.block):
        raise CheckpointError(
            f"{where} has rows of {entry.shape[-1:] or 'no'} elements, and {dtype} is made of blocks of {dtype.block}"
        )
    return dtype


class _Cursor:
    """A place in the first bytes of a file. Reading beyond them raises EOFError: more are needed, or there are none."""

    def __init__(self, raw: bytes, file_name: str) -> None:
        self._raw = raw
        self.file_name = file_name
        self.place = 0

    def number(self, code: str) -> int | float:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack(f"<{code}", self._take(size))
        assert isinstance(value, int | float)
        return value

    def string(self) -> str:
        raw = self._take(int(self.number("Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file_name}: its header has a text that is not UTF-8") from error

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(
                f"{self.file_name}: its header has a value of type {kind}, which GGUF does not know"
            )
        inner, count = int(self.number("I")), int(self.number("Q"))
        if inner == _ARRAY or (inner != _STRING and inner not in _SCALARS):
            raise UnsupportedError(
                f"{self.file_name}: its header has an array of type {inner}, which is not handled"
            )
        least = 8 if inner == _STRING else struct.calcsize(f"<{_SCALARS[inner]}")
        if count * least > len(self._raw) - self.place:  # before any is made: a count may be anything
            raise EOFError
        return tuple(self.value(inner) for _ in range(count))

    def _take(self, size: int) -> bytes:
        if size > len(self._raw) - self.place:
            raise EOFError
        start, self.place = self.place, self.place + size
        return self._raw[start : self.place]
