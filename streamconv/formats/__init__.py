"""Formats: how weights are stored, and which weights a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.container import SAFETENSORS, Container, Gguf
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import BF16, F16, F32
from streamconv.errors import CheckpointError, OptionError
from streamconv.formats import fp4, int_words
from streamconv.formats.awq import AwqFormat
from streamconv.formats.base import Format, Grouped, Marks, Reader, Weight, group_of, grouped_name
from streamconv.formats.bnb_4bit import Bnb4bitFormat
from streamconv.formats.bnb_int8 import Int8Format
from streamconv.formats.dense import DenseFormat, dense_weight
from streamconv.formats.foreign import (
    is_read_by,
    is_rotated,
    kind_of,
    quantization_of,
    strange_tensors,
    unread_quantization,
)
from streamconv.formats.fp8 import Fp8BlockFormat, Fp8Format, written_form
from streamconv.formats.ggml_mxfp4 import GGML_MXFP4
from streamconv.formats.gguf import PREFIX, GgufFormat
from streamconv.formats.gguf_blocks import BLOCK_FORMATS
from streamconv.formats.gguf_kept import KEPT_FILES
from streamconv.formats.gpt_oss import GptOssFormat
from streamconv.formats.gptq import GptqFormat
from streamconv.formats.int_quantized import Int8RowsFormat
from streamconv.formats.mlx import MlxFormat, experts_apart
from streamconv.formats.pack_quantized import INT4_WITH_ZEROS, PackQuantizedFormat
from streamconv.formats.undecoded import has_codes, parameters_in, undecoded_weight
from streamconv.kernels.grids import FP4, INT4, INT8_GROUPS, NF4

__all__ = [
    "FORMATS",
    "container_of",
    "dense_weight",
    "family_of",
    "find_weights",
    "format_named",
    "format_of",
    "stored_as",
    "with_groups",
]


def find_weights(index: CheckpointIndex) -> tuple[Weight, ...]:
    """Every weight of a checkpoint, in the order of their main parts; each tensor is part of exactly one.

    What is stored in a way that is not decoded is a weight that says so. Raises CheckpointError for parts that are
    missing, left over, or disagree.
    """
    free = dict(index.tensors)
    quantization = quantization_of(index)
    reason = unread_quantization(index, _readers())
    found: list[Weight] = []
    if reason is not None:
        _take(_undecoded(free, quantization, reason), free, found)
    else:
        _take(_strange(index, free), free, found)
        # The dense formats stand first in the table, but take what the others leave.
        for reader in reversed(_readers()):
            _take(reader.find(MappingProxyType(free), quantization), free, found)
        _take(_beside(free, quantization), free, found)
    found += [dense_weight(name, tensor) for name, tensor in free.items()]
    if reason is None:
        _refuse_orphans(found, _marks_for(quantization))
        _check_config(index, found)
    by_main_part = {weight.parts[weight.decoder.main].name: weight for weight in found}
    in_order = (by_main_part[name] for name in index.tensors if name in by_main_part)
    return tuple(each for weight in in_order for each in experts_apart(weight, index.config))


def _take(weights: Iterable[Weight], free: dict[str, StoredTensor], found: list[Weight]) -> None:
    """Move weights to those `found`, and their parts out of those that are `free`."""
    for weight in weights:
        found.append(weight)
        for part in weight.parts.values():
            del free[part.name]


def _undecoded(
    free: Mapping[str, StoredTensor], quantization: Mapping[str, Any], reason: str
) -> list[Weight]:
    """Weights of a checkpoint that none of the readers reads: those with codes, and if it is rotated, all."""
    kind, suffixes = kind_of(quantization), _side_suffixes(_all_marks())
    parameters = parameters_in(free)
    found = [
        undecoded_weight(name, tensors, kind, reason)
        for name, tensors in parameters.items()
        if has_codes(name, tensors) or any(each.name.endswith(suffixes) for each in tensors)
    ]
    if found and not is_rotated(quantization):
        return found
    # Without codes, loaders are to quantize what they load, in a way that is not known here.
    return [undecoded_weight(name, (tensor,), kind, reason) for name, tensor in free.items()]


def _strange(index: CheckpointIndex, free: Mapping[str, StoredTensor]) -> list[Weight]:
    """Weights whose tensors are of a quantization that the config does not name."""
    shown = strange_tensors(index, _readers())
    if not shown:
        return []
    found: list[Weight] = []
    for name, tensors in parameters_in(free).items():
        sign = next((shown[each.name] for each in tensors if each.name in shown), None)
        if sign is not None and has_codes(name, tensors):
            found.append(undecoded_weight(name, tensors, *sign))
    return found


def _beside(free: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> list[Weight]:
    """Weights that are codes of another kind than those the config tells of, as DeepSeek's FP4 experts beside FP8."""
    if not quantization:
        return []
    ours = {dtype for marks in _marks_for(quantization) for dtype in marks.codes}
    found: list[Weight] = []
    for name, tensors in parameters_in(free).items():
        main = next((each for each in tensors if each.name == name), None)
        if main is not None and len(tensors) > 1 and main.dtype not in ours and has_codes(name, (main,)):
            roles = ", ".join(sorted(each.name.rpartition(".")[2] for each in tensors if each is not main))
            said = f"{name} is {main.dtype} with {roles} beside it"
            reason = f"{said}, which is not supported yet; give the 16-bit base model instead"
            found.append(undecoded_weight(name, tensors, f"{main.dtype} with {roles}", reason))
    return found


