"""Weights of llama.cpp's own files decoded: gguf-py's values exactly, of every type; rows in order, shifts undone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamconv.checkpoint.gguf import read_gguf
from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import BF16, F16, F32, GGML_TYPES, I32, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Weight, matrix_shape
from streamconv.formats.ggml_blocks import gguf_weight
from streamconv.formats.rows import StoredRows
from streamconv.storage.base import SourceFile
from streamconv.storage.local import open_folder

GOLDEN = Path(__file__).parent.parent / "golden" / "llama-cpp-python-0.3.36"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
KINDS = sorted(set(EXPECTED) - {"made_with"})


def decoded(weight: Weight) -> Tensor:
    """All of a weight, in tiles of two rows where its rows lie as in the file."""
    rows, columns = matrix_shape(weight.shape)
    out = torch.empty(rows, columns)
    with TensorReader() as reader:
        stored = StoredRows(reader, weight, torch.empty(1 << 16, dtype=torch.uint8))
        for first in range(0, rows, 2):
            tile = range(first, min(first + 2, rows))
            raw = torch.empty(stored.nbytes(tile), dtype=torch.uint8)
            stored.read_into(tile, raw)
            weight.decoder.decode(raw, tile, weight.decoder.scales({}), out[tile.start : tile.stop])
    return out.view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_gguf_py(kind: str) -> None:
    storage = open_folder(str(GOLDEN))
    tensors = read_gguf(storage.file(f"{kind}.gguf"), storage.read_start, GGML_TYPES).tensors
    assert tensors.keys() == EXPECTED[kind].keys()
    for name, tensor in tensors.items():
        weight = gguf_weight(tensor, BF16, None, 0.0)
        assert (weight.shape, weight.dtype) == (tensor.shape, BF16), name
        raw = tensor_bytes(decoded(weight).contiguous())
        assert hashlib.sha256(raw).hexdigest() == EXPECTED[kind][name]["sha256"], name


def of_file(folder: Path, values: Tensor, dtype: Dtype) -> StoredTensor:
    path = folder / "values"
    path.write_bytes(bytes(tensor_bytes(values)))
    file = SourceFile("values", str(path), path.stat().st_size, f"mtime:{path.stat().st_mtime_ns}")
    return StoredTensor("w", dtype, tuple(values.shape), file, 0)


def test_rows_of_heads_come_back_in_halves(tmp_path: Path) -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 3).contiguous()  # two heads of four rows
    tensor = of_file(tmp_path, rows, F32)
    assert decoded(gguf_weight(tensor, F32, 2, 0.0))[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    bias = of_file(tmp_path, torch.arange(8.0), F32)
    assert decoded(gguf_weight(bias, F32, 2, 0.0)).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_was_added_is_taken_away(tmp_path: Path) -> None:
    tensor = of_file(tmp_path, torch.tensor([1.5, 0.25, -3]), F32)
    assert decoded(gguf_weight(tensor, BF16, None, 1.0)).tolist() == [0.5, -0.75, -4]


def test_a_plain_weight_of_the_models_type_can_be_copied(tmp_path: Path) -> None:
    tensor = of_file(tmp_path, torch.ones(2, 4, dtype=torch.float16), F16)
    assert gguf_weight(tensor, F16, None, 0.0).format == "float16"
    assert gguf_weight(tensor, BF16, None, 0.0).format == "float16, as GGUF has it"
    assert gguf_weight(tensor, F16, 1, 0.0).format == "float16, as GGUF has it"


def test_whole_numbers_are_no_weight(tmp_path: Path) -> None:
    tensor = of_file(tmp_path, torch.ones(4, dtype=torch.int32), I32)
    with pytest.raises(
        UnsupportedError, match="values: tensor w is I32, expected a float type or one of blocks"
    ):
        gguf_weight(tensor, BF16, None, 0.0)
