"""What every entry of FORMATS promises: a new format is tested by being listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamconv.checkpoint.container import SAFETENSORS
from streamconv.dtypes import BF16, DENSE, F32
from streamconv.formats import FORMATS, container_of
from streamconv.formats.base import matrix_shape
from streamconv.formats.linear import module_of
from streamconv.formats.rows import in_file_order
from streamconv.kernels import TORCH
from streamconv.kernels.grids import block_absmax
from tests.formats.stored import (
    W,
    block_slice,
    cells,
    decoded,
    encoder_for,
    normal,
    only_weight,
    raw_bytes,
    shapes_of,
    side_parts,
    stored,
    write_as,
)

# Those of GGUF files are tested where these are made (`tests/gguf`): no reader of checkpoints finds them.
IN_SAFETENSORS = [name for name, entry in FORMATS.items() if container_of(entry) == SAFETENSORS]
every_format = pytest.mark.parametrize("name", IN_SAFETENSORS)
every_case = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in IN_SAFETENSORS for shape in shapes_of(name)], ids=str
)

# Greatest error of an element: dense, of its magnitude (or the least normal number); quantized, of its block's
# greatest magnitude: half the widest step of the grid, a bf16 rounding, and for double quantization half a step of
# the scale's own grid.
RELATIVE_ERROR = {
    "float32": 0.0,
    "float16": 2**-11,
    "bfloat16": 2**-8,
    "nf4": 0.156,
    "nf4-dq": 0.17,
    "fp4": 0.17,
    "fp4-dq": 0.185,
    "int8": 0.5 / 127 + 1e-6,
    # Half a step; for the greatest of a block, which may lie beyond the positive end, with the scale's rounding.
    "w4a16": 0.5 / 7.5 + 2**-7,
    "w8a16": 0.5 / 127.5 + 2**-7,
    "w8a8": 0.5 / 127.5 + 2**-7,
    "gptq": 0.5 / 7.5 + 2**-10,
    "gptq-v2": 0.5 / 7.5 + 2**-10,
    "awq": 0.5 / 7.5 + 2**-10,
    # Half the widest step, and the scale's rounding, beyond which values are cut.
    "fp8": 16 / 448 + 2**-7,
    # Half a step of the value's own magnitude: a block's greatest is not always in this row.
    "fp8-block": 2**-4 + 2**-8,
    # Half a step of at most twice the greatest magnitude, and as much for a zero point that is rounded.
    "gptq-asym": 2 / 15 + 2**-9,
    "awq-asym": 2 / 15 + 2**-9,
    "w4a16-asym": 2 / 15 + 2**-6,
    # A step, as 0 is made a value of the grid, of at most twice the greatest magnitude; the rounding of scale, bias,
    # product and sum.
    "mlx4": 2 / 15 + 2**-6,
    "mlx8": 2 / 255 + 2**-6,
    # Half the widest step, from 4 to 6 of 6; and the greatest, where the scale is rounded down.
    "nvfp4": 1 / 6 + 2**-4,
    "nvfp4a16": 1 / 6 + 2**-4,
    "mxfp4a16": 1 / 6 + 2**-3,
    "mxfp4": 1 / 6 + 2**-3,
}


def test_names_are_keys() -> None:
    assert {key: entry.name for key, entry in FORMATS.items()} == {key: key for key in FORMATS}
    assert set(RELATIVE_ERROR) == set(IN_SAFETENSORS)


@every_case
def test_what_is_encoded_is_decoded_within_the_bound(
    tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    weight = normal(shape)
    read = only_weight(write_as(name, tmp_path, stored(encoder_for(name, weight), weight)))
    assert (read.name, read.shape, read.format) == (W, shape, name)
    size = weight.abs().clamp(min=2**-14)
    if read.decoder.grid is not None:
        block = read.decoder.grid.block
        size = block_absmax(weight.flatten(), block).repeat_interleave(block)[: weight.numel()].view(shape)
    assert bool(((decoded(read) - weight).abs() <= RELATIVE_ERROR[name] * size).all())


@every_case
def test_decoding_is_stable_under_encoding_again(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    encoder = encoder_for(name, weight, torch.float32)
    tensors = stored(encoder, weight)
    first = only_weight(write_as(name, tmp_path / "first", tensors))
    codes = tensors[encoder.parts[0].name]
    if encoder.grid is not None:
        again = torch.empty(encoder.row_offset(shape[0]), dtype=torch.uint8)
        scales = first.decoder.scales(side_parts(first))
        encoder.pack(first.decoder.codes(raw_bytes(first), range(shape[0])), scales, again)
        assert torch.equal(in_file_order(encoder.order, again), codes.view(-1).view(torch.uint8))
    else:
        assert torch.equal(stored(encoder, decoded(first))[W], codes)


@every_case
def test_parts_foretell_what_is_written(name: str, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    encoder = encoder_for(name, weight)
    main, *tail = encoder.parts
    assert module_of(main.name) == module_of(W) or main.name.startswith(W)
    assert encoder.row_offset(0) == 0
    assert encoder.row_offset(shape[0]) == main.nbytes
    assert {part: (t.dtype, tuple(t.shape)) for part, t in stored(encoder, weight).items()} == {
        spec.name: (spec.dtype.torch, spec.shape)
        for spec in (main, *tail, *(constant.spec for constant in encoder.constants))
    }
    assert all(constant.spec.nbytes == len(constant.content) for constant in encoder.constants)


@every_case
def test_cells_equal_the_whole(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    encoder = encoder_for(name, weight)
    tensors = stored(encoder, weight)
    read = only_weight(write_as(name, tmp_path, tensors))
    decoder, raw = read.decoder, raw_bytes(read)
    scales = decoder.scales(side_parts(read))
    rows, columns = matrix_shape(shape)
    whole = decoder.decode(raw, range(rows), scales, torch.empty(rows, columns))
    assert torch.equal(whole, decoded(read))
    for part in cells(rows):
        start, stop = decoder.row_offset(part.start), decoder.row_offset(part.stop)
        assert (start, stop) == (encoder.row_offset(part.start), encoder.row_offset(part.stop))
        if decoder.grid is None:
            continue
        all_codes = decoder.codes(raw, range(rows))
        codes = decoder.codes(raw[start:stop], part)
        assert torch.equal(codes, all_codes[part.start * columns : part.stop * columns])
        # Codes and effective scales tell the decoded values, up to a library's cast.
        part_scales = block_slice(read, scales, part)
        assert part_scales is not None
        values = torch.empty(len(codes))
        TORCH.decode(codes, decoder.grid, part_scales, F32, values)
        # DeepSeek's files tell the type only by what else is in them, and nothing is.
        dtype = read.dtype if name == "fp8-block" else encoder.dequantized_dtype
        cast, expected = values.to(dtype.torch).float(), whole[part.start : part.stop].flatten()
        if decoder.grid.offsets is None:
            assert torch.equal(cast, expected)
        else:  # a library may round products before it adds offsets
            size = block_absmax(expected, decoder.grid.block).repeat_interleave(decoder.grid.block)
            assert bool(((cast - expected).abs() <= 2**-7 * size).all())


@every_format
def test_decoders_write_where_they_are_told(tmp_path: Path, name: str) -> None:
    columns = shapes_of(name)[-1][1]
    weight = normal((64, columns))
    read = only_weight(write_as(name, tmp_path, stored(encoder_for(name, weight), weight)))
    out = torch.zeros(66, columns)
    scales = read.decoder.scales(side_parts(read))
    result = read.decoder.decode(raw_bytes(read), range(64), scales, out[1:65])
    assert result.data_ptr() == out[1:65].data_ptr()
    assert torch.equal(out[1:65], decoded(read))
    assert not out[[0, 65]].any()


@every_format
def test_bits_per_weight_are_those_of_a_large_weight(name: str) -> None:
    encoder = FORMATS[name].encoder(W, (4096, 4096), BF16)
    bits = 8 * sum(spec.nbytes for spec in encoder.parts) / 4096**2
    assert bits == pytest.approx(FORMATS[name].bits_per_weight, abs=1e-3)


@every_format
def test_grids_of_format_encoder_and_decoder_are_one(tmp_path: Path, name: str) -> None:
    weight = normal(shapes_of(name)[1])
    encoder = encoder_for(name, weight)
    read = only_weight(write_as(name, tmp_path, stored(encoder, weight)))
    assert encoder.grid == read.decoder.grid
    grid = FORMATS[name].grid
    assert encoder.grid == (grid if grid is None else grid.of_width(weight.shape[1]))
    assert encoder.format == name


@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq", "w4a16", "w8a16"])
def test_a_quantized_weight_remembers_its_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    weight = normal(shapes_of(name)[1])
    read = only_weight(
        write_as(name, tmp_path, stored(encoder_for(name, weight, DENSE[dtype].torch), weight))
    )
    assert read.dtype == DENSE[dtype]
    values = decoded(read)
    assert torch.equal(values, values.to(DENSE[dtype].torch).float())


@pytest.mark.gpu
@every_case
def test_the_gpu_reads_and_writes_the_same(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    encoder = encoder_for(name, weight)
    read = only_weight(write_as(name, tmp_path, stored(encoder, weight)))
    raw = raw_bytes(read).cuda()
    scales = read.decoder.scales({role: part.cuda() for role, part in side_parts(read).items()})
    values = read.decoder.decode(raw, range(shape[0]), scales, torch.empty(shape, device="cuda"))
    assert torch.equal(values.cpu(), decoded(read))
    if encoder.grid is not None:
        packed = torch.empty_like(raw)
        encoder.pack(read.decoder.codes(raw, range(shape[0])), scales, packed)
        assert torch.equal(packed, raw)
