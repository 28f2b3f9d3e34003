"""Tensors of a file that `torch.save` wrote, and where their bytes lie in it.

Such a file is a zip archive: a pickle that says what the tensors are, and the bytes of every storage, not compressed.
The pickle is read under `weights_only`, which makes nothing but tensors and plain containers, and with fake tensors,
which know their place in the file and hold no memory; bytes are then read as those of any other tensor.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
# The pickle says names, types and shapes alone: 100 bytes or so a tensor.
MAX_PICKLE_BYTES = 256_000_000
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
    _check_archive(file)
    try:
        with FakeTensorMode():
            loaded = torch.load(file.path, weights_only=True)
    except _FAILURES as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0][:_SHOWN]
        raise CheckpointError(
            f"{file.name} cannot be read as a file of tensors that torch.save wrote ({reason}); save it as safetensors"
        ) from error
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
    return MappingProxyType({name: _stored(name, value, file) for name, value in loaded.items()})


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


def _check_archive(file: SourceFile) -> None:
    """Raise CheckpointError unless it is a zip archive with the bytes of tensors as they are."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = archive.infolist()
            orders = [_start(archive, entry) for entry in entries if entry.filename.endswith("/byteorder")]
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
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{file.name} is compressed, which torch.save does not do, so its tensors cannot be read one by one;"
            " rewrite it with torch.save, or as safetensors"
        )
    if any(entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
        raise CheckpointError(
            f"{file.name} says what its tensors are in more than {MAX_PICKLE_BYTES} bytes, which none needs"
        )
    if any(order != b"little" for order in orders):
        raise CheckpointError(
            f"{file.name} was written on a big-endian machine; save it anew on this one, as safetensors"
        )


def _start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as opened:
        return opened.read(len("little") + 1)


def _stored(name: str, value: object, file: SourceFile) -> StoredTensor:
    if not isinstance(value, torch.Tensor) or value.dtype not in _BY_TORCH:
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(f"{file.name}: {name} must be a tensor of numbers, found {kind}")
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not value.is_contiguous():
        raise CheckpointError(
            f"{file.name}: the bytes of {name} do not lie together in the file; save it as safetensors"
        )
    tensor = StoredTensor(
        name,
        _BY_TORCH[value.dtype],
        tuple(value.shape),
        file,
        start + value.storage_offset() * value.dtype.itemsize,
    )
    if tensor.offset + tensor.nbytes > file.size:
        raise CheckpointError(f"{file.name}: {name} ends beyond the file; it was cut short, copy it again")
    return tensor
