"""Experts of GGUF files as parameters: each block where gguf-py has it, whatever run of rows is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import BF16, F32, GGML_TYPES
from streamconv.errors import UnsupportedError
from streamconv.extraction.differences import DecodedRows
from streamconv.formats.ggml_experts import GroupsTurned, biases_weight, expert_of, experts_weight
from streamconv.formats.gguf_kept import in_place
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.storage.local import open_folder

EXPERTS, INPUTS, OUTPUTS = 3, 96, 20
CPU = torch.device("cpu")
KINDS = ("mxfp4", "q8_0", "q5_1", "bf16", "f32")


def stored(folder: Path, name: str, kind: str, outputs: int = OUTPUTS) -> tuple[StoredTensor, Tensor]:
    """A tensor [experts, outputs, in] of random bytes, and what gguf-py says that it holds."""
    blocks, generator = BLOCK_TYPES[kind], np.random.default_rng(len(name))
    raw = generator.integers(0, 120, (EXPERTS * outputs, blocks.row_bytes(INPUTS)), dtype=np.uint8)
    (folder / f"{name}.bin").write_bytes(raw.tobytes())
    shape = (EXPERTS, outputs, INPUTS)
    file = open_folder(str(folder)).file(f"{name}.bin")
    values = torch.tensor(dequantize(raw, GGMLQuantizationType(blocks.number)).reshape(shape))
    return StoredTensor(f"{name}_proj.weight", GGML_TYPES[blocks.number], shape, file, 0), values


def decoded(weight: object, rows: int, columns: int, height: int) -> Tensor:
    out = torch.full((rows, columns), torch.nan)
    with TensorReader() as reader:
        read = DecodedRows(reader, weight, CPU)  # type: ignore[arg-type]
        for first in range(0, rows, height):
            run = range(first, min(first + height, rows))
            out[run.start : run.stop] = read.read(run)
    return out


@pytest.mark.parametrize("kinds", [*((kind, kind) for kind in KINDS), ("mxfp4", "f32"), ("bf16", "q8_0")])
@pytest.mark.parametrize("height", [64, 192])
def test_gate_and_up_take_turns(tmp_path: Path, kinds: tuple[str, str], height: int) -> None:
    """Cells begin in the middle of an expert: 96 rows are no multiple of 64."""
    gate, gates = stored(tmp_path, "gate", kinds[0])
    up, ups = stored(tmp_path, "up", kinds[1])
    weight = experts_weight("gate_up_proj", gate, up, BF16)
    assert weight.shape == (EXPERTS, INPUTS, 2 * OUTPUTS)
    assert weight.is_quantized == (kinds[0] not in ("bf16", "f32") or kinds[1] not in ("bf16", "f32"))
    expected = torch.stack((gates, ups), -1).transpose(1, 2).reshape(EXPERTS * INPUTS, 2 * OUTPUTS)
    found = decoded(weight, EXPERTS * INPUTS, 2 * OUTPUTS, height)
    assert torch.equal(found, expected)
    alone = expert_of(weight, "one", 1, range(1, 2 * OUTPUTS, 2))
    assert alone is not None
    assert torch.equal(decoded(alone, OUTPUTS, INPUTS, 64), ups[1])


def test_down_is_turned_alone(tmp_path: Path) -> None:
    down, values = stored(tmp_path, "down", "mxfp4")
    weight = experts_weight("down_proj", down, None, BF16)
    expected = values.transpose(1, 2).reshape(EXPERTS * INPUTS, OUTPUTS)
    assert torch.equal(decoded(weight, EXPERTS * INPUTS, OUTPUTS, 64), expected)
    alone = expert_of(weight, "one", 2, range(OUTPUTS))
    assert alone is not None
    assert torch.equal(decoded(alone, OUTPUTS, INPUTS, 64), values[2])
    assert alone.format == weight.format == "mxfp4 of GGUF"


def test_biases_take_turns(tmp_path: Path) -> None:
    values = torch.randn(2, EXPERTS, OUTPUTS)
    (tmp_path / "all.bin").write_bytes(values.numpy().tobytes())
    file = open_folder(str(tmp_path)).file("all.bin")
    gate, up = (
        StoredTensor(name, F32, (EXPERTS, OUTPUTS), file, place * values[0].nbytes)
        for place, name in enumerate(("gate", "up"))
    )
    weight = biases_weight("gate_up_proj_bias", gate, up, BF16)
    found = decoded(weight, EXPERTS, 2 * OUTPUTS, 64)
    assert torch.equal(found[:, 0::2], values[0])
    assert torch.equal(found[:, 1::2], values[1])
    assert not weight.is_quantized
    assert expert_of(weight, "one", 0, range(1)) is None


def test_a_changed_weight_of_two_tensors_is_not_stored_in_place(tmp_path: Path) -> None:
    gate, _ = stored(tmp_path, "gate", "f32")
    up, _ = stored(tmp_path, "up", "f32")
    one, other = (replace(each, shape=(EXPERTS, OUTPUTS * INPUTS)) for each in (gate, up))
    for weight in (experts_weight("gate_up_proj", gate, up, BF16), biases_weight("bias", one, other, BF16)):
        assert in_place(weight, gate.spec) is None


@pytest.mark.parametrize("size", [1, 7, 20, 59])
def test_groups_are_turned_in_any_runs(size: int) -> None:
    order = GroupsTurned(EXPERTS, OUTPUTS, 2, 3)
    raw = torch.arange(order.lines * order.line_bytes, dtype=torch.int32).to(torch.uint8)
    form = torch.full_like(raw, 255)
    for start in range(0, order.lines, size):
        lines = range(start, min(start + size, order.lines))
        order.from_file(raw[lines.start * 6 : lines.stop * 6], lines, form)
    expected = raw.view(EXPERTS, OUTPUTS, 2, 3).transpose(1, 2)
    assert torch.equal(form.view(EXPERTS, 2, OUTPUTS, 3), expected)


def test_long_blocks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(3))
    file = open_folder(str(tmp_path)).file("x.bin")
    tensor = StoredTensor("down", GGML_TYPES[BLOCK_TYPES["q4_k"].number], (1, 4, 256), file, 0)
    with pytest.raises(UnsupportedError, match=r"down is Q4_K \[1, 4, 256\], expected experts whose rows"):
        experts_weight("down_proj", tensor, None, BF16)
