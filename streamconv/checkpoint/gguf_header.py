"""The header of a GGUF file, written: its pairs, and which tensors it holds and where (`checkpoint/gguf.py`).

Version 3, little-endian, tensors at multiples of 32. Of a model in several files each names the others (`split.*`), and
only the first has the pairs of the model, as llama.cpp's `gguf-split` writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from streamconv.checkpoint.gguf import MAGIC, GgufFile
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import GGML_NUMBERS

ALIGNMENT = 32
"""Bytes that data and every tensor start at a multiple of: what readers take where the file does not say."""

_VERSION = 3
_ARRAY, _STRING = 9, 8
_CODES: Mapping[int, str] = {2: "H", 4: "I", 5: "i", 6: "f", 7: "?"}


@dataclass(frozen=True, slots=True)
class GgufValue:
    """A value of a pair: GGUF's number of its type, and of an array that of its items. Bytes are as a file has them."""

    kind: int
    value: bytes | str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]
    items: int | None = None


Pairs = Mapping[str, GgufValue]


def u16(value: int) -> GgufValue:
    return GgufValue(2, value)


def u32(value: int) -> GgufValue:
    return GgufValue(4, value)


def i32(value: int) -> GgufValue:
    return GgufValue(5, value)


def f32(value: float) -> GgufValue:
    return GgufValue(6, value)


def flag(value: bool) -> GgufValue:
    return GgufValue(7, value)


def text(value: str) -> GgufValue:
    return GgufValue(_STRING, value)


def texts(values: Sequence[str]) -> GgufValue:
    return GgufValue(_ARRAY, values, _STRING)


def i32s(values: Sequence[int]) -> GgufValue:
    return GgufValue(_ARRAY, values, 5)


def f32s(values: Sequence[float]) -> GgufValue:
    return GgufValue(_ARRAY, values, 6)


def flags(values: Sequence[bool]) -> GgufValue:
    return GgufValue(_ARRAY, values, 7)


def stored_value(file: GgufFile, key: str) -> GgufValue:
    """The value of a key of a file, to the byte."""
    place = file.values[key]
    raw = file.raw[place.start : place.stop]
    return GgufValue(int.from_bytes(raw[:4], "little"), raw[4:])


def padding(size: int) -> int:
    """Bytes after so many up to the next place where a tensor may start."""
    return -size % ALIGNMENT


def build_gguf_header(pairs: Pairs, tensors: Sequence[TensorSpec]) -> bytes:
    """The first bytes of a file that holds `tensors` in this order, each padded: everything before its data."""
    head = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(pairs)))
    for key, value in pairs.items():
        head += _string(key) + struct.pack("<I", value.kind)
        head += _bytes(value)
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        head += _string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", GGML_NUMBERS[tensor.dtype.code], offset)
        offset += tensor.nbytes + padding(tensor.nbytes)
    return bytes(head) + bytes(padding(len(head)))


def split_pairs(number: int, count: int, tensors: int) -> Pairs:
    """Pairs of file `number` of `count` that say which it is, and how many tensors all have together."""
    return {"split.no": u16(number), "split.count": u16(count), "split.tensors.count": i32(tensors)}


def _bytes(value: GgufValue) -> bytes:
    if isinstance(value.value, bytes):
        return value.value
    if value.items is None:
        return _string(str(value.value)) if value.kind == _STRING else _number(value.kind, value.value)
    assert isinstance(value.value, Sequence)
    head = struct.pack("<IQ", value.items, len(value.value))
    if value.items == _STRING:
        return head + b"".join(_string(str(item)) for item in value.value)
    return head + b"".join(map(_number, repeat(value.items), value.value))


def _number(kind: int, value: object) -> bytes:
    return struct.pack(f"<{_CODES[kind]}", value)


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
