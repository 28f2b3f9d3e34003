"""Weights stored by our encoders and read by our decoders, cell by cell as a merge does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.reader import TensorReader
from streamconv.dtypes import BF16, DENSE
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import CELL_ROWS, Encoder, Grouped, InputMeasured, Surveyed, Weight, matrix_shape
from streamconv.formats.fp4 import Fp4Format
from streamconv.formats.pack_quantized import PackQuantizedFormat
from streamconv.formats.rows import StoredRows, in_file_order
from streamconv.kernels.grids import Grid
from streamconv.rounding import ROUNDINGS, Context, Rounding
from tests.checkpoint.files import index_of, write_checkpoint
from tests.tiny import edit_json

W = "model.layers.0.mlp.up_proj.weight"

# Whole blocks; rows that wrap blocks; an odd number of elements; two cells with a row-wrapping block size.
SHAPES = [(128, 128), (3, 50), (5, 13), (70, 96), (129, 7)]
# The same of formats whose rows are whole groups.
SHAPES_IN_GROUPS = [(128, 128), (2, 384), (70, 256), (132, 640)]


# And of those with words across rows.
SHAPES_IN_WORDS = [(128, 128), (32, 384), (96, 256), (160, 640)]
# Rows of any width, of a multiple of four elements in all: blocks that end within rows and columns.
SHAPES_OF_BLOCKS = [(128, 128), (160, 640), (3, 52), (70, 96), (132, 7), (300, 200)]


# Scales of 16 bit follow bytes, which are even in number.
SHAPES_IN_PAIRS = [(128, 128), (3, 50), (70, 96), (130, 7)]


def shapes_of(name: str) -> list[tuple[int, int]]:
    if name == "w8a8":
        return SHAPES_IN_PAIRS
    if name.startswith(("gptq", "awq")) or name == "w4a16-asym":
        return SHAPES_IN_WORDS
    if name in ("fp8", "fp8-block"):
        return SHAPES_OF_BLOCKS
    return SHAPES_IN_GROUPS if isinstance(FORMATS[name], Grouped | Fp4Format) else SHAPES


def normal(shape: tuple[int, ...], seed: int = 0, size: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def write(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> CheckpointIndex:
    write_checkpoint(folder, {"model.safetensors": tensors})
    edit_json(folder / "config.json", **(_described(tensors) if config is None else config))
    return index_of(folder)


def write_as(name: str, folder: Path, tensors: Mapping[str, Tensor]) -> CheckpointIndex:
    """A checkpoint in the format `name`, of which several may be the same to the bit but for their config."""
    storage_format = FORMATS[name]
    if not isinstance(storage_format, Fp4Format):
        return write(folder, tensors)
    return write(folder, tensors, {"quantization_config": storage_format.quantization_config(BF16, (), ())})


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A config for tensors of compressed-tensors and MLX, which are read by what it says."""
    for name, packed in tensors.items():
        if packed.dtype == torch.int8 and f"{name}_scale" in tensors:
            return {"quantization_config": FORMATS["w8a8"].quantization_config(BF16, (), ())}
        if name.endswith(".biases"):
            main = tensors[name.replace("biases", "weight")]
            # Tests have groups of 64, or of 32.
            group = 64 if main.shape[-1] * 32 // 64 in (4 * packed.shape[-1], 8 * packed.shape[-1]) else 32
            bits = main.shape[-1] * 32 // (packed.shape[-1] * group)
            return {"quantization": {"group_size": group, "bits": bits}}
        if name.endswith(".weight_packed"):
            columns = int(tensors[name.replace("packed", "shape")][1])
            group = columns // tensors[name.replace("packed", "scale")].shape[1]
            has_zeros = name.replace("packed", "zero_point") in tensors
            four = "w4a16-asym" if has_zeros else "w4a16"
            storage_format = FORMATS[four if packed.shape[1] * 8 == columns else "w8a16"]
            assert isinstance(storage_format, PackQuantizedFormat)
            found = replace(storage_format, grid=storage_format.grid.of_block(group))
            return {"quantization_config": found.quantization_config(BF16, (), ())}
        if packed.dtype == torch.float8_e4m3fn:
            key = "fp8-block" if f"{name}_scale_inv" in tensors else "fp8"
            return {"quantization_config": FORMATS[key].quantization_config(BF16, (), ())}
    return {}


