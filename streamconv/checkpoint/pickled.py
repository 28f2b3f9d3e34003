"""Tensors of a file that `torch.save` wrote, and where their bytes lie in it.

Such a file is a zip archive: a pickle that says what the tensors are, and the bytes of every storage, not compressed.
The pickle is read under `weights_only`, which makes nothing but tensors and plain containers, and with fake tensors,
which know their place in the file and hold no memory; bytes are then read as those of any other tensor.
"""

from __future__ import annotations

import bisect
import io
import logging
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from streamconv.checkpoint.opcodes import check_opcodes
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import DTYPES
from streamconv.errors import CheckpointError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import reading
from streamconv.system_errors import lacking

_SHOWN = 300

REWRITE = 'python -c "import sys, torch; f = sys.argv[1]; torch.save(torch.load(f, weights_only=True), f)"'
"""Command that makes a file which an old torch.save wrote into a zip archive, in its place."""

MAX_PLAIN_BYTES = 2**20
"""Size of the largest file that `holds_plain_values` is meant for."""
_ZIP = b"PK\x03\x04"
# Opcodes by which a pickle names a class or a function, calls one, or points to the bytes of a tensor.
_MAKING = frozenset(
    {
        *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"),
        *("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER"),
    }
)
# The pickle says names, types and shapes alone, in 300 bytes or so a tensor; the archive's directory has 100 for each.
MAX_PICKLE_BYTES = 64_000_000
_DIRECTORY_END, _DIRECTORY_END_64 = b"PK\x05\x06", b"PK\x06\x06"  # zip's specification, 4.3.14 and 4.3.16
_MAX_DIRECTORY_BYTES = 64_000_000
_TAIL_BYTES = 2**16 + 200
# A pickle is a program, and one that is damaged, or meant to do harm, may fail at any step.
_FAILURES = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
)
_BY_TORCH = {dtype.torch: dtype for dtype in DTYPES.values()}


def read_pickled(file: SourceFile) -> Mapping[str, StoredTensor]:
    """Every tensor of a pickled state dict. Raises CheckpointError for what is not one, or not of this format.

    Tensors that share memory, as tied ones do, share their place in the file.
    """
    _check_directory(file)
    places = _check_archive(file)
    try:
        with _quiet(), FakeTensorMode():
            loaded = torch.load(file.path, weights_only=True)
    except _FAILURES as error:
        raise lacking(error) or _unreadable(file, error) from error
    if isinstance(loaded, dict) and not loaded:
        raise CheckpointError(
            f"{file.name} holds no tensors, as a save leaves it that was interrupted, or that did not gather what"
            " DeepSpeed ZeRO-3 keeps apart; save it again, or take an earlier checkpoint"
        )
    if not isinstance(loaded, dict):
        kind = "a tensor without a name" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise CheckpointError(f"{file.name} must hold tensors by name, found {kind}")
    for name in loaded:
        if not isinstance(name, str):
            raise CheckpointError(f"{file.name} must hold tensors by name, found {shown(name)} as a name")
    return MappingProxyType({name: _stored(name, value, file, places) for name, value in loaded.items()})


