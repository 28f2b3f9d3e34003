"""GPTQ storage: 4-bit integers in groups along the inputs, eight inputs a word.

Source: GPTQModel `nn_modules/qlinear/__init__.py` (buffers, pack, dequantize_weight), `utils/model.py` (v1 and v2); the
config: transformers' GPTQConfig, optimum `gptq/quantizer.py` (convert_model). Beside what `int4_words` tells:

    P.qweight  int32 [in / 8, out]; bits 4 j of word r hold input 8 r + j
    P.qzeros   the zero point less 1 (v1, checkpoint_format "gptq"), or as it is (v2, "gptq_v2")
    P.g_idx    int32 [in], the group of each input: input // group, but in activation order

Both are written, symmetric and not in activation order; v1 is what every loader reads. Which of them a symmetric weight
is, its zero points tell: there are files of v2 that say v1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import F16, I32, Dtype
from streamconv.errors import UnsupportedError
from streamconv.formats.base import (
    GROUP_SIZES,
    Decoder,
    Format,
    Json,
    Marks,
    Weight,
    grouped_name,
    parts_of,
    wrong,
)
from streamconv.formats.dense import largest_dtype
from streamconv.formats.int4_words import (
    A_WORD,
    IN_ORDER,
    MAIN,
    MARKS,
    MIDDLE,
    NO_GROUPS,
    SCALES,
    ZEROS,
    SymmetricDecoder,
    SymmetricEncoder,
    ZeroPointDecoder,
    check_encodes,
    described,
    first_zeros,
    group_size_in,
    is_whole,
    part_name,
    word_of,
    zeros_and_scales,
)
from streamconv.formats.linear import HEAD_NAMES, module_of
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import INT4, DecodedGrid, TableGrid

GROUPS = "g_idx"
# By whether it is v2: the name here, and that in a config (GPTQModel `quantization/config.py`, FORMAT).
_NAMES = ("gptq", "gptq-v2")
_CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
# What older kernels take: whole blocks of so many outputs.
_ROWS = 32
# Only to say what `g_idx` and scales amount to.
_USUAL_ROWS = 4096
# Where optimum looks for decoder layers (`gptq/constants.py`, BLOCK_PATTERNS), and names of them in files that
# transformers renames to one of these.
_LAYERS = frozenset(
    {
        "transformer.h",
        "model.decoder.layers",
        "gpt_neox.layers",
        "model.layers",
        "model.language_model.layers",
        "language_model.model.layers",
        "h",
        "decoder.layers",
        "layers",
    }
)
_NUMBERED = re.compile(r"(.+?)\.\d+\.(.+)")


@dataclass(frozen=True, slots=True)
class WordsAcross:
    """Line r of a file holds word r of every row."""

    rows: int
    lines: int

    @property
    def line_bytes(self) -> int:
        return 4 * self.rows

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        kernels_for(form.device).turn_words(self._words(form, lines), _lines(out, lines))

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        kernels_for(form.device).turn_words(_lines(raw, lines), self._words(form, lines))

    def _words(self, form: Tensor, lines: range) -> Tensor:
        return form.view(torch.int32).view(self.rows, self.lines)[:, lines.start : lines.stop]


def _lines(raw: Tensor, lines: range) -> Tensor:
    return raw.view(torch.int32).view(len(lines), -1)


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Labels:
    """Statements of a config about zero points: their version, and whether all are 8."""

    is_v2: bool
    is_symmetric: bool

    def stored_zero(self, words: Tensor) -> int | None:
        """Stored number for the zero point 8, if these first `words` of `qzeros` say that all are; else None.

        The file counts for more than its label.
        """
        for stored, is_v2 in ((MIDDLE - 1, False), (MIDDLE, True)):
            if bool((words == word_of(stored)).all()) and (self.is_symmetric or self.is_v2 == is_v2):
                return stored
        return None


def _find_weight(
    name: str,
    labels: _Labels,
    dtype: Dtype,
    free: Mapping[str, StoredTensor],
    reader: TensorReader,
) -> Weight:
    """The weight `name`; CheckpointError unless its parts are whole and agree."""
    names = {role: part_name(name, role) for role in (MAIN, ZEROS, SCALES, GROUPS)}
    if names[GROUPS] not in free:
        del names[GROUPS]
    parts = parts_of(name, names, free)
    main = parts[MAIN]
    rows, columns = main.shape[1], main.shape[0] * A_WORD
    if GROUPS in parts and (parts[GROUPS].dtype != I32 or parts[GROUPS].shape != (columns,)):
        raise wrong(parts[GROUPS], f"I32 [{columns}], if the weight has 4 bits, which is all that is read")
    group = group_size_in(parts, rows, columns)
    groups = _groups(parts.get(GROUPS), group, reader)
    product, order = parts[SCALES].dtype, WordsAcross(rows, main.shape[0])
    stored = labels.stored_zero(first_zeros(parts[ZEROS], reader))
    is_v2 = labels.is_v2 if stored is None else stored == MIDDLE
    found = GptqFormat(is_v2, INT4.of_block(group))
    remarks = {
        "in activation order": bool(groups),
        "with zero points": stored is None,
        f"scales in {product.name}": product != F16,
        NO_GROUPS: GROUPS not in parts,
    }
    decoder: Decoder
    if stored is not None and not groups:
        decoder = SymmetricDecoder(name, columns, found.grid, product, order, stored)
    else:
        grid = DecodedGrid(f"{found.grid.name} with zero points", group)
        subtracted = 0 if is_v2 else 1
        decoder = ZeroPointDecoder(name, columns, grid, product, order, IN_ORDER, subtracted, groups)
    return Weight(name, (rows, columns), dtype, described(found.name, group, remarks), decoder, parts)


def _groups(tensor: StoredTensor | None, group: int, reader: TensorReader) -> bytes:
    """The group of every column, where it is not what it is without activation order; else nothing."""
    if tensor is None:
        return b""
    found = reader.load(tensor)
    count = tensor.shape[0] // group
    if bool((found < 0).any()) or bool((found >= count).any()):
        raise wrong(tensor, f"groups from 0 to {count - 1}")
    if torch.equal(found, _plain_groups(tensor.shape[0], group)):
        return b""
    return bytes(tensor_bytes(found))


def _plain_groups(columns: int, group: int) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // group


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """GPTQ, 4 bit, v1 or v2."""

    is_v2: bool = False
    grid: TableGrid = INT4
    library: str = "gptqmodel"
    load_in: None = None
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ("vLLM", "SGLang", "GPTQModel")
    config_copy: str | None = "quantize_config.json"
    marks: Marks = MARKS
    group_sizes: tuple[int, ...] = GROUP_SIZES

    @property
    def name(self) -> str:
        return _NAMES[self.is_v2]

    @property
    def loaders(self) -> str:
        """See Format. Servers took v2 for v1 until late in 2025 (vLLM, pull request 26092)."""
        servers = "recent vLLM and SGLang" if self.is_v2 else "vLLM, SGLang"
        return f"transformers with optimum and GPTQModel, {servers}"

    @property
    def group_size(self) -> int:
        return self.grid.block

    def of_group_size(self, size: int) -> Format:
        return replace(self, grid=self.grid.of_block(size))

    @property
    def bits_per_weight(self) -> float:
        return 4 + (16 + 4) / self.grid.block + 32 / _USUAL_ROWS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format. That of v1 finds both: zero points tell them apart, and are read once."""
        if self.is_v2:
            return ()
        mains = [
            tensor for name, tensor in free.items() if name.endswith(f".{MAIN}") and _is_gptq(free, name)
        ]
        if not mains:
            return ()
        checkpoint_format = quantization.get("checkpoint_format") or quantization.get("format")
        labels = _Labels(checkpoint_format == _CHECKPOINT_FORMATS[True], bool(quantization.get("sym", True)))
        dtype = largest_dtype(free, but=f".{SCALES}")
        with TensorReader() as reader:
            return [
                _find_weight(module_of(main.name) + ".weight", labels, dtype, free, reader) for main in mains
            ]

    def fits(self, name: str, shape: Shape) -> bool:
        """See Format. Loaders look for it in a language model's layers only."""
        layers = _NUMBERED.fullmatch(module_of(name))
        return layers is not None and layers[1] in _LAYERS and is_whole(shape, _ROWS, self.group_size)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> SymmetricEncoder:
        """See Format."""
        check_encodes(name, shape, dtype, self.name, _ROWS, self.group_size)
        rows, columns = shape
        order = WordsAcross(rows, columns // A_WORD)
        parts = (
            TensorSpec(part_name(name, MAIN), I32, (columns // A_WORD, rows)),
            *zeros_and_scales(name, shape, self.grid),
            TensorSpec(part_name(name, GROUPS), I32, (columns,)),
        )
        tail = (bytes(tensor_bytes(_plain_groups(columns, self.grid.block))),)
        stored_as = grouped_name(self.name, self.group_size)
        stored_zero = MIDDLE if self.is_v2 else MIDDLE - 1
        return SymmetricEncoder(stored_as, name, shape, dtype, self.grid, order, stored_zero, parts, tail)

    def quantization_config(self, dtype: Dtype, quantized: Sequence[str], skipped: Sequence[str]) -> Json:
        """See Format. What transformers, vLLM and GPTQModel read of it, and who wrote it.

        Versions have two names for the key that tells v1 from v2, as GPTQModel writes them: vLLM knows the older one
        only, optimum without transformers the newer one.
        """
        del dtype  # loaders take that of the model
        config: Json = {
            "bits": 4,
            "checkpoint_format": _CHECKPOINT_FORMATS[self.is_v2],
            "desc_act": False,
            "format": _CHECKPOINT_FORMATS[self.is_v2],
            "group_size": self.grid.block,
            "lm_head": False,
            "meta": {"quantizer": [f"streamconv:{version('streamconv')}"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": True,
        }
        return config | _exceptions(quantized, [entry for entry in skipped if entry not in HEAD_NAMES])


def _is_gptq(free: Mapping[str, StoredTensor], main: str) -> bool:
    """Whether codes are packed along inputs: AWQ's names are the same, and its words hold eight outputs."""
    scales = free.get(f"{module_of(main)}.{SCALES}")
    is_matrix = free[main].dtype == I32 and len(free[main].shape) == 2
    return is_matrix and (scales is None or free[main].shape[1] == scales.shape[-1])


def _below(entry: str) -> str:
    """Pattern for what may follow the name of a module left in 16 bit: all experts of a layer are below one."""
    return r"(?:\..*)?" if entry.rpartition(".")[2] == "experts" else ""


def _exceptions(quantized: Iterable[str], left: Sequence[str]) -> Json:
    """Entries of a config for modules of the layers that are `left` in 16 bit.

    transformers (optimum) and vLLM quantize modules with the endings in `modules_in_block_to_quantize`, GPTQModel
    leaves out those that `dynamic` names with a minus. Endings are the same for all layers.
    """
    if not left:
        return {}
    found = (_NUMBERED.fullmatch(module_of(name)) for name in quantized)
    endings = sorted({match[2] for match in found if match is not None})
    for entry in left:
        for ending in endings:
            if f".{entry}".endswith(f".{ending}"):
                raise UnsupportedError(
                    f"{entry} would stay in 16 bit and {ending} of other layers would not, which transformers cannot "
                    f"be told of a GPTQ model; leave it in 16 bit in every layer: --ignore {ending}"
                )
    return {
        "dynamic": {rf"-:(?:.*\.)?{re.escape(entry)}{_below(entry)}$": {} for entry in left},
        "modules_in_block_to_quantize": [[ending] for ending in endings],
    }