def format_of(name: str) -> Format | None:
    """The format that stores weights in the way that a Weight calls `name`; None where it is only read.

    Of files that differ in how they store the same codes and scales, it is the one that is written.
    """
    for remark in int_words.STORED_OTHERWISE:
        name = name.replace(f", {remark}", "")
    plain, size = group_of(written_form(name))
    found = FORMATS.get(plain)
    if size is None:
        return found
    return found.of_group_size(size) if isinstance(found, Grouped) and size in found.group_sizes else None


def stored_as(storage_format: Format) -> str:
    """Name that encoders and weights give the format; `format_of` undoes it."""
    usual = format_named(storage_format.name)
    if not isinstance(storage_format, Grouped) or not isinstance(usual, Grouped):
        return storage_format.name
    return grouped_name(storage_format.name, storage_format.group_size, usual.group_size)


def family_of(name: str) -> Format | None:
    """The format of which a Weight's `format` says in words how it differs; None where it is only read."""
    plain = group_of(name.partition(",")[0])[0]
    return format_of(name) or FORMATS.get(plain) or KEPT.get(plain)


def format_named(name: str) -> Format:
    """The format of an output that has this name."""
    return FORMATS[name] if name in FORMATS else KEPT[name]


def container_of(quant: Format | None) -> Container:
    """Container of an output in a format; None stands for dense weights."""
    if quant is not None and quant.name.startswith(PREFIX):
        return Gguf(quant.name.removeprefix(PREFIX).upper())
    return SAFETENSORS


def with_groups(storage_format: Format, size: int | None) -> Format:
    """The format with groups of `size`; None leaves it as it is. Raises OptionError where it cannot have them."""
    if size is None:
        return storage_format
    if not isinstance(storage_format, Grouped):
        able = ", ".join(name for name, each in FORMATS.items() if isinstance(each, Grouped))
        raise OptionError(
            f"--group-size {size} does not fit {storage_format.name}, whose scales are not of groups that could be "
            f"chosen; leave it out, or choose --quant {able}"
        )
    if size not in storage_format.group_sizes:
        known = ", ".join(map(str, storage_format.group_sizes))
        raise OptionError(f"--group-size {size} is not one that {storage_format.name} can have; use {known}")
    return storage_format.of_group_size(size)


