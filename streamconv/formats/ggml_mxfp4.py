"""ggml's MXFP4 for writing: 4-bit floats (E2M1) in blocks of 32, with a power of two each, as gpt-oss' experts are.

A block is a byte, the biased exponent, and 16 of codes: of byte j the low half is that of element j, the high half that
of element 16 + j (`block_mxfp4`, ggml `ggml-common.h`). Values are those of the same codes and exponents elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import GGML_TYPES, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.fp4_scales import Mxfp4Scales
from streamconv.formats.ggml_mixes import MixedModel, fitting_type
from streamconv.formats.gguf import PREFIX
from streamconv.formats.gguf_blocks import BlocksEncoder, GgufBlocksFormat
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.kernels.grids import TableGrid

_KIND = BLOCK_TYPES["mxfp4"]
_SCALES = Mxfp4Scales()
MXFP4 = _KIND.name


@dataclass(frozen=True, slots=True)
class GgmlMxfp4Encoder(BlocksEncoder):
    """Encoder of rows of whole blocks, their exponents between the codes."""

    @property
    def grid(self) -> TableGrid:
        return _SCALES.grid

    def pack(self, values: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """See Encoder."""
        assert scales is not None, f"{self.spec.name} was given no scales, which lie between the codes"
        blocks, codes = out.view(-1, self.kind.bytes), values.view(-1, 2, 16)
        blocks[:, 0] = _SCALES.stored(scales)
        blocks[:, 1:] = codes[:, 0] | codes[:, 1] << 4

    def effective_scales(self, scales: Tensor) -> Tensor:
        """See Encoder."""
        return _SCALES.effective(_SCALES.stored(scales))


@dataclass(frozen=True, slots=True)
class GgmlMxfp4Format(GgufBlocksFormat):
    """Experts in MXFP4, all other matrices in Q8_0: what `llama-quantize` calls MXFP4_MOE."""

    @property
    def layout(self) -> str:
        """See Format."""
        return "a GGUF file, experts in ggml's MXFP4, other matrices in Q8_0; norms and biases in float32"

    @property
    def grid(self) -> TableGrid:
        return _SCALES.grid

    def type_of(self, tensor: str, columns: int, model: MixedModel) -> str:
        """See Typed."""
        del model
        return PREFIX + fitting_type(self.kind.name if "_exps." in tensor else "q8_0", columns)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> GgmlMxfp4Encoder:
        """See Format."""
        del dtype  # the format is the type
        if not self.fits(name, shape):
            raise UnsupportedError(
                f"{name} has shape {list(shape)}, and MXFP4 stores rows of whole blocks of {self.kind.super_block};"
                " choose --quant gguf:f16"
            )
        return GgmlMxfp4Encoder(TensorSpec(name, GGML_TYPES[self.kind.number], shape), self.kind)


GGML_MXFP4 = GgmlMxfp4Format(f"{PREFIX}{MXFP4}", _KIND)
