"""The set of weights that an output stores quantized, and the linear modules that stay in 16 bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.adapters.base import Replace
from streamconv.dtypes import BF16
from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.formats.base import Grouped, Weight
from streamconv.formats.linear import DEFAULT_IGNORE, matches, module_of, select
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.options import MergeOptions


@dataclass(frozen=True, slots=True)
class QuantizedSet:
    """Names of weights; what the config says of other modules; and the paths of those whose shape does not fit."""

    weights: frozenset[str]
    skipped: Sequence[str]
    unfit: tuple[str, ...]


def choose_quantized(
    base: Base,
    weights: Mapping[str, Weight],
    replaces: Mapping[str, Replace],
    choices: Choices,
    options: MergeOptions,
) -> QuantizedSet:
    """Weights the output stores quantized, and the linear modules it leaves in 16 bit: one decision."""
    _check_ignore(options.ignore, weights)
    if choices.quant is None:
        return QuantizedSet(frozenset(), (), ())
    ignore, dense = _left_out(base, replaces, options)
    shapes = {name: weight.shape for name, weight in weights.items()}
    # A bias beside a weight says nothing of it.
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    unfit = {name for name, shape in matrices.items() if not choices.quant.fits(name, shape)}
    by_path, config = choices.quant.skips_by_path, base.index.config
    wanted = select(shapes, config, ignore, dense, by_path=by_path)
    selection = select(shapes, config, ignore, dense | {module_of(name) for name in unfit}, by_path=by_path)
    if not wanted.quantized:
        raise OptionError(
            f"--quant {choices.quant.name} would quantize nothing: {base.index.storage.location} has no linear "
            "weights that a loader would quantize, or --ignore names them all; leave --quant out"
        )
    if not selection.quantized:
        raise OptionError(
            f"--quant {choices.quant.name} would quantize nothing: {wanted.quantized[0]} has shape "
            f"{list(shapes[wanted.quantized[0]])} and no other weight fits either; choose a smaller --group-size, or "
            "another --quant"
        )
    # Written when all is done; what it cannot say is refused now.
    choices.quant.quantization_config(choices.dtype or BF16, selection.quantized, selection.skipped)
    left = tuple(module_of(name) for name in wanted.quantized if name in unfit)
    return QuantizedSet(frozenset(selection.quantized), selection.skipped, left)


def _left_out(
    base: Base, replaces: Mapping[str, Replace], options: MergeOptions
) -> tuple[Sequence[str], frozenset[str]]:
    """Patterns of modules that stay in 16 bit, and paths of such."""
    # Exactly these, no pattern. A bias that the adapter holds whole says nothing of the weight beside it.
    whole = {module_of(name) for name in replaces if name.endswith(".weight")}
    if not base.quantized:
        return (*options.ignore, *DEFAULT_IGNORE), frozenset(whole)
    # What it leaves in 16 bit stays so, what it quantizes does too.
    modules = {name: module_of(name) for name in base.weights}
    packed = {modules[name] for name, weight in base.weights.items() if weight.is_quantized}
    return options.ignore, frozenset(whole | set(modules.values()) - packed)  # its bias is not packed


def with_group_size(
    base: Base, weights: Mapping[str, Weight], replaces: Mapping[str, Replace], options: MergeOptions
) -> MergeOptions:
    """`options` with the largest groups that most weights are made of, where no size is asked for."""
    quant = FORMATS.get(options.quant.lower())
    if options.group_size is not None or not isinstance(quant, Grouped):
        return options
    _check_ignore(options.ignore, weights)
    ignore, dense = _left_out(base, replaces, options)
    shapes = {name: weight.shape for name, weight in weights.items()}
    wanted = select(shapes, base.index.config, ignore, dense, by_path=quant.skips_by_path).quantized
    fitting = {
        size: sum(quant.of_group_size(size).fits(name, shapes[name]) for name in wanted)
        for size in sorted(quant.group_sizes, reverse=True)
        if size <= quant.group_size
    }
    best = max(fitting, key=lambda size: fitting[size])
    return options if best == quant.group_size else replace(options, group_size=best)


def _check_ignore(patterns: Sequence[str], weights: Mapping[str, Weight]) -> None:
    """Raise OptionError for an --ignore that names nothing: misspelt, it would quantize what it means to spare."""
    modules = {module_of(name) for name in weights} | set(DEFAULT_IGNORE)  # a tied head has no weight
    for pattern in patterns:
        if not any(matches(module, (pattern,)) for module in modules):
            raise OptionError(
                f"--ignore {pattern} matches no module of the base; give part of a module path, such as "
                "mlp.up_proj, or re: and a regular expression matched from the start of the path"
            )