def only_weight(index: CheckpointIndex) -> Weight:
    (weight,) = find_weights(index)
    return weight


def cells(rows: int, height: int = CELL_ROWS) -> list[range]:
    return [range(first, min(first + height, rows)) for first in range(0, rows, height)]


def encoder_for(name: str, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoder:
    encoder = FORMATS[name].encoder(W, tuple(weight.shape), DENSE[str(dtype).removeprefix("torch.")])
    if isinstance(encoder, Surveyed):
        encoder = encoder.knowing(float(weight.abs().max()))
    return encoder.measuring(8.0) if isinstance(encoder, InputMeasured) else encoder


def choose(rounding: Rounding, target: Tensor, grid: Grid, context: Context) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    return codes, rounding.choose(target, grid, context, codes)


def stored(encoder: Encoder, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of `weight` (float32), its codes the nearest."""
    rows, columns = matrix_shape(tuple(weight.shape))
    main, *tail = encoder.parts
    raw = torch.empty(encoder.row_offset(rows), dtype=torch.uint8)
    scales = []
    for cell_rows in cells(rows, encoder.cell_rows):
        out = raw[encoder.row_offset(cell_rows.start) : encoder.row_offset(cell_rows.stop)]
        cell = weight.view(rows, columns)[cell_rows.start : cell_rows.stop]
        if encoder.grid is None:
            encoder.pack(cell, None, out)
        else:
            effective = encoder.effective_scales if encoder.rounds_scales else None
            context = Context(None, None, None, None, effective)
            codes, cell_scales = choose(ROUNDINGS["nearest"], cell.flatten(), encoder.grid, context)
            encoder.pack(codes, cell_scales, out)
            scales.append(cell_scales)
    contents = encoder.finish(torch.cat(scales) if scales else None, None)
    tensors = {main.name: in_file_order(encoder.order, raw).view(main.dtype.torch).view(main.shape)}
    contents = (*contents, *(constant.content for constant in encoder.constants))
    tail += [constant.spec for constant in encoder.constants]
    for spec, content in zip(tail, contents, strict=True):
        tensors[spec.name] = torch.frombuffer(bytearray(content), dtype=spec.dtype.torch).view(spec.shape)
    return tensors


def side_parts(weight: Weight) -> dict[str, Tensor]:
    with TensorReader() as reader:
        return {role: reader.load(part) for role, part in weight.parts.items() if role != weight.decoder.main}


def raw_bytes(weight: Weight) -> Tensor:
    """The main part in row form."""
    with TensorReader() as reader:
        raw = torch.empty(weight.parts[weight.decoder.main].nbytes, dtype=torch.uint8)
        StoredRows(reader, weight).read_into(range(matrix_shape(weight.shape)[0]), raw)
        return raw


def block_slice(weight: Weight, scales: Tensor | None, rows: range) -> Tensor | None:
    grid = weight.decoder.grid
    if scales is None or grid is None:
        return scales
    columns = matrix_shape(weight.shape)[1]
    return scales[rows.start * columns // grid.block : -(-rows.stop * columns // grid.block)]


def decoded(weight: Weight) -> Tensor:
    """The whole weight, float32, decoded a cell at a time."""
    decoder, raw = weight.decoder, raw_bytes(weight)
    rows, columns = matrix_shape(weight.shape)
    scales = decoder.scales(side_parts(weight))
    out = torch.empty(rows, columns)
    for part in cells(rows):
        content = raw[decoder.row_offset(part.start) : decoder.row_offset(part.stop)]
        decoder.decode(content, part, block_slice(weight, scales, part), out[part.start : part.stop])
    return out.view(weight.shape)


def decode_every_weight(index: CheckpointIndex) -> None:
    """Have a checkpoint's weights decoded, as far as that needs no bytes; what is refused is refused here."""
    for weight in find_weights(index):
        if weight.undecoded is not None:
            empty = torch.empty(0)
            weight.decoder.decode(empty, range(0), None, empty)