def holds_plain_values(raw: bytes) -> bool:
    """Whether a file that torch.save wrote, given whole, holds numbers, texts and containers of them alone.

    The pickle is not loaded, its opcodes are looked through. False for what is no such file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return False
            names = [entry.filename for entry in entries]
            pickles = [archive.read(name) for name in names if name.endswith("/data.pkl")]
        opcodes = {opcode.name for each in pickles for opcode, _, _ in pickletools.genops(each)}
    except (zipfile.BadZipFile, *_FAILURES):
        return False
    return len(pickles) == 1 and not opcodes & _MAKING and not any("/data/" in name for name in names)


def _check_directory(file: SourceFile) -> None:
    """Raise CheckpointError for an archive whose directory would be read whole, and is larger than any needs."""
    with reading(file.name), Path(file.path).open("rb") as opened:
        opened.seek(max(0, file.size - _TAIL_BYTES), os.SEEK_SET)
        tail = opened.read(_TAIL_BYTES)
    for sign, at, length in ((_DIRECTORY_END, 12, 4), (_DIRECTORY_END_64, 40, 8)):
        place = tail.rfind(sign) + at
        size = int.from_bytes(tail[place : place + length], "little") if sign in tail else 0
        if size > _MAX_DIRECTORY_BYTES and size != 2**32 - 1:
            raise CheckpointError(
                f"{file.name} has a directory of {size} bytes, more than the {_MAX_DIRECTORY_BYTES} that a file of"
                " tensors may have; copy it again, or save it as safetensors"
            )


def _check_archive(file: SourceFile) -> tuple[tuple[int, int], ...]:
    """Place of each entry's header in the archive and size of its content, in order.

    Raises CheckpointError unless it is a zip archive with the bytes of tensors as they are, and what it says of them is
    short, and makes tensors alone.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = archive.infolist()
            _check_entries(entries, file)
            orders = [_start(archive, entry) for entry in entries if entry.filename.endswith("/byteorder")]
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    check_opcodes(archive.read(entry), len(entries), file.name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        with reading(file.name), Path(file.path).open("rb") as opened:
            begun = opened.read(len(_ZIP)) == _ZIP
        if begun:
            raise CheckpointError(
                f"{file.name} is no whole zip archive ({error}); it was cut short, copy it again"
            ) from error
        raise CheckpointError(
            f"{file.name} is no zip archive, as torch.save writes since 1.6, so its tensors cannot be read one by one;"
            f" rewrite it once, which holds it in memory: {REWRITE} {file.name}, or save it as safetensors"
        ) from error
    except OSError as error:
        raise lacking(error) or CheckpointError(f"{file.name} cannot be read: {error.strerror}") from error
    except _FAILURES as error:  # of opcodes that are none, or find nothing on the stack
        raise lacking(error) or _unreadable(file, error) from error
    if any(order != b"little" for order in orders):
        raise CheckpointError(
            f"{file.name} was written on a big-endian machine; save it anew on this one, as safetensors"
        )
    return tuple(sorted((entry.header_offset, entry.file_size) for entry in entries))


def _check_entries(entries: Iterable[zipfile.ZipInfo], file: SourceFile) -> None:
    """Raise CheckpointError for entries that are compressed, or large and none of a tensor's bytes."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{file.name} is compressed, which torch.save does not do, so its tensors cannot be read one by one;"
                " rewrite it with torch.save, or as safetensors"
            )
        # torch reads the others whole, such as `version`.
        if "/data/" not in entry.filename and entry.file_size > MAX_PICKLE_BYTES:
            what = "what its tensors are" if entry.filename.endswith("/data.pkl") else entry.filename[-100:]
            raise CheckpointError(
                f"{file.name} says {what} in more than {MAX_PICKLE_BYTES} bytes, which none needs; save it as"
                " safetensors"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of an error that is refused in a sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _unreadable(file: SourceFile, error: BaseException) -> CheckpointError:
    text = (
        str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    )  # before it torch says how to run such a file
    reason = f"{type(error).__name__}: {text}".split("\n", 1)[0][:_SHOWN]
    return CheckpointError(
        f"{file.name} cannot be read as a file of tensors that torch.save wrote ({reason}); save it as safetensors"
    )


def _start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as opened:
        return opened.read(len("little") + 1)


def _stored(name: str, value: object, file: SourceFile, places: Sequence[tuple[int, int]]) -> StoredTensor:
    if not isinstance(value, torch.Tensor) or value.dtype not in _BY_TORCH:
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(f"{file.name}: {shown(name)[1:-1]} must be a tensor of numbers, found {kind}")
    start = _start_of(value)
    if start is None:
        raise CheckpointError(
            f"{file.name}: the bytes of {shown(name)[1:-1]} do not lie together in the file; save it as safetensors"
        )
    entry = places[bisect.bisect(places, (start, 0)) - 1][1]
    stored = value.untyped_storage().nbytes()
    # Of a storage whose bytes are no whole elements, the pickle states those that are.
    if not 0 <= entry - stored < value.dtype.itemsize:
        raise CheckpointError(
            f"{file.name}: the bytes of {shown(name)[1:-1]} must be {stored}, and its place in the file has {entry}; it"
            " is damaged, copy it again"
        )
    offset = start + int(value.storage_offset()) * value.dtype.itemsize
    tensor = StoredTensor(name, _BY_TORCH[value.dtype], tuple(value.shape), file, offset)
    if tensor.offset + tensor.nbytes > min(file.size, start + entry):
        raise CheckpointError(
            f"{file.name}: {shown(name)[1:-1]} ends beyond its place in the file; it was cut short, copy it again"
        )
    return tensor


def _start_of(tensor: torch.Tensor) -> int | None:
    """Place of its storage in the file; None where its values are not the bytes from there on, one after another."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return None
    if not tensor.is_contiguous() or min(tensor.stride(), default=0) < 0:
        return None
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return start if isinstance(start, int) else None