def _check_config(index: CheckpointIndex, weights: Iterable[Weight]) -> None:
    """Raise CheckpointError where weights are stored otherwise than the config says, by which loaders go."""
    config, where = quantization_of(index), index.storage.location
    for check in {reader.marks.described for reader in _readers() if is_read_by(reader, config, where)}:
        check(weights, config, where)


def _refuse_orphans(weights: Iterable[Weight], marks: Sequence[Marks]) -> None:
    suffixes = _side_suffixes(marks)
    codes_of = {dtype: words for each in reversed(marks) for dtype, words in each.codes.items()}
    for weight in weights:
        if weight.undecoded is not None:
            continue
        if weight.name.endswith(suffixes) and len(weight.parts) == 1:
            raise CheckpointError(
                f"{weight.name} belongs to a quantized weight that is missing, or whose quant_state, SCB or "
                "other codes are; the checkpoint is incomplete, download it again"
            )
        if weight.dtype in codes_of and weight.name.endswith("weight"):
            codes, missing = codes_of[weight.dtype]
            raise CheckpointError(
                f"{weight.name} is {weight.dtype}, like {codes}, but has no {missing} beside it;"
                " the checkpoint is incomplete, or quantized in a way that is not known"
            )


def _side_suffixes(marks: Iterable[Marks]) -> tuple[str, ...]:
    return tuple(suffix for each in marks for suffix in each.side_suffixes)


def _marks_for(quantization: Mapping[str, Any]) -> Sequence[Marks]:
    """Marks of the formats that a checkpoint of this quantization may have; all where its config says nothing."""
    method = str(quantization.get("quant_method"))
    return [each for each in _all_marks() if not quantization or method in each.methods]


def _all_marks() -> Sequence[Marks]:
    return [reader.marks for reader in _readers()]


def _readers() -> tuple[Reader, ...]:
    return (*FORMATS.values(), *READERS)


# Storages that are read and not written.
READERS: tuple[Reader, ...] = (fp4.ModelOptReader(), GptOssFormat())

# Formats that a base keeps, and that nothing else is written in.
KEPT: Mapping[str, Format] = MappingProxyType(
    {**{f"mlx{bits}": MlxFormat(bits) for bits in (2, 3, 5, 6)}, "gpt-oss": GptOssFormat(), **KEPT_FILES}
)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "float32": DenseFormat(F32),
        "float16": DenseFormat(F16),
        "bfloat16": DenseFormat(BF16),
        "nf4": Bnb4bitFormat("nf4", NF4),
        "nf4-dq": Bnb4bitFormat("nf4-dq", NF4, nested=True),
        "fp4": Bnb4bitFormat("fp4", FP4),
        "fp4-dq": Bnb4bitFormat("fp4-dq", FP4, nested=True),
        "int8": Int8Format("int8"),
        "w4a16": PackQuantizedFormat("w4a16", 4, INT4),
        "w4a16-asym": PackQuantizedFormat("w4a16-asym", 4, INT4_WITH_ZEROS),
        "w8a16": PackQuantizedFormat("w8a16", 8, INT8_GROUPS),
        "w8a8": Int8RowsFormat(),
        "gptq": GptqFormat(),
        "gptq-v2": GptqFormat(is_v2=True),
        "gptq-asym": GptqFormat(is_asymmetric=True),
        "awq": AwqFormat(),
        "awq-asym": AwqFormat(is_asymmetric=True),
        "fp8": Fp8Format("fp8"),
        "fp8-block": Fp8BlockFormat("fp8-block"),
        "mlx4": MlxFormat(4),
        "mlx8": MlxFormat(8),
        "nvfp4": fp4.NVFP4,
        "nvfp4a16": fp4.NVFP4A16,
        "mxfp4a16": fp4.MXFP4A16,
        "mxfp4": fp4.MXFP4,
        "gguf:f16": GgufFormat(F16),
        "gguf:bf16": GgufFormat(BF16),
        **BLOCK_FORMATS,
        GGML_MXFP4.name: GGML_MXFP4,
    }
)
