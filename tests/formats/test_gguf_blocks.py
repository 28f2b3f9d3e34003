"""Encoders of GGUF's block types, and the types that a format has for the tensors of a file."""

from __future__ import annotations

import pytest
import torch

from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, GGML_NUMBERS
from streamconv.errors import InputError, UnsupportedError
from streamconv.formats import FORMATS, container_of
from streamconv.formats.ggml_mixes import MIXES, MixedModel
from streamconv.formats.gguf_blocks import BLOCK_FORMATS, BlocksEncoder, GgufBlocksFormat
from streamconv.kernels.ggml import BLOCK_TYPES, block_kernels_for

MODEL = MixedModel.of(
    [f"blk.{number}.{part}.weight" for number in range(16) for part in ("attn_v", "ffn_down", "ffn_up")],
    "llama",
    layers=16,
    experts=0,
    heads=8,
    key_heads=8,
)
each_format = pytest.mark.parametrize("quant", BLOCK_FORMATS.values(), ids=lambda each: each.name)


@each_format
def test_an_encoder_writes_what_the_type_decodes(quant: GgufBlocksFormat) -> None:
    values = torch.randn(3, 40, 512, generator=torch.Generator().manual_seed(5))
    encoder = quant.encoder("t.weight", (3, 40, 512), BF16)
    (spec,) = encoder.parts
    assert encoder.row_offset(0) == 0
    assert encoder.row_offset(120) == spec.nbytes
    assert BLOCK_TYPES[encoder.kind.name].number == GGML_NUMBERS[spec.dtype.code]
    rule, flat = encoder.grid.rule, values.flatten()
    assert rule is not None
    scales = encoder.effective_scales(rule.start(flat.view(-1, encoder.grid.block)))
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    codes.copy_(torch.randint(1, 15, flat.shape, generator=torch.Generator().manual_seed(6)))
    out = torch.empty(spec.nbytes, dtype=torch.uint8)
    encoder.pack(codes, scales, out)
    assert encoder.finish(scales, None) == ()
    found = torch.empty(len(flat) // encoder.kind.super_block, encoder.kind.super_block)
    block_kernels_for(torch.device("cpu")).decode(encoder.kind, out.view(-1, encoder.kind.bytes), found)
    blocks = encoder.grid.decode(codes).view(-1, encoder.grid.block)
    pairs = scales.view(len(blocks), -1)
    expected = blocks * pairs[:, :1]
    if encoder.grid.offsets is not None:
        expected = (blocks + 1) * pairs[:, :1] + pairs[:, 1:]
    assert torch.equal(found.view(expected.shape), expected)


@each_format
def test_names_of_files_and_bits(quant: GgufBlocksFormat) -> None:
    assert FORMATS[quant.name] == quant
    assert container_of(quant).file_names(1) == [f"model-{quant.name[5:].upper()}.gguf"]
    encoder = quant.encoder("t", (256, 1024), BF16)
    assert 8 * encoder.parts[0].nbytes / 256 / 1024 == quant.bits_per_weight


@each_format
def test_rows_that_are_no_whole_blocks_are_refused(quant: GgufBlocksFormat) -> None:
    assert not quant.fits("t", (64, 48))
    with pytest.raises(UnsupportedError, match=r"t has shape \[64, 48\].*whole blocks of (32|256).*gguf:f16"):
        quant.encoder("t", (64, 48), BF16)


def test_scales_that_are_not_finite_are_refused() -> None:
    encoder = BlocksEncoder(TensorSpec("t", BF16, (1, 32)), BLOCK_TYPES["q8_0"])
    with pytest.raises(InputError, match="t holds NaN or infinity, or values too large"):
        encoder.finish(torch.tensor([1.0, torch.nan]), None)


def test_types_of_tensors_are_those_of_the_mix() -> None:
    quant = BLOCK_FORMATS["gguf:q4_k_m"]
    assert quant.type_of("blk.0.attn_v.weight", 512, MODEL) == "gguf:q6_k"
    assert quant.type_of("blk.3.attn_v.weight", 512, MODEL) == "gguf:q4_k"
    assert quant.type_of("blk.0.ffn_down.weight", 96, MODEL) == "gguf:q8_0"
    assert quant.type_of("blk.3.ffn_up.weight", 96, MODEL) == "gguf:q5_0"
    assert quant.type_of("blk.3.ffn_up.weight", 100, MODEL) == "gguf:f16"
    assert BLOCK_FORMATS["gguf:q4_0"].type_of("output.weight", 512, MODEL) == "gguf:q6_k"


def test_formats_without_a_mix_have_one_type() -> None:
    for name in ("q4_k", "q5_k"):
        assert name not in MIXES
        for tensor in ("output.weight", "token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight"):
            assert BLOCK_FORMATS[f"gguf:{name}"].type_of(tensor, 512, MODEL) == f"gguf:{name}"
