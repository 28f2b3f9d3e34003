"""The header of a safetensors file: which tensors it holds and where. Trusts nothing it reads.

    file    = length (8 bytes, little-endian) · header (length bytes of JSON) · data
    header  = {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {str: str}}

Offsets count from the start of the data; tensors cover it without holes or overlap. Format and limits:
https://github.com/huggingface/safetensors, README ("Format") and `safetensors/src/tensor.rs`. That reader
lets a repeated tensor name pass, the last one winning, so an official `safe_open` does not replace this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import DTYPES, PACKED, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import read_start

MAX_HEADER_BYTES = 100_000_000  # MAX_HEADER_SIZE in tensor.rs
_MAX_BYTES = 2**63 - 1
_LENGTH_BYTES = 8
_FIRST_BYTES = 2**16
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
# What a file that is not safetensors may begin with, most telling first.
_OTHERS: Sequence[tuple[tuple[bytes, ...], str]] = (
    (
        (b"version https://git-lfs",),
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder",
    ),
    ((b"PK\x03\x04",), "a zip archive, probably a PyTorch pickle; convert it to safetensors first"),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a Python pickle; convert it to safetensors first",
    ),
    ((b"GGUF",), "a GGUF file; give the safetensors checkpoint it was made from"),
    (
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"),
        "a web page, probably an error page; download it again",
    ),
    ((b"\x89HDF",), "an HDF5 file; convert it to safetensors first"),
)


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One entry of a header; `start` and `end` are bytes from the start of the data."""

    name: str
    dtype: Dtype
    shape: Shape
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `tensors` are in file order; `data_start` counts from the start of the file.

    `raw` is the file up to `data_start`, as it stands, and `sha256` its hash.
    """

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]
    data_start: int
    raw: bytes
    sha256: str


def read_header(file: SourceFile, read: Callable[[SourceFile, int], bytes] = read_start) -> Header:
    """The checked header of `file`. Raises CheckpointError.

    `read` gives the first bytes of a file, from wherever it is. Most headers need one call.
    """
    raw = read(file, _FIRST_BYTES)
    data_start = _data_start(raw, file.size, file.name)
    if data_start > len(raw) and file.size > len(raw):
        raw = read(file, data_start)
    return parse_header(raw, file.size, file.name)


def parse_header(raw: bytes, file_size: int, file_name: str) -> Header:
    """The checked header in `raw`: the first bytes of a file of `file_size` bytes, at least to its data."""
    data_start = _data_start(raw, file_size, file_name)
    text = raw[_LENGTH_BYTES:data_start]
    if len(raw) < data_start:
        raise CheckpointError(
            f"{file_name} is cut short: {len(raw)} of {data_start} bytes of its header are there"
        )
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file_name}: the header must begin with '{{', found {shown(text[:16])}")
    fields = parse_object(text, f"{file_name}: the header")
    metadata = _metadata(fields.pop(_METADATA, {}), file_name)
    # What was parsed goes as it is checked: of a hundred thousand tensors, it takes 70 MB.
    tensors = [_tensor(name, fields.pop(name), file_name) for name in list(fields)]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_cover(tensors, file_size - data_start, file_name)
    start = raw[:data_start]
    digest = hashlib.sha256(start).hexdigest()
    return Header(tuple(tensors), MappingProxyType(metadata), data_start, start, digest)


def build_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str], align: int = 4096) -> bytes:
    """The first bytes of a file that holds `tensors` in this order: everything before its data.

    Spaces after the JSON, which the format allows, make the data start at a multiple of `align`, so that it
    lies on the blocks of the disk.
    """
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        if not tensor.name or tensor.name in fields or tensor.name == _METADATA:
            raise ValueError(f"a header cannot have a tensor named {tensor.name!r} (again)")
        start, end = end, end + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype.code,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = -(-(_LENGTH_BYTES + len(text)) // align) * align - _LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"a shard of {len(tensors)} tensors would need a header of {length} bytes and readers stop at"
            f" {MAX_HEADER_BYTES}; ask for smaller shards"
        )
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _data_start(start: bytes | bytearray, file_size: int, file_name: str) -> int:
    """Offset at which the data begins, from the first bytes of the file; here other kinds of files are recognised."""
    if not file_size:
        raise CheckpointError(f"{file_name} is empty; download it again")
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if file_size >= _LENGTH_BYTES and length <= min(MAX_HEADER_BYTES, file_size - _LENGTH_BYTES):
        return _LENGTH_BYTES + length
    if other := recognise(start):
        raise CheckpointError(f"{file_name} must be a safetensors file, found {other}")
    if file_size >= _LENGTH_BYTES and length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file_name} is cut short: it has {file_size} bytes, and its header alone {length};"
            " download it again"
        )
    raise CheckpointError(
        f"{file_name} must be a safetensors file, found one of {file_size} bytes that begins with"
        f" {shown(bytes(start[:16]))}"
    )


def recognise(start: bytes | bytearray) -> str | None:
    """Kind of a file that begins with `start`, and what to do about it; None if it cannot be told."""
    return next((what for magics, what in _OTHERS if start.startswith(magics)), None)


def _metadata(found: object, file_name: str) -> dict[str, str]:
    if found is None:  # as MLX writes where there is none
        return {}
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    raise CheckpointError(f"{file_name}: __metadata__ must map strings to strings, found {shown(found)}")


class _Where(NamedTuple):
    """A tensor as messages name it; most are never written, and a header may have a hundred thousand tensors."""

    file_name: str
    name: str

    def __str__(self) -> str:
        return f"{self.file_name}: tensor {shown(self.name)}"


def _tensor(name: str, entry: object, file_name: str) -> HeaderTensor:
    where = _Where(file_name, name)
    if not name:
        raise CheckpointError(f"{file_name}: a tensor has an empty name")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets only, found {shown(entry)}")
    dtype = _dtype(entry["dtype"], where)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: the shape must be a list of sizes, found {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [start, end], found {shown(offsets)}")
    nbytes = _nbytes(shape, dtype, where)
    start, end = offsets
    if end - start != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} {shown(shape)} takes {nbytes} bytes, and data_offsets {shown(offsets)}"
            f" have {end - start}"
        )
    return HeaderTensor(name, dtype, tuple(shape), start, end)


def _dtype(code: object, where: _Where) -> Dtype:
    if isinstance(code, str):
        if code in DTYPES:
            return DTYPES[code]
        if code in PACKED:
            return PACKED[code]
    known = ", ".join((*DTYPES, *PACKED))
    raise CheckpointError(f"{where}: dtype must be one of {known}, found {shown(code)}")


def _are_sizes(found: object) -> bool:
    # `type(x) is int`: JSON's true is an int to Python, too.
    if not isinstance(found, list):
        return False
    for item in found:  # noqa: SIM110  a generator would take twice the time, on every entry of every header
        if type(item) is not int or not 0 <= item <= _MAX_BYTES:
            return False
    return True


def _nbytes(shape: Iterable[int], dtype: Dtype, where: _Where) -> int:
    """Bytes of the tensor; a product that 64 bits cannot hold is refused even where a later 0 saves it."""
    elements = 1
    for size in shape:
        elements *= size
        if elements * dtype.itemsize > _MAX_BYTES:
            raise CheckpointError(f"{where}: shape {shown(shape)} overflows 64 bits")
    if elements % dtype.block:
        raise CheckpointError(f"{where}: {dtype} {shown(shape)} is no whole number of bytes")
    return dtype.nbytes((elements,))


def _check_cover(tensors: Sequence[HeaderTensor], data_bytes: int, file_name: str) -> None:
    """Tensors, sorted by offset, cover the data from 0 to its end, without holes or overlap."""
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the one before" if tensor.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{file_name}: tensor {shown(tensor.name)} {fault}: it starts at byte {tensor.start} of the"
                f" data, expected {end}"
            )
        end = tensor.end
    if end > data_bytes:
        raise CheckpointError(
            f"{file_name} is cut short: the header describes {end} bytes of data, {data_bytes} are there;"
            " download it again"
        )
    if end < data_bytes:
        raise CheckpointError(
            f"{file_name}: the header describes {end} bytes of data, {data_bytes} are there;"
            " the rest belongs to no tensor"
        )
