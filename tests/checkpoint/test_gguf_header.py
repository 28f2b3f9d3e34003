"""Headers of GGUF files that are written, read by gguf-py and by us."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from streamconv.checkpoint.gguf import read_gguf
from streamconv.checkpoint.gguf_header import (
    ALIGNMENT,
    Pairs,
    build_gguf_header,
    f32,
    f32s,
    flag,
    flags,
    i32,
    i32s,
    padding,
    split_pairs,
    text,
    texts,
    u16,
    u32,
)
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import GGML_TYPES
from streamconv.storage.base import SourceFile

PAIRS: Pairs = {
    "general.architecture": text("llama"),
    "a.u16": u16(7),
    "a.u32": u32(2**32 - 1),
    "a.i32": i32(-5),
    "a.f32": f32(0.5),
    "a.flag": flag(True),
    "a.texts": texts(["", "ä", "\u2581the"]),
    "a.i32s": i32s([1, -2, 3]),
    "a.f32s": f32s([-1.5, 2.0]),
    "a.flags": flags([True, False]),
}
BLOCKS = {dtype.code: dtype for dtype in GGML_TYPES.values()}
TENSORS = [
    TensorSpec("one", BLOCKS["F32"], (3,)),
    TensorSpec("two", BLOCKS["Q4_K"], (5, 512)),
    TensorSpec("three", BLOCKS["Q8_0"], (2, 3, 32)),
    TensorSpec("four", BLOCKS["BF16"], (7, 5)),
]


def write(folder: Path) -> Path:
    raw = build_gguf_header(PAIRS, TENSORS)
    assert len(raw) % ALIGNMENT == 0
    for number, tensor in enumerate(TENSORS):
        raw += bytes([number + 1]) * tensor.nbytes + bytes(padding(tensor.nbytes))
    path = folder / "a.gguf"
    path.write_bytes(raw)
    return path


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = read_gguf(SourceFile("a.gguf", str(path), path.stat().st_size, "1"), types=GGML_TYPES)
    plain = {
        key: tuple(pair.value) if isinstance(pair.value, list) else pair.value for key, pair in PAIRS.items()
    }
    assert found.pairs == plain
    assert [tensor.spec for tensor in found.tensors.values()] == TENSORS
    raw = path.read_bytes()
    assert [raw[tensor.offset] for tensor in found.tensors.values()] == [1, 2, 3, 4]


def test_gguf_py_reads_it(tmp_path: Path) -> None:
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(write(tmp_path))
    assert reader.fields["a.texts"].contents() == ["", "ä", "\u2581the"]
    assert reader.fields["a.u32"].contents() == 2**32 - 1
    assert reader.fields["a.flags"].contents() == [True, False]
    for number, (tensor, spec) in enumerate(zip(reader.tensors, TENSORS, strict=True)):
        assert (tensor.name, tensor.tensor_type.name) == (spec.name, spec.dtype.code)
        assert tuple(tensor.shape[::-1]) == spec.shape
        raw = np.asarray(tensor.data).view(np.uint8)
        assert raw.size == spec.nbytes
        assert (raw == number + 1).all()


def test_sizes_of_blocks_are_those_of_gguf_py() -> None:
    gguf = importlib.import_module("gguf")
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        dtype = GGML_TYPES.get(int(kind))
        if dtype is not None:
            assert (dtype.code, dtype.block, dtype.itemsize) == (kind.name, block, size)
    assert {"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"} <= BLOCKS.keys()


def test_pairs_of_a_split() -> None:
    assert split_pairs(1, 3, 40) == {
        "split.no": u16(1),
        "split.count": u16(3),
        "split.tensors.count": i32(40),
    }
