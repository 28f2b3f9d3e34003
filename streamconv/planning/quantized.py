"""The set of weights that an output stores quantized, and the linear modules that stay in 16 bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NoReturn

from streamconv.adapters.base import Replace
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.checkpoint.types import Shape
from streamconv.dtypes import BF16
from streamconv.errors import OptionError
from streamconv.formats import FORMATS, with_groups
from streamconv.formats.base import EmbeddingStore, Encoder, Format, Grouped, Weight
from streamconv.formats.linear import DEFAULT_IGNORE, Selection, matches, module_of, select
from streamconv.formats.mixed import check_partners, mixed_quantization
from streamconv.formats.stacks import expert_loaders, rounded_again
from streamconv.gguf.model import GgufModel
from streamconv.gguf.pieces import GgufPiece
from streamconv.planning.assignment import FormatRule, ModuleFormats, is_dense, read_rules, rule_for
from streamconv.planning.base import Base
from streamconv.planning.choices import KEEP, Choices
from streamconv.planning.gguf import formats_of
from streamconv.planning.options import MergeOptions


@dataclass(frozen=True, slots=True)
class QuantizedSet:
    """Formats of quantized weights by name, what the config says of other modules, and paths of those that do not fit.

    Fitting is of shapes. `dense`: formats of weights that are asked to be stored in a float type of their own. `kept`:
    encoders of those that stay as their file has them; where there are any, they are all that is quantized.
    """

    formats: Mapping[str, Format]
    skipped: Sequence[str]
    unfit: tuple[str, ...]
    dense: Mapping[str, Format] = field(default_factory=lambda: MappingProxyType({}))
    kept: Mapping[str, Encoder] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def weights(self) -> frozenset[str]:
        return frozenset(self.formats) | frozenset(self.kept)


def choose_quantized(
    base: Base,
    weights: Mapping[str, Weight],
    replaces: Mapping[str, Replace],
    choices: Choices,
    options: MergeOptions,
    kept: Mapping[str, Encoder],
    model: GgufModel | None = None,
    pieces: Mapping[str, GgufPiece] = MappingProxyType({}),
) -> QuantizedSet:
    """Weights the output stores quantized, and the linear modules it leaves in 16 bit: one decision.

    `kept` are those that stay as they are stored; where there are any, they are all. `model` has the places of a GGUF
    file, where all matrices are quantized, and `pieces` those of weights that it has otherwise.
    """
    _check_patterns("--ignore", options.ignore, weights)
    _check_patterns("--quant-for", [rule.pattern for rule in choices.mixture.rules], weights)
    if model is not None and choices.quant is not None:
        return _of_gguf(model, choices, pieces, options.ignore)
    if choices.quant is None:
        return QuantizedSet({}, (), ())
    if kept:
        return QuantizedSet({}, (), (), kept=kept)
    ignore, dense = _left_out(base, weights, replaces, choices.quant, choices.mixture, options)
    shapes = {name: weight.shape for name, weight in weights.items()}
    # A bias beside a weight says nothing of it.
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    formats = {name: _format_of(name, base, choices.quant, choices.mixture) for name in matrices}
    unfit = {name for name, shape in matrices.items() if not formats[name].fits(name, shape)}
    wanted = _selected(base, shapes, [choices.quant], ignore, dense)
    selection = _selected(base, shapes, [choices.quant], ignore, dense | {module_of(name) for name in unfit})
    _check_rules(choices.mixture.rules, wanted.quantized, selection.quantized, shapes)
    _check_some(base, choices.quant, wanted.quantized, selection.quantized, shapes)
    chosen = frozenset(selection.quantized)
    left = tuple(module_of(name) for name in wanted.quantized if name not in chosen)
    tables = _tables(choices.quant, matrices, options.ignore, replaces, base)
    found = QuantizedSet(
        {name: formats[name] for name in (*selection.quantized, *tables)},
        selection.skipped,
        left,
        _dense_formats(matrices, choices.mixture.rules),
    )
    if choices.mixture.rules:
        check_partners(found.formats)
    # Written when all is done; what it cannot say is refused now.
    mixed_quantization(choices.dtype or BF16, found.formats, found.skipped)
    return found


def _tables(
    quant: Format,
    matrices: Mapping[str, Shape],
    ignore: Sequence[str],
    replaces: Mapping[str, Replace],
    base: Base,
) -> list[str]:
    """The embedding and the output head, where loaders take these quantized as well, and they are not left out."""
    if not isinstance(quant, EmbeddingStore) or not quant.takes_embeddings or base.quantized:
        return []
    found = {find_embedding(matrices), *HEADS} & matrices.keys()
    return [
        name
        for name in matrices
        if name in found
        and name not in replaces
        and not matches(module_of(name), ignore)
        and quant.fits(name, matrices[name])
    ]


def _selected(
    base: Base,
    shapes: Mapping[str, Shape],
    formats: Sequence[Format],
    ignore: Sequence[str],
    dense: frozenset[str],
) -> Selection:
    by_path = any(each.skips_by_path for each in formats)
    has_experts = any(expert_loaders(each, base.index.config) for each in formats)
    return select(shapes, base.index.config, ignore, dense, by_path=by_path, has_experts=has_experts)


def _format_of(name: str, base: Base, quant: Format, mixture: ModuleFormats) -> Format:
    """The format of a weight, if it is quantized."""
    rule = rule_for(module_of(name), mixture.rules) if mixture.rules else None
    if rule is not None and rule.format is not None and not is_dense(rule):
        return rule.format
    own = base.weights.get(name)
    return quant if own is None else mixture.kept.get(own.format, quant)


def _dense_formats(matrices: Iterable[str], rules: Sequence[FormatRule]) -> Mapping[str, Format]:
    """Float types that rules name, by weight."""
    found = {}
    for name in matrices if rules else ():
        rule = rule_for(module_of(name), rules)
        if rule is not None and rule.format is not None and is_dense(rule):
            found[name] = rule.format
    return found


def _check_some(
    base: Base, quant: Format, wanted: Sequence[str], fitting: Sequence[str], shapes: Mapping[str, Shape]
) -> None:
    """Raise OptionError where nothing would be quantized."""
    if not wanted:
        raise OptionError(
            f"--quant {quant.name} would quantize nothing: {base.index.storage.location} has no linear "
            "weights that a loader would quantize, or --ignore names them all; leave --quant out"
        )
    if not fitting:
        raise OptionError(
            f"--quant {quant.name} would quantize nothing: {wanted[0]} has shape "
            f"{list(shapes[wanted[0]])} and no other weight fits either; choose a smaller --group-size, or "
            "another --quant"
        )


def _check_rules(
    rules: Sequence[FormatRule], wanted: Sequence[str], fitting: Sequence[str], shapes: Mapping[str, Shape]
) -> None:
    """Raise OptionError for a rule by which no weight is stored in its format."""
    for rule in rules if any(not is_dense(rule) for rule in rules) else ():
        own = [name for name in wanted if rule_for(module_of(name), rules) == rule]
        if is_dense(rule) or set(own) & set(fitting):
            continue
        if own:
            raise OptionError(
                f"--quant-for {rule} would quantize nothing: {own[0]}, of shape {list(shapes[own[0]])}, is none that "
                "it stores, nor is anything else that it names; choose smaller groups (:g32), or another format"
            )
        raise OptionError(
            f"--quant-for {rule} would quantize nothing: what it names are no linear weights that a loader would "
            "quantize (an output head tied to the embedding has none), or --ignore or a later --quant-for names them, "
            "too; leave it out"
        )


def _of_gguf(
    model: GgufModel, choices: Choices, pieces: Mapping[str, GgufPiece], ignore: Sequence[str]
) -> QuantizedSet:
    """All matrices, in the types of a GGUF file; what these leave in 16 bit is stored in F16."""
    assert choices.quant is not None
    formats = formats_of(model, choices.quant, choices.mixture, pieces, ignore)
    quantized = {name: each for name, each in formats.items() if each.grid is not None}
    if not quantized and choices.quant.grid is None:
        return QuantizedSet(formats, (), ())
    skipped = {name: module_of(name) for name in formats if name not in quantized}
    is_left = {name for name in skipped if matches(module_of(name), ignore) or _rule_of(name, choices)}
    if not quantized:
        _refuse_unfit(choices.quant, model, [name for name in skipped if name not in is_left])
    unfit = tuple(module for name, module in skipped.items() if name not in is_left)
    return QuantizedSet(quantized, tuple(skipped.values()), unfit, {name: formats[name] for name in skipped})


def _rule_of(name: str, choices: Choices) -> FormatRule | None:
    return rule_for(module_of(name), choices.mixture.rules)


def _refuse_unfit(quant: Format, model: GgufModel, unfit: Sequence[str]) -> NoReturn:
    """Raise OptionError where no matrix of a GGUF file is quantized."""
    if not unfit:
        raise OptionError(
            f"--quant {quant.name} would quantize nothing: --ignore or --quant-for leave every matrix in 16 bit; "
            "choose gguf:f16 or gguf:bf16"
        )
    raise OptionError(
        f"--quant {quant.name} would quantize nothing: {unfit[0]} has shape {list(model.places[unfit[0]].shape)}, whose"
        " rows are no whole blocks of 32, and no other matrix has such rows either; choose gguf:f16 or gguf:bf16"
    )


def _left_out(
    base: Base,
    weights: Mapping[str, Weight],
    replaces: Mapping[str, Replace],
    quant: Format | None,
    mixture: ModuleFormats,
    options: MergeOptions,
) -> tuple[Sequence[str], frozenset[str]]:
    """Patterns of modules that stay in 16 bit, and paths of such."""
    ignore, dense = _usually_left_out(base, replaces, options)
    ignore = (*ignore, *rounded_again(quant, base.index.config))
    if not mixture.rules:
        return ignore, dense
    modules = {module_of(name) for name in (*weights, *base.weights)}
    # A rule quantizes heads, too, and what a quantized base has in 16 bit; but not what --ignore names.
    left = {module for module in modules if module in dense or matches(module, ignore)}
    found = set[str]()
    for module in modules:
        rule = rule_for(module, mixture.rules)
        if is_dense(rule) if rule is not None else module in left or not mixture.quantizes_rest:
            found.add(module)
    return options.ignore, frozenset(found)


def _usually_left_out(
    base: Base, replaces: Mapping[str, Replace], options: MergeOptions
) -> tuple[Sequence[str], frozenset[str]]:
    """The same of modules that no rule names."""
    # Exactly these, no pattern. A bias that the adapter holds whole says nothing of the weight beside it.
    whole = {module_of(name) for name in replaces if name.endswith(".weight")}
    # A GGUF file has every matrix in blocks, heads and routers as well, which says nothing of other formats.
    if not base.quantized or base.index.pairs:
        return (*options.ignore, *DEFAULT_IGNORE), frozenset(whole)
    # What it leaves in 16 bit stays so, what it quantizes does too.
    modules = {name: module_of(name) for name in base.weights}
    packed = {modules[name] for name, weight in base.weights.items() if weight.decoder.grid is not None}
    return options.ignore, frozenset(whole | set(modules.values()) - packed)  # its bias is not packed


def with_group_size(
    base: Base, weights: Mapping[str, Weight], replaces: Mapping[str, Replace], options: MergeOptions
) -> MergeOptions:
    """`options` with the largest groups that most weights are made of, where no size is asked for."""
    quant = FORMATS.get(options.quant.lower())
    is_open = options.group_size is None and isinstance(quant, Grouped)
    if not is_open and not options.quant_for:
        return options
    _check_patterns("--ignore", options.ignore, weights)
    rules = read_rules(options.quant_for)
    mixture = ModuleFormats(rules, quantizes_rest=quant is not None or options.quant.lower() == KEEP)
    ignore, dense = _left_out(base, weights, replaces, quant, mixture, options)
    shapes = {name: weight.shape for name, weight in weights.items()}
    formats = [each for each in (quant, *mixture.formats) if each is not None]
    wanted = _selected(base, shapes, formats, ignore, dense).quantized
    by_rule = {name: rule_for(module_of(name), rules) for name in wanted} if rules else {}
    sized = [
        _with_size(rule, {name: shapes[name] for name in wanted if by_rule[name] == rule}, options.group_size)
        for rule in rules
    ]
    options = replace(options, quant_for=tuple(map(str, sized)))
    if not is_open or not isinstance(quant, Grouped):
        return options
    best = _best_size(quant, {name: shapes[name] for name in wanted if by_rule.get(name) is None})
    return options if best == quant.group_size else replace(options, group_size=best)


def _with_size(rule: FormatRule, shapes: Mapping[str, Shape], size: int | None) -> FormatRule:
    """The rule with the size of its groups: its own, else that of all, else the best for weights of these `shapes`."""
    if rule.has_size or not isinstance(rule.format, Grouped):
        return rule
    found = size or _best_size(rule.format, shapes)
    return replace(rule, format=with_groups(rule.format, found), has_size=True)


def _best_size(quant: Grouped, shapes: Mapping[str, Shape]) -> int:
    """The largest size of groups, up to the format's own, that most of these weights are whole groups of."""
    fitting = {
        size: sum(quant.of_group_size(size).fits(name, shape) for name, shape in shapes.items())
        for size in sorted(quant.group_sizes, reverse=True)
        if size <= quant.group_size
    }
    return max(fitting, key=lambda size: fitting[size])


def _check_patterns(option: str, patterns: Sequence[str], weights: Mapping[str, Weight]) -> None:
    """Raise OptionError for a pattern that names nothing: misspelt, --ignore would quantize what it means to spare."""
    modules = {module_of(name) for name in weights} | set(DEFAULT_IGNORE)  # a tied head has no weight
    for pattern in patterns:
        if not any(matches(module, (pattern,)) for module in modules):
            raise OptionError(
                f"{option} {pattern} matches no module of the base; give part of a module path, such as "
                "mlp.up_proj, or re: and a regular expression matched from the start of the path"
            )
