"""Encoders of GGUF tensors: order of rows, and norms with 1 added."""

from __future__ import annotations

import pytest
import torch

from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, F16, F32
from streamconv.formats import FORMATS, container_of
from streamconv.formats.gguf import RowOrder, full_encoder, with_rows_of_heads
from tests.gguf.bases import as_rotated


@pytest.mark.parametrize(("heads", "rows", "columns"), [(1, 4, 3), (4, 96, 5), (3, 258, 2)])
def test_rows_stand_as_llama_cpp_rotates_them_and_lead_back(heads: int, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns).half()
    form = weight.view(torch.uint8).flatten()
    order = RowOrder(heads, rows, columns * 2)
    whole = torch.empty_like(form)
    back = torch.empty_like(form)
    for first in range(0, rows, 7):
        lines = range(first, min(first + 7, rows))
        piece = whole[lines.start * columns * 2 : lines.stop * columns * 2]
        order.to_file(form, lines, piece)
        order.from_file(piece, lines, back)
    assert torch.equal(whole.view(torch.float16).view(rows, columns), as_rotated(weight, heads))
    assert torch.equal(back, form)


def test_elements_of_a_bias_are_ordered_alike() -> None:
    encoder = with_rows_of_heads(full_encoder("b", (12,), 0.0), 2)
    form = torch.arange(12.0).view(torch.uint8)
    out = torch.empty_like(form)
    encoder.order.to_file(form, range(encoder.order.lines), out)
    assert torch.equal(out.view(torch.float32), as_rotated(torch.arange(12.0)[:, None], 2).flatten())


def test_one_is_added_before_rounding() -> None:
    encoder = full_encoder("norm", (4,), 1.0)
    values = torch.tensor([[0.1, -1.0, 2.5, 1e-9]])
    out = torch.empty(16, dtype=torch.uint8)
    encoder.pack(values, None, out)
    assert torch.equal(out.view(torch.float32), (values + 1).flatten())
    assert encoder.format != "float32"  # else a norm in float32 would be copied
    assert full_encoder("norm", (4,), 0.0).format == "float32"


def test_formats_and_their_files() -> None:
    for name, dtype in (("gguf:f16", F16), ("gguf:bf16", BF16)):
        found = FORMATS[name]
        assert found.encoder("a", (2, 3), F32).parts == (TensorSpec("a", dtype, (2, 3)),)
        assert found.find({}, {}) == []
        assert container_of(found).file_names(1) == [f"model-{dtype}.gguf"]
