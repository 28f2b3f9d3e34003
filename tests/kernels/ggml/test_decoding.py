"""Every type is decoded as gguf-py decodes it, by both kernels, whatever bytes there are."""

from __future__ import annotations

import hashlib
import importlib
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from streamconv.kernels.ggml import BLOCK_TYPES, BY_NUMBER
from streamconv.kernels.ggml.iq_grids import IQ_TYPES
from tests.kernels.ggml.blocks import GOLDEN, both_kernels, decoded, random_blocks, same_bits

DECODED = json.loads((GOLDEN / "decoded.json").read_text())["decoded"]
ELEMENTS = 1 << 14
every_type = pytest.mark.parametrize("name", BLOCK_TYPES)


def test_all_types_that_gguf_py_decodes_are_known() -> None:
    assert set(DECODED) == set(BLOCK_TYPES)


@every_type
@both_kernels
def test_values_are_those_of_gguf_py(name: str, where: str) -> None:
    if name in IQ_TYPES and find_spec("gguf") is None:
        pytest.skip("lookup tables are in gguf")
    kind = BLOCK_TYPES[name]
    count = ELEMENTS // kind.super_block
    drawn = bytearray(hashlib.shake_256(name.encode()).digest(count * kind.bytes))
    values = decoded(where, kind, torch.frombuffer(drawn, dtype=torch.uint8).reshape(count, -1)).numpy()
    values[np.isnan(values)] = np.nan
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == DECODED[name]


@every_type
def test_types_are_as_the_installed_gguf_has_them(name: str) -> None:
    gguf = importlib.import_module("gguf")
    quants = importlib.import_module("gguf.quants")
    kind = BLOCK_TYPES[name]
    number = gguf.GGMLQuantizationType[name.upper()]
    assert number == kind.number
    assert gguf.GGML_QUANT_SIZES[number] == (kind.super_block, kind.bytes)
    raw = random_blocks(kind, 16)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(raw.numpy(), number).copy())
    assert same_bits(decoded("torch", kind, raw), expected)


@every_type
def test_super_blocks_are_whole_blocks_and_rows_are_counted(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert BY_NUMBER[kind.number] is kind
    assert kind.super_block == kind.blocks * kind.block
    assert kind.row_bytes(512) * 8 == kind.bits * 512
