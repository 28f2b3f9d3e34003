"""ggml's MXFP4 as it is written: bits against gguf-py's own quantizer, and which matrices of a file have it."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from streamconv.dtypes import BF16, F32
from streamconv.errors import InputError, UnsupportedError
from streamconv.formats.ggml_mixes import MixedModel
from streamconv.formats.ggml_mxfp4 import GGML_MXFP4
from streamconv.kernels import kernels_for

CPU = torch.device("cpu")
MODEL = MixedModel(layers=2, experts=4, values=(0, 1), downs=(0, 1), is_tied=False, shares_values=False)


def test_values_of_gguf_pys_quantizer_are_stored_as_it_stores_them() -> None:
    given = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-3, 3)[:, None]
    )
    theirs = quantize(given.numpy(), GGMLQuantizationType.MXFP4)
    values = torch.from_numpy(dequantize(theirs, GGMLQuantizationType.MXFP4))
    encoder = GGML_MXFP4.encoder("blk.0.ffn_up_exps.weight", (1, 6, 64), BF16)
    # Scales for which the end of the grid is the greatest magnitude that theirs may have.
    stored = torch.from_numpy(theirs).view(-1, 17)
    scales = encoder.effective_scales(8 * torch.exp2(stored[:, 0].float() - 127))
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    kernels_for(CPU).nearest(values.flatten(), encoder.grid, scales, codes)
    out = torch.empty(theirs.nbytes, dtype=torch.uint8)
    encoder.pack(codes, scales, out)
    assert torch.equal(
        torch.from_numpy(dequantize(out.view(6, -1).numpy(), GGMLQuantizationType.MXFP4)), values
    )
    assert torch.equal(out.view(-1, 17)[:, 0], stored[:, 0])
    decoded = torch.empty(values.numel())
    kernels_for(CPU).decode(codes, encoder.grid, scales, F32, decoded)
    assert torch.equal(decoded.view_as(values), values)


def test_experts_have_it_and_other_matrices_more_bits() -> None:
    assert GGML_MXFP4.type_of("blk.0.ffn_up_exps.weight", 2880, MODEL) == "gguf:mxfp4"
    assert GGML_MXFP4.type_of("blk.0.attn_q.weight", 2880, MODEL) == "gguf:q8_0"
    assert GGML_MXFP4.type_of("blk.0.ffn_up_exps.weight", 72, MODEL) == "gguf:f16"
    assert GGML_MXFP4.bits_per_weight == 4.25


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="whole blocks of 32"):
        GGML_MXFP4.encoder("blk.0.ffn_up_exps.weight", (1, 6, 72), BF16)
    encoder = GGML_MXFP4.encoder("blk.0.ffn_up_exps.weight", (1, 6, 64), BF16)
    with pytest.raises(InputError, match="NaN or infinity"):
        encoder.finish(encoder.effective_scales(torch.tensor([1.0, torch.inf])), None)
