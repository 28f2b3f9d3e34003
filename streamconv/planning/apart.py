"""Experts of a base that are stored in one parameter, as weights of their own: how loaders know quantized ones.

A fused parameter is [expert, out, in] or [expert, in, out], and gate and up may be its outputs one below the other or
in turns (`adapters/views.py`). An expert's weight is a range of the file's bytes, to be turned where inputs come first.
 Names are those of the family's checkpoints with experts apart, which transformers' own tables tell, or vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from streamconv.adapters.base import Parameter
from streamconv.adapters.conversions import Conversion, find_table
from streamconv.adapters.views import Piece, find_view
from streamconv.dtypes import DENSE
from streamconv.errors import OptionError
from streamconv.formats.base import Format, Grouped, Order, Weight
from streamconv.formats.dense import MAIN, DenseDecoder
from streamconv.formats.linear import is_expert, matches, module_of
from streamconv.formats.stacks import expert_loaders
from streamconv.planning.base import Base
from streamconv.planning.choices import Facts, resolve_quant
from streamconv.planning.options import MergeOptions

_FUSED = re.compile(r"(?P<block>.+)\.experts\.(?P<which>gate_up_proj|down_proj)")
_PARTS = ("gate_proj", "up_proj", "down_proj")
# Families whose experts vLLM reads apart (`models/llama4.py`, `models/qwen3_vl_moe.py`), and transformers does not.
_ONLY_SERVED = frozenset({"llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})


@dataclass(frozen=True, slots=True)
class TurnedOutputs:
    """Some outputs of a matrix that a file has as [in, out]: a line is an input, with all outputs."""

    lines: int
    columns: int
    outputs: range
    itemsize: int

    @property
    def line_bytes(self) -> int:
        return self.columns * self.itemsize

    def to_file(self, form: Tensor, lines: range, out: Tensor) -> None:
        """See Order."""
        raise AssertionError("experts are not written together")

    def from_file(self, raw: Tensor, lines: range, form: Tensor) -> None:
        """See Order."""
        whole = raw.view(len(lines), self.columns, self.itemsize)
        chosen = whole[:, self.outputs.start : self.outputs.stop : self.outputs.step]
        rows = form.view(len(self.outputs), self.lines, self.itemsize)
        rows[:, lines.start : lines.stop] = chosen.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Names:
    """Names in checkpoints with experts apart: `parts` of an expert, by those of a class; `renamed` are old and new
    pieces of other names beside them.
    """

    parts: Mapping[str, str]
    renamed: tuple[tuple[str, str], ...] = ()


def apart_for(base: Base, options: MergeOptions, quants: Sequence[str]) -> Base:
    """`base` with its experts apart, if they are stored fused and all outputs, one for each of `quants`, have them so.

    Raises OptionError where some do and some do not: outputs of one run are made of the same weights.
    """
    if base.quantized is not None or not any(map(_is_fused, base.weights.values())):
        return base
    facts = Facts(base.index.storage.location, None, has_adapter=False)
    formats = {
        quant: resolve_quant(facts, replace(options, quant=quant, group_size=None))[0] for quant in quants
    }
    takes = any(expert_loaders(found, base.index.config) for found in formats.values())
    apart = with_experts_apart(base) if takes else base
    if apart is base:
        return base
    have = {quant: _has_apart(base, apart, found, options) for quant, found in formats.items()}
    if all(have.values()):
        return apart
    if any(have.values()):
        fused, own = (next(quant for quant in quants if have[quant] == is_own) for is_own in (False, True))
        raise OptionError(
            f"experts are stored in one parameter, which {own} would have one by one and {fused} as they are; make the "
            "two outputs by runs of their own"
        )
    return base


def _has_apart(base: Base, apart: Base, quant: Format | None, options: MergeOptions) -> bool:
    """Whether an output of `quant` has the experts apart, as quantized ones are known; else as they are, in 16 bit."""
    loaders = expert_loaders(quant, base.index.config)
    if quant is None or not loaders:
        return False
    if is_only_served(base.index.config) and ("vLLM" not in loaders or options.calibration is not None):
        return False
    experts = [weight for name, weight in apart.weights.items() if is_expert(name) and len(weight.shape) == 2]
    if any(matches(module_of(weight.name), options.ignore) for weight in experts):
        return False
    sizes: Sequence[Format] = [quant]
    if isinstance(quant, Grouped):
        own = options.group_size
        wanted = [size for size in quant.group_sizes if size <= quant.group_size] if own is None else [own]
        sizes = [quant.of_group_size(size) for size in wanted]
    return any(all(each.fits(weight.name, weight.shape) for weight in experts) for each in sizes)


def is_only_served(config: Mapping[str, Any]) -> bool:
    """Whether it is a family whose experts servers read apart, and transformers fused alone."""
    return not _ONLY_SERVED.isdisjoint(_model_types(config))


def with_experts_apart(base: Base) -> Base:
    """`base` with a weight for each matrix of each expert, in place of fused parameters; itself where there are none
    that a loader knows apart.
    """
    names = _names_of(base.index.config)
    fused = [weight for weight in base.weights.values() if _is_fused(weight)]
    if names is None or not fused:
        return base
    stored = {weight.name: Parameter(weight.name, weight.shape, weight.dtype) for weight in fused}
    blocks = {f"{module_of(module_of(weight.name))}." for weight in fused}
    weights: dict[str, Weight] = {}
    for name, weight in base.weights.items():
        found = list(_experts(weight, stored, base.index.config, names)) if name in stored else []
        for each in found or [weight]:
            renamed = _renamed(each.name, blocks, names)
            weights[renamed] = replace(each, name=renamed)
    return replace(base, weights=MappingProxyType(weights))


def _is_fused(weight: Weight) -> bool:
    is_plain = weight.dtype.name in DENSE and weight.decoder.order is None and len(weight.parts) == 1
    return len(weight.shape) == 3 and is_plain and _FUSED.fullmatch(weight.name) is not None


def _renamed(name: str, blocks: set[str], names: _Names) -> str:
    """The name in files of a weight beside experts, or of one of theirs."""
    for block in blocks if names.renamed else ():
        if name.startswith(block):
            for old, new in names.renamed:
                name = name.replace(old, new, 1)
            break
    return name


def _experts(
    weight: Weight, stored: Mapping[str, Parameter], config: Mapping[str, Any], names: _Names
) -> Iterator[Weight]:
    """Weights of all experts in a fused one; none where their form is not known."""
    match = _FUSED.fullmatch(weight.name)
    assert match is not None
    wanted = _PARTS[:2] if match["which"] == "gate_up_proj" else _PARTS[2:]
    found = []
    for number in range(weight.shape[0]):
        for part in wanted:
            place = f"{match['block']}.experts.{number}"
            view = find_view(f"{place}.{part}.weight", stored, config)
            if view is None or len(view.pieces) != 1:
                return
            name = f"{place}.{names.parts[part]}.weight"
            found.append(_part(name, weight, view.pieces[0], bool(view.parameter.transposed)))
    yield from found


def _part(name: str, weight: Weight, piece: Piece, is_turned: bool) -> Weight:
    """The weight `name` [out, in] of one expert, which is a `piece` of a fused one."""
    tensor, width = weight.parts[weight.decoder.main], weight.shape[-1]
    size = weight.dtype.itemsize
    part = replace(
        tensor,
        name=name,
        shape=(len(piece.rows), width),
        offset=tensor.offset + piece.rows.start * width * size,
    )
    if not is_turned:
        decoder = DenseDecoder(weight.dtype, width)
        return Weight(name, part.shape, weight.dtype, weight.format, decoder, MappingProxyType({MAIN: part}))
    order: Order = TurnedOutputs(len(piece.rows), width, piece.columns, size)
    decoder = DenseDecoder(weight.dtype, len(piece.rows), order=order)
    shape = len(piece.columns), len(piece.rows)
    kind = f"{weight.format}, inputs first"
    return Weight(name, shape, weight.dtype, kind, decoder, MappingProxyType({MAIN: part}))


# -- names ---------------------------------------------------------------------------------------------------------


def _model_types(config: Mapping[str, Any]) -> list[str]:
    levels = (config, *(each for each in config.values() if isinstance(each, Mapping)))
    return [str(level.get("model_type")) for level in levels]


def _names_of(config: Mapping[str, Any]) -> _Names | None:
    """Names of experts apart in checkpoints of the family; None where no loader knows such."""
    for model_type in _model_types(config):
        if model_type in _ONLY_SERVED:
            return _Names(dict(zip(_PARTS, _PARTS, strict=True)))
        table = find_table(model_type)
        parts = dict(_parts_in(table))
        if len(parts) == len(_PARTS):
            # The lines of a table are gone through in order, so the way back begins with the last.
            plain = [line for line in table if not line.operations and not line.is_group]
            renamed = tuple(
                (line.targets[0], line.sources[0]) for line in reversed(plain) if _is_literal(line)
            )
            return _Names(parts, renamed)
    return None


def _is_literal(line: Conversion) -> bool:
    texts = (*line.sources, *line.targets)
    return len(texts) == 2 and all(re.fullmatch(r"\.[\w.]+", text) for text in texts)


def _parts_in(table: Sequence[Conversion]) -> Iterator[tuple[str, str]]:
    """Names of gate, up and down in an expert, by the lines that stack them."""
    for line in table:
        if not line.operations or line.operations[0].name != "MergeModulelist":
            continue
        called = [source.removesuffix(".weight").rpartition(".")[2] for source in line.sources]
        if line.targets[0].endswith("experts.gate_up_proj") and len(called) == 2:
            yield from zip(_PARTS[:2], called, strict=True)
        elif line.targets[0].endswith("experts.down_proj") and len(called) == 1:
            yield _PARTS[2], called[0]
