"""A few tensors in a safetensors file of the work folder: whole once it has its name, and read one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from streamconv.checkpoint.header import build_header, read_header
from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import StoredTensor, TensorSpec
from streamconv.checkpoint.writer import Bytes, ShardWriter, publish, remove_file
from streamconv.dtypes import DENSE
from streamconv.storage.base import SourceFile
from streamconv.storage.local import blaming, open_folder


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    parts: Sequence[Bytes],
    metadata: Mapping[str, str],
    record: Callable[[str], None] = lambda _: None,
) -> str:
    """Write tensors of these `specs`, whose bytes are `parts`; the file's SHA-256. Durable when this returns.

    `record` is called with the digest before the file has its name.
    """
    header = build_header(specs, metadata)
    partial = path.with_suffix(".partial")
    remove_file(partial)  # of a run that was killed
    with ShardWriter.create(partial, header, len(header) + sum(spec.nbytes for spec in specs)) as writer:
        for part in parts:
            writer.write(part)
        sha256 = writer.finish()
    record(sha256)
    publish(partial, path)
    return sha256


def stored_in(path: Path) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
    """The tensors of a file, by name, and its metadata. Raises OutputError where it cannot be read."""
    with blaming(SourceFile(path.name, str(path), 0, "", is_own=True)):
        file = replace(open_folder(str(path.parent)).file(path.name), is_own=True)
        header = read_header(file)
    tensors = {
        tensor.name: StoredTensor(
            tensor.name, tensor.dtype, tensor.shape, file, header.data_start + tensor.start
        )
        for tensor in header.tensors
    }
    return tensors, header.metadata


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Callable[[str], None] = lambda _: None
) -> str:
    """Write `tensors`, in host memory, of float types, as `write_file` does."""
    dtypes = {dtype.torch: dtype for dtype in DENSE.values()}
    specs = [TensorSpec(name, dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    parts = [tensor_bytes(tensor.contiguous()) for tensor in tensors.values()]
    return write_file(path, specs, parts, {}, record)


def read_tensors(path: Path, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Those of `names` that are there."""
    stored, _ = stored_in(path)
    with TensorReader() as reader:
        return {name: reader.load(stored[name]).view(stored[name].shape) for name in names if name in stored}
