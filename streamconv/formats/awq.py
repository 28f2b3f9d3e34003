"""AWQ storage, version GEMM: 4-bit integers in groups along the inputs, eight outputs a word.

Source: AutoAWQ `modules/linear/gemm.py`, `utils/packing_utils.py`, `models/_config.py`; GPTQModel, which reads it now,
`quantization/awq/utils/packing_utils.py`. Beside what `int_words` tells:

    P.qweight  int32 [in, out / 8]; bits 4 i of word c hold output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    P.qzeros   the zero points, in the same order

The name is that of a way to choose scales, too; a file does not tell how they were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import F16, I32, Dtype
from streamconv.formats.base import (
    GROUP_SIZES,
    USUAL_GROUP_SIZE,
    Format,
    Json,
    Marks,
    Weight,
    grouped_name,
    parts_of,
)
from streamconv.formats.dense import largest_dtype
from streamconv.formats.int_words import (
    A_WORD,
    MAIN,
    MARKS,
    SCALES,
    ZEROS,
    IntWordsDecoder,
    IntWordsEncoder,
    Words,
    ZeroPoints,
    check_encodes,
    described,
    first_zeros,
    grid_of,
    group_size_in,
    is_whole,
    part_name,
    word_of,
    zeros_and_scales,
)
from streamconv.formats.linear import HEAD_NAMES, module_of
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
WORDS = Words(4, PLACES, subtracted=0)
ZERO_POINTS = ZeroPoints(least=0, greatest=15)
# By whether each group has a zero point of its own.
NAMES = ("awq", "awq-asym")


@dataclass(frozen=True, slots=True)
class OutputsAcross:
    """A line is eight rows of a file: the inputs that are a word of the row form."""

    rows: int
    lines: int

    @property
    def line_bytes(self) -> int:
        return 4 * self.rows

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        kernels_for(form.device).turn_codes(self._words(form, lines), PLACES, _inputs(out, lines))

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        kernels_for(form.device).turn_codes_back(_inputs(raw, lines), PLACES, self._words(form, lines))

    def _words(self, form: Tensor, lines: range) -> Tensor:
        return form.view(torch.int32).view(self.rows, self.lines)[:, lines.start : lines.stop]


def _inputs(raw: Tensor, lines: range) -> Tensor:
    return raw.view(torch.int32).view(A_WORD * len(lines), -1)


def _find_weight(name: str, dtype: Dtype, free: Mapping[str, StoredTensor], reader: TensorReader) -> Weight:
    """The weight `name`; CheckpointError unless its parts are whole and agree."""
    parts = parts_of(name, {role: part_name(name, role) for role in (MAIN, ZEROS, SCALES)}, free)
    columns, rows = parts[MAIN].shape[0], parts[MAIN].shape[1] * A_WORD
    group = group_size_in(parts, rows, columns)
    product, order = parts[SCALES].dtype, OutputsAcross(rows, columns // A_WORD)
    is_symmetric = bool((first_zeros(parts[ZEROS], reader) == word_of(WORDS.middle)).all())
    remarks = {f"scales in {product.name}": product != F16}
    grid = grid_of(4, group, None if is_symmetric else ZERO_POINTS)
    stored_as = described(NAMES[not is_symmetric], group, remarks)
    decoder = IntWordsDecoder(name, columns, grid, product, order, WORDS)
    specs = tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts.values())
    keep = IntWordsEncoder(
        stored_as, name, (rows, columns), dtype, grid, order, WORDS, specs, product=product
    )
    is_written = product == F16
    return Weight(name, (rows, columns), dtype, stored_as, decoder, parts, None if is_written else keep)


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """AWQ, version GEMM, 4 bit; with all zero points 8, or each group's own."""

    is_asymmetric: bool = False
    group_size: int = USUAL_GROUP_SIZE
    loaders: str = "transformers with GPTQModel, vLLM, SGLang"
    library: str = "gptqmodel"
    load_in: None = None
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ("vLLM", "SGLang", "GPTQModel")
    config_copy: str | None = None
    marks: Marks = MARKS
    group_sizes: tuple[int, ...] = GROUP_SIZES

    @property
    def name(self) -> str:
        return NAMES[self.is_asymmetric]

    @property
    def layout(self) -> str:
        zeros = "with zero points" if self.is_asymmetric else "symmetric"
        return f"AWQ version GEMM, 4-bit integers in groups of {self.group_size}, {zeros}"

    @property
    def grid(self) -> TableGrid:
        return grid_of(4, self.group_size, ZERO_POINTS if self.is_asymmetric else None)

    def of_group_size(self, size: int) -> Format:
        return replace(self, group_size=size)

    @property
    def bits_per_weight(self) -> float:
        return 4 + (16 + 4) / self.group_size

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format. The symmetric one finds all."""
        del quantization  # tensors tell all of it
        if self.is_asymmetric:
            return ()
        mains = [tensor for name, tensor in free.items() if name.endswith(f".{MAIN}") and _is_awq(free, name)]
        if not mains:
            return ()
        dtype = largest_dtype(free, but=f".{SCALES}")
        with TensorReader() as reader:
            return [_find_weight(module_of(main.name) + ".weight", dtype, free, reader) for main in mains]

    def fits(self, name: str, shape: Shape) -> bool:
        """See Format. Loaders leave the output head in 16 bit."""
        is_head = module_of(name).rpartition(".")[2] in HEAD_NAMES
        return not is_head and is_whole(shape, A_WORD, self.group_size)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> IntWordsEncoder:
        """See Format."""
        check_encodes(name, shape, dtype, self.name, A_WORD, self.group_size)
        rows, columns = shape
        order = OutputsAcross(rows, columns // A_WORD)
        parts = (
            TensorSpec(part_name(name, MAIN), I32, (columns, rows // A_WORD)),
            *zeros_and_scales(name, shape, self.group_size),
        )
        stored_as = grouped_name(self.name, self.group_size)
        return IntWordsEncoder(stored_as, name, shape, dtype, self.grid, order, WORDS, parts)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format. `zero_point`: there are such, though all may be 8."""
        del dtype, quantized  # loaders take the model's type, and quantize all that the list does not name
        return {
            "bits": 4,
            "group_size": self.group_size,
            "modules_to_not_convert": list(skipped),
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }


def _is_awq(free: Mapping[str, StoredTensor], main: str) -> bool:
    """Whether words hold eight outputs: GPTQ's names are the same, and its words hold inputs."""
    scales = free.get(f"{module_of(main)}.{SCALES}")
    is_matrix = free[main].dtype == I32 and len(free[main].shape) == 2
    return is_matrix and scales is not None and free[main].shape[1] * A_WORD == scales.shape[-1]
