"""A donor of a GGUF header: its tokenizer is taken to the byte, and a file of another model is refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.checkpoint.gguf import GgufFile
from streamconv.checkpoint.gguf_header import f32, f32s, text, u32
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import CheckpointError, InputError, OptionError, UnsupportedError
from streamconv.gguf.donor import donor_pairs
from streamconv.storage.base import SourceFile
from tests.gguf.bases import SIZES, fast_tokenizer, read_file, write_llama
from tests.models import Sizes, write_adapter

OURS = {
    "general.architecture": text("llama"),
    "llama.block_count": u32(2),
    "llama.rope.freq_base": f32(1e-05),
    "llama.factors": f32s([0.1, 0.2]),
}
SHAPES = {"token_embd.weight": (4, 2)}
PAIRS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "another",
    "general.file_type": 7,
    "llama.block_count": 2,
    "llama.rope.freq_base": struct.unpack("<f", struct.pack("<f", 1e-05))[0],
    "llama.factors": (struct.unpack("<f", struct.pack("<f", 0.1))[0], 0.2),
    "llama.vocab_size": 4,
    "tokenizer.ggml.tokens": ("a", "b"),
    "quantize.imatrix.file": "x",
}


def donor(pairs: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> GgufFile:
    file = SourceFile(name="x.gguf", path="x.gguf", size=1, version=None)
    tensors = {name: StoredTensor(name, F32, shape, file, 0) for name, shape in shapes.items()}
    raw, values = b"", {}
    for key in pairs:
        values[key] = range(len(raw), len(raw) + 8)
        raw += struct.pack("<II", 10, 3)
    return GgufFile(pairs, tensors, raw, values)
