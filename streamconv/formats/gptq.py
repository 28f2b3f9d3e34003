"""GPTQ storage: integers of 4 bits in groups along the inputs, eight inputs a word; of 8 bits, four.

Source: GPTQModel `nn_modules/qlinear/__init__.py` (buffers, pack, dequantize_weight), `utils/model.py` (v1 and v2); the
config: transformers' GPTQConfig, optimum `gptq/quantizer.py` (convert_model). Beside what `int_words` tells:

    P.qweight  int32 [in / 8, out]; bits 4 j of word r hold input 8 r + j
    P.qzeros   the zero point less 1 (v1, checkpoint_format "gptq"), or as it is (v2, "gptq_v2")
    P.g_idx    int32 [in], the group of each input: input // group, but in activation order

Of single modules a config may say otherwise than of all (`dynamic`, GPTQModel `quantization/config.py`, dynamic_get):
bits, sym, group_size and desc_act by expressions with `+:` before them, or nothing; those with `-:` name modules in 16
bit. The first that a module's path begins with counts.

Both are written, of 4 bits and not in activation order; v1 is what every loader reads. Others keep their layout. Which
version a symmetric weight is, its zero points tell: there are files of v2 that say v1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.expressions import Expression
from streamconv.checkpoint.reader import TensorReader, tensor_bytes
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape, StoredTensor, TensorSpec
from streamconv.dtypes import F16, I32, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats.base import (
    GROUP_SIZES,
    USUAL_GROUP_SIZE,
    Format,
    Json,
    Marks,
    Mixable,
    Weight,
    group_of,
    grouped_name,
    parts_of,
    wrong,
)
from streamconv.formats.dense import largest_dtype
from streamconv.formats.int_words import (
    A_WORD,
    MAIN,
    MARKS,
    NO_GROUPS,
    SCALES,
    ZEROS,
    IntWordsDecoder,
    IntWordsEncoder,
    Words,
    ZeroPoints,
    check_encodes,
    columns_in_order,
    described,
    first_zeros,
    grid_of,
    group_size_in,
    is_whole,
    part_name,
    plain_groups,
    stored_groups,
    word_of,
    zeros_and_scales,
)
from streamconv.formats.linear import HEAD_NAMES, module_of
from streamconv.formats.targets import expressions, fused_too
from streamconv.formats.undecoded import find_each
from streamconv.kernels import kernels_for
from streamconv.kernels.grids import TableGrid

GROUPS = "g_idx"
# By whether it is v2: the name here, and that in a config (GPTQModel `quantization/config.py`, FORMAT); and the name of
# v1 with zero points.
_NAMES = ("gptq", "gptq-v2", "gptq-asym")
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

    def symmetric(self, found: Tensor, bits: int) -> bool | None:
        """Whether zero points are those of v2, if these first words of `qzeros` say that all are the middle one.

        The file counts for more than its label.
        """
        for is_v2 in (False, True):
            words = words_of(bits, is_v2)
            is_middle = bool((found == word_of(words.middle - words.subtracted, bits)).all())
            if is_middle and (self.is_symmetric or self.is_v2 == is_v2):
                return is_v2
        return None


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """Settings of a config: the `usual` ones, and by expression those of single modules."""

    usual: Mapping[str, Any]
    rules: tuple[tuple[Expression, Mapping[str, Any]], ...]

    def of(self, module: str, key: str, otherwise: object) -> object:
        """The setting of a quantized module; `otherwise` where the config has none."""
        own = next((settings for expression, settings in self.rules if expression.fits(module)), {})
        return own.get(key, self.usual.get(key, otherwise))


def module_settings(quantization: Mapping[str, Any]) -> ModuleSettings:
    """Settings by module of a config. Raises CheckpointError for an expression that cannot be used."""
    dynamic = quantization.get("dynamic")
    rules = [
        (_expression(pattern), settings if isinstance(settings, Mapping) else {})
        for pattern, settings in (dynamic.items() if isinstance(dynamic, Mapping) else ())
    ]
    return ModuleSettings(quantization, tuple(rules))


def _expression(pattern: str) -> Expression:
    plain = pattern[2:] if pattern.startswith(("+:", "-:")) else pattern
    return Expression(
        plain,
        lambda why: CheckpointError(f"config.json: dynamic in quantization_config: {shown(plain)} {why}"),
    )


def words_of(bits: int, is_v2: bool) -> Words:
    """Layout of words, of which v1 stores zero points less one."""
    return Words(bits, tuple(range(32 // bits)), subtracted=0 if is_v2 else 1)


def zero_points_of(bits: int, is_v2: bool) -> ZeroPoints:
    """Zero points that files can have. Of v1, 0 would be stored as -1, and the greatest plus one read as 0."""
    return ZeroPoints(least=0 if is_v2 else 1, greatest=2**bits - 1)


def _find_weight(
    name: str,
    labels: _Labels,
    dtype: Dtype,
    free: Mapping[str, StoredTensor],
    reader: TensorReader,
) -> Weight:
    """The weight `name`, with an encoder of its own layout; CheckpointError unless its parts are whole and agree."""
    names = {role: part_name(name, role) for role in (MAIN, ZEROS, SCALES, GROUPS)}
    if names[GROUPS] not in free:
        del names[GROUPS]
    parts = parts_of(name, names, free)
    main, scales = parts[MAIN], parts[SCALES]
    rows, bits = main.shape[1], _bits(main, parts[ZEROS])
    columns = main.shape[0] * 32 // bits
    if GROUPS in parts and (parts[GROUPS].dtype != I32 or parts[GROUPS].shape != (columns,)):
        raise wrong(parts[GROUPS], f"I32 [{columns}], as {MAIN} has {bits} bits")
    group, product = group_size_in(parts, rows, columns, bits), scales.dtype
    groups = stored_groups(parts.get(GROUPS), group, reader)
    of_v2 = labels.symmetric(first_zeros(parts[ZEROS], reader), bits)
    is_v2 = labels.is_v2 if of_v2 is None else of_v2
    is_plain = bits == 4 and not groups and product == F16
    is_written = is_plain and not (is_v2 and of_v2 is None)
    remarks = {
        "8 bit": bits == 8,
        "in activation order": bool(groups),
        "with zero points": of_v2 is None and not (is_written or (not is_v2 and bits == 4)),
        f"scales in {product.name}": product != F16,
        NO_GROUPS: GROUPS not in parts,
    }
    stored_as = described(_NAMES[2 if of_v2 is None and not is_v2 and bits == 4 else is_v2], group, remarks)
    grid = grid_of(
        bits, group, zero_points_of(bits, is_v2) if of_v2 is None else None, columns_in_order(groups)
    )
    words, order = words_of(bits, is_v2), WordsAcross(rows, main.shape[0])
    decoder = IntWordsDecoder(name, columns, grid, product, order, words)
    specs = tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts.values())
    tail = (groups or bytes(tensor_bytes(plain_groups(columns, group))),) if GROUPS in parts else ()
    keep = IntWordsEncoder(stored_as, name, (rows, columns), dtype, grid, order, words, specs, tail, product)
    return Weight(name, (rows, columns), dtype, stored_as, decoder, parts, keep)


def _with_usual(weights: Sequence[Weight]) -> Sequence[Weight]:
    """Weights, those without their own encoders that the formats written here store the same.

    None where they are of several of these, which only the base's own config can tell loaders.
    """
    names = {name for weight in weights if (name := _written_name(weight)) is not None}
    if len(names) > 1:
        return weights
    return [weight if _written_name(weight) is None else replace(weight, keep=None) for weight in weights]


def _written_name(weight: Weight) -> str | None:
    """The name of the format written here that stores a weight the same, whatever its groups; None where none does."""
    name = group_of(weight.format.removesuffix(f", {NO_GROUPS}"))[0]
    return name if name in _NAMES else None


def _bits(main: StoredTensor, zeros: StoredTensor) -> int:
    """Bits of a code, by how many zero points a word has: there is one an output."""
    outputs = main.shape[1]
    for bits in (4, 8):
        if len(zeros.shape) == 2 and zeros.shape[1] * 32 == outputs * bits:
            return bits
    raise wrong(zeros, f"I32 [groups, {outputs // 8}] or [groups, {outputs // 4}], for 4 or 8 bits")


# -- the format --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """GPTQ, 4 bit, v1 or v2; of v1 with all zero points 8, or each group's own."""

    is_v2: bool = False
    is_asymmetric: bool = False
    group_size: int = USUAL_GROUP_SIZE
    library: str = "gptqmodel"
    load_in: None = None
    skips_by_path: bool = False
    expert_loaders: tuple[str, ...] = ("vLLM", "SGLang", "GPTQModel")
    config_copy: str | None = "quantize_config.json"
    has_partners: bool = True
    marks: Marks = MARKS
    group_sizes: tuple[int, ...] = GROUP_SIZES

    @property
    def name(self) -> str:
        return _NAMES[2 if self.is_asymmetric else self.is_v2]

    @property
    def grid(self) -> TableGrid:
        points = zero_points_of(4, self.is_v2) if self.is_asymmetric else None
        return grid_of(4, self.group_size, points)

    @property
    def layout(self) -> str:
        version = "v2" if self.is_v2 else "v1"
        zeros = "with zero points" if self.is_asymmetric else "symmetric"
        return f"GPTQ {version}, 4-bit integers in groups of {self.group_size}, {zeros}"

    @property
    def loaders(self) -> str:
        """See Format. Servers took v2 for v1 until late in 2025 (vLLM, pull request 26092); vLLM 0.32 refuses zero
        points ("Unsupported quantization config: bits=4, sym=False").
        """
        servers = "SGLang" if self.is_asymmetric else "vLLM, SGLang"
        return f"transformers with optimum and GPTQModel, {servers}"

    def of_group_size(self, size: int) -> Format:
        return replace(self, group_size=size)

    @property
    def bits_per_weight(self) -> float:
        return 4 + (16 + 4) / self.group_size + 32 / _USUAL_ROWS

    def find(self, free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Sequence[Weight]:
        """See Format. That of v1 finds all: zero points tell them apart, and are read once."""
        if self.is_v2 or self.is_asymmetric:
            return ()
        mains = [
            tensor for name, tensor in free.items() if name.endswith(f".{MAIN}") and _is_gptq(free, name)
        ]
        if not mains:
            return ()
        checkpoint_format = quantization.get("checkpoint_format") or quantization.get("format")
        is_v2, settings = checkpoint_format == _CHECKPOINT_FORMATS[True], module_settings(quantization)
        dtype = largest_dtype(free, but=f".{SCALES}")

        def find(module: str) -> Weight:
            bits = settings.of(module, "bits", 4)
            if bits not in (4, 8):
                raise UnsupportedError(
                    f"{module}: config.json says that it is GPTQ of {shown(bits)} bits, which is not supported yet; "
                    "give the 16-bit base model instead"
                )
            labels = _Labels(is_v2, bool(settings.of(module, "sym", otherwise=True)))
            return _find_weight(f"{module}.weight", labels, dtype, free, reader)

        with TensorReader() as reader:
            return _with_usual(find_each([module_of(main.name) for main in mains], find, free, "gptq"))

    def fits(self, name: str, shape: Shape) -> bool:
        """See Format. Loaders look for it in a language model's layers only."""
        layers = _NUMBERED.fullmatch(module_of(name))
        return layers is not None and layers[1] in _LAYERS and is_whole(shape, _ROWS, self.group_size)

    def encoder(self, name: str, shape: Shape, dtype: Dtype) -> IntWordsEncoder:
        """See Format."""
        check_encodes(name, shape, dtype, self.name, _ROWS, self.group_size)
        rows, columns = shape
        order = WordsAcross(rows, columns // A_WORD)
        parts = (
            TensorSpec(part_name(name, MAIN), I32, (columns // A_WORD, rows)),
            *zeros_and_scales(name, shape, self.group_size),
            TensorSpec(part_name(name, GROUPS), I32, (columns,)),
        )
        tail = (bytes(tensor_bytes(plain_groups(columns, self.group_size))),)
        stored_as = grouped_name(self.name, self.group_size)
        words = words_of(4, self.is_v2)
        return IntWordsEncoder(stored_as, name, shape, dtype, self.grid, order, words, parts, tail)

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
            "group_size": self.group_size,
            "lm_head": False,
            "meta": {"quantizer": [f"streamconv:{version('streamconv')}"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": not self.is_asymmetric,
        }
        return config | _exceptions(quantized, [entry for entry in skipped if entry not in HEAD_NAMES])

    @property
    def family(self) -> str:
        return self.name

    def module_config(self) -> Json:
        """See Mixable."""
        return {"group_size": self.grid.block}

    def mixed_config(
        self, dtype: Dtype, groups: Sequence[tuple[Mixable, Sequence[str]]], skipped: Sequence[str]
    ) -> Json:
        """See Mixable. vLLM and GPTQModel know `dynamic`; transformers (optimum) has one size of groups for a model.

        The first expression that means a module counts. vLLM looks for the layers that it makes of several modules.
        """
        names = [name for _, own in groups for name in own]
        config = self.quantization_config(dtype, names, skipped)
        modules = [fused_too(map(module_of, own)) for _, own in groups]
        others = {
            f"+:{re.escape(each.expression)}$" if not each.is_expression else f"+:{each.expression}": settings
            for (storage_format, _), targets in zip(groups[1:], expressions(modules)[1:], strict=True)
            for settings in [storage_format.module_config()]
            for each in targets
        }
        return {**config, "dynamic": {**config.get("dynamic", {}), **others}}


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
