"""From options, headers and configs to a Plan. Pure: reads no weights, and refuses all that can be refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from streamconv.adapters.base import Adapter, Replace, Tie, Update, WholeUpdate
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.layout import Placed, lay_out, split_by_size
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.equalization.base import Heads
from streamconv.equalization.pairs import Rescaling, find_rescaling
from streamconv.equalization.scaling import Scaling
from streamconv.errors import AdapterError, OptionError, UnsupportedError
from streamconv.formats import FORMATS, dense_weight
from streamconv.formats.base import Encoder, Grouped, Weight
from streamconv.formats.linear import DEFAULT_IGNORE, is_conv1d, matches, module_of, select
from streamconv.planning.choices import Choices, Facts, choose
from streamconv.planning.devices import Device
from streamconv.planning.fingerprint import fingerprint
from streamconv.planning.memory import plan_memory
from streamconv.planning.plan import (
    Calibration,
    CalibrationPlan,
    Copy,
    Depth,
    Memory,
    MergeOptions,
    Plan,
    Rewrite,
    ShardPlan,
    Step,
    stores_the_same,
)
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Rounding
from streamconv.rounding.feedback import FeedbackOptions

DEFAULT_SHARD_BYTES = 5 * 10**9
MAX_SEQUENCE_LENGTH = 2048
# H of a layer has no use with fewer tokens than inputs: feedback then fits the text. Published trials found it to do
# worse than nearest rounding near one token an input.
TOKENS_AN_INPUT = 2
_UNSCALED: Mapping[str, Scaling] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Base:
    """A base checkpoint as the planner sees it. `quantized`: the one format its quantized weights have.

    `depth`: how its layers were repeated, in `weights` and in the config; `index.tensors` are as they are stored.
    """

    index: CheckpointIndex
    weights: Mapping[str, Weight]
    tie: Tie | None
    quantized: str | None
    depth: Depth | None = None


@dataclass(frozen=True, slots=True)
class Grounds:
    """What planning a calibration needs beside headers: the text, as in CalibrationPlan, the `weights` that can be
    calibrated, how many positions the model has (None: any number), its text part's model type and heads (None: not
    told), and the version of the library that computes it.
    """

    data: str
    name: str
    sha256: str
    is_data_set: bool
    weights: frozenset[str]
    positions: int | None
    transformers: str
    model_type: str = ""
    heads: Heads | None = None


@dataclass(frozen=True, slots=True)
class _Quantized:
    """Names of weights; what the config says of other modules; and the paths of those whose shape does not fit."""

    weights: frozenset[str]
    skipped: Sequence[str]
    unfit: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan but for what depends on the others of its run."""

    options: MergeOptions
    choices: Choices
    calibration: CalibrationPlan | None
    quantized: _Quantized
    shards: tuple[ShardPlan, ...]
    vocab_size: tuple[int, int] | None


def build_plan(
    base: Base,
    adapter: Adapter | None,
    options: MergeOptions,
    device: Device,
    scalings: Mapping[str, Scaling] = _UNSCALED,
) -> Plan:
    """Everything a run will do. Raises InputError, ResourceError where it could not succeed.

    `scalings`: by weight, what it is rescaled by, as another plan has it.
    """
    (plan,) = build_plans(base, adapter, [options], device, scalings=scalings)
    return plan


def build_plans(
    base: Base,
    adapter: Adapter | None,
    options: Sequence[MergeOptions],
    device: Device,
    grounds: Grounds | None = None,
    scalings: Mapping[str, Scaling] = _UNSCALED,
) -> tuple[Plan, ...]:
    """A plan for each of `options`, to be carried out in one pass: as it would be alone, but for the memory, which is
    that of the whole run in each. `grounds` are there if one of `options` has a calibration; `scalings` as for
    `build_plan`.

    Raises what `build_plan` does, and OptionError where two outputs would be the same.
    """
    drafts = [_draft(base, adapter, each, grounds, scalings) for each in options]
    _check_different(drafts)
    steps, *further = ([placed.step for shard in draft.shards for placed in shard.steps] for draft in drafts)
    shards = 1 if further else len(drafts[0].shards)  # of several outputs, one shard each is in work at once
    memory = plan_memory(steps, options[0], device, shards, further)
    return tuple(_plan(base, adapter, draft, device, memory) for draft in drafts)


def facts_of(base: Base, adapter: Adapter | None) -> Facts:
    return Facts(base.index.storage.location, base.quantized, adapter is not None)


def _draft(
    base: Base,
    adapter: Adapter | None,
    options: MergeOptions,
    grounds: Grounds | None,
    scalings: Mapping[str, Scaling],
) -> _Draft:
    replaces = {whole.parameter: whole for whole in (adapter.replaces if adapter else ())}
    updates = _updates_by_parameter(adapter)
    _check_unknown_tie(base, (*replaces, *updates))
    weights = _output_weights(base, adapter, replaces)
    options = _with_group_size(base, weights, replaces, options)
    choices = choose(facts_of(base, adapter), options)
    chosen = _choose_quantized(base, weights, replaces, choices, options)
    within = grounds.weights if grounds is not None and choices.feedback is not None else frozenset()
    rescaling = _rescaling(base, weights, chosen, options, grounds)
    if rescaling is not None:
        scalings = rescaling.scalings({name: weight.shape for name, weight in weights.items()})
    by_weight = _steps(base, weights, updates, chosen.weights, choices, within, scalings)
    calibration = None
    if options.calibration is not None and choices.quant is not None:
        assert grounds is not None
        calibration = _plan_calibration(by_weight, options, choices.feedback, rescaling, grounds)
    shards = _as_stored(base.index, lay_out(_split(base, by_weight, choices, options)))
    return _Draft(options, choices, calibration, chosen, shards, _new_vocabulary(base, weights))


def _plan(base: Base, adapter: Adapter | None, draft: _Draft, device: Device, memory: Memory) -> Plan:
    choices, options, shards = draft.choices, draft.options, draft.shards
    return Plan(
        options=options,
        device=device,
        shards=shards,
        memory=memory,
        quant=choices.quant.name if choices.quant else None,
        target=choices.target,
        rounding=choices.rounding_choice,
        calibration=draft.calibration,
        quantized=tuple(sorted(draft.quantized.weights)),
        skipped=tuple(draft.quantized.skipped),
        unfit=draft.quantized.unfit,
        group_size=choices.quant.group_size if isinstance(choices.quant, Grouped) else None,
        adapted=dict(adapter.modules) if adapter else {},
        replaced=tuple(sorted(each.parameter for each in adapter.replaces)) if adapter else (),
        renamed=adapter.renamed if adapter else None,
        depth=base.depth,
        untied=bool(adapter and adapter.untie),
        dtype=_config_dtype(base, choices),
        vocab_size=draft.vocab_size,
        fingerprint=fingerprint(
            base.index, adapter, options, choices.rounding_choice, draft.calibration, device, shards
        ),
    )


def _check_different(drafts: Sequence[_Draft]) -> None:
    """Raise OptionError if two outputs would hold the same tensors in the same files."""
    seen: dict[tuple[str | None, tuple[bytes, ...]], str] = {}
    for draft in drafts:
        format_name = draft.choices.quant.name if draft.choices.quant else None
        content = format_name, tuple(shard.header for shard in draft.shards)
        if content in seen:
            raise OptionError(
                f"--also {draft.options.quant} would give the same files as {seen[content]}; leave one of them out"
            )
        seen[content] = draft.options.quant


# -- weights -----------------------------------------------------------------------------------------------------


def _output_weights(
    base: Base, adapter: Adapter | None, replaces: Mapping[str, Replace]
) -> dict[str, Weight]:
    """Output name -> the weight it is made from, in the base's order; an untied head comes last."""
    weights = dict(base.weights)
    if adapter is not None and adapter.untie:
        assert base.tie is not None
        # A head that is stored though the config ties it counts: transformers 5 uses it where the two differ.
        weights.setdefault(base.tie.head, base.weights[base.tie.embedding])
    for name, whole in replaces.items():
        weights[name] = dense_weight(name, whole.tensor)
    return weights


def _new_vocabulary(base: Base, weights: Mapping[str, Weight]) -> tuple[int, int] | None:
    """Rows of the embedding before and after, if the adapter brought other tokens; None if it did not.

    Raises AdapterError where a weight changes its shape and the config could not follow.
    """
    embedding = find_embedding(base.weights)
    heads = [name for name in HEADS if name in weights] if embedding else []
    for name, weight in weights.items():
        shape = base.weights[name].shape if name in base.weights else weight.shape
        if weight.shape != shape and name not in (embedding, *heads):
            raise AdapterError(
                f"{name} has shape {list(weight.shape)} in the adapter and {list(shape)} in the base; only a "
                "vocabulary can be resized: give the base that the adapter was trained on"
            )
    if embedding is None:
        return None
    old, new = base.weights[embedding].shape[0], weights[embedding].shape[0]
    for head in heads:
        rows, rows_before = weights[head].shape[0], base.weights.get(head, base.weights[embedding]).shape[0]
        if rows - rows_before != new - old:
            raise AdapterError(
                f"{embedding} would have {new} rows and {head} {rows}: the vocabulary was resized in training, but "
                "the adapter holds only one of them; save both with modules_to_save"
            )
    return (old, new) if new != old else None


def _updates_by_parameter(adapter: Adapter | None) -> dict[str, tuple[Update, ...]]:
    updates: dict[str, tuple[Update, ...]] = {}
    for update in adapter.updates if adapter else ():
        updates[update.parameter] = (*updates.get(update.parameter, ()), update)
    return updates


def _choose_quantized(
    base: Base,
    weights: Mapping[str, Weight],
    replaces: Mapping[str, Replace],
    choices: Choices,
    options: MergeOptions,
) -> _Quantized:
    """Weights the output stores quantized, and the linear modules it leaves in 16 bit: one decision."""
    _check_ignore(options.ignore, weights)
    if choices.quant is None:
        return _Quantized(frozenset(), (), ())
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
    return _Quantized(frozenset(selection.quantized), selection.skipped, left)


def _left_out(
    base: Base, replaces: Mapping[str, Replace], options: MergeOptions
) -> tuple[Sequence[str], frozenset[str]]:
    """Patterns of modules that stay in 16 bit, and paths of such."""
    whole = {module_of(name) for name in replaces}  # exactly these, no pattern
    if not base.quantized:
        return (*options.ignore, *DEFAULT_IGNORE), frozenset(whole)
    # What it leaves in 16 bit stays so, what it quantizes does too.
    modules = {name: module_of(name) for name in base.weights}
    packed = {modules[name] for name, weight in base.weights.items() if weight.format == base.quantized}
    return options.ignore, frozenset(whole | set(modules.values()) - packed)  # its bias is not packed


def _with_group_size(
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
        try:
            found = any(matches(module, (pattern,)) for module in modules)
        except re.error as error:
            raise OptionError(f"--ignore {pattern} is not a regular expression: {error}") from error
        if not found:
            raise OptionError(
                f"--ignore {pattern} matches no module of the base; give part of a module path, such as "
                "mlp.up_proj, or re: and a regular expression matched from the start of the path"
            )


def _steps(
    base: Base,
    weights: Mapping[str, Weight],
    updates: Mapping[str, tuple[Update, ...]],
    quantized: frozenset[str],
    choices: Choices,
    within: frozenset[str],
    scalings: Mapping[str, Scaling],
) -> list[list[Step]]:
    """What becomes of each weight, in the base's order: one step, or a copy of every part.

    `within` are weights that can be calibrated, `scalings` what weights are rescaled by.
    """
    seen_by_training = _rounded_in_training(base, choices)
    steps: list[list[Step]] = []
    for name, weight in weights.items():
        encoder = _encoder(name, weight, name in quantized, _own_dtype(base, name, weight), choices)
        merge_base = None
        # What the adapter holds whole was trained in full precision.
        is_rounded = name in seen_by_training and weight is base.weights[name]
        if is_rounded and choices.merge_base is not None:
            merge_base = choices.merge_base.encoder(name, weight.shape, weight.dtype)
        found = _weight_steps(
            name,
            weight,
            updates.get(name, ()),
            encoder,
            merge_base,
            choices.rest,
            name in within,
            scalings.get(name),
        )
        constants = [step.encoder.constants for step in found if isinstance(step, Rewrite)]
        steps.append([*found, *(constant for each in constants for constant in each)])
    return steps


def _own_dtype(base: Base, name: str, weight: Weight) -> Dtype:
    """The output's type where none is asked for: the base's, also for what the adapter holds whole."""
    original = base.weights.get(name)
    if original is None and base.tie is not None and name == base.tie.head:
        original = base.weights[base.tie.embedding]
    return original.dtype if original is not None and original.dtype.name in DENSE else weight.dtype


def _weight_steps(
    name: str,
    weight: Weight,
    updates: tuple[Update, ...],
    encoder: Encoder | None,
    merge_base: Encoder | None,
    rounding: Rounding | None,
    calibrates: bool,
    scaling: Scaling | None = None,
) -> list[Step]:
    if scaling is not None and encoder is None:
        raise UnsupportedError(
            f"{name} is {weight.dtype}, which cannot be rescaled; leave --rescale out, or give a base in 16 bit"
        )
    changes = bool(updates) or merge_base is not None or scaling is not None
    if encoder is None or (not changes and (encoder.format, encoder.dtype) == (weight.format, weight.dtype)):
        # Only a weight of one part is ever stored under another name than the base's.
        is_dense = len(weight.parts) == 1
        return [Copy(name if is_dense else part.name, part) for part in weight.parts.values()]
    if weight.decoder.grid is not None and any(isinstance(update, WholeUpdate) for update in updates):
        raise UnsupportedError(
            f"{name} is {weight.format}, and the adapter was trained on what its initialisation had left of the weight "
            "before that was quantized; give the 16-bit base model instead"
        )
    if merge_base is not None and any(update.reduces for update in updates):
        raise UnsupportedError(
            f"{name}: this update needs a pass over the whole weight, and so does --merge-base {merge_base.format}; "
            "merge onto the original base"
        )
    if not updates and scaling is None and merge_base is not None and merge_base.format == encoder.format:
        # Rounding the original gives just what training saw; rounding that once more would move its scales.
        return [Rewrite(name, weight, (), encoder, ROUNDINGS["nearest"])]
    if encoder.grid is None:
        return [Rewrite(name, weight, updates, encoder, merge_base=merge_base, scaling=scaling)]
    assert rounding is not None
    base_grid = merge_base.grid if merge_base else weight.decoder.grid
    is_on_grid = base_grid == encoder.grid and scaling is None
    keeps = is_on_grid and (rounding.keeps_scales or not updates)
    if rounding.searches_scales and encoder.nested and any(update.reduces for update in updates):
        raise UnsupportedError(
            f"{name}: this update needs a pass over the whole weight, and so does --rounding {rounding.name} with "
            f"double-quantized scales; choose another --rounding, or a --quant other than {encoder.format}"
        )
    keeps_parts = keeps and merge_base is None and stores_the_same(weight, encoder)
    calibrates &= bool(updates) or not is_on_grid  # else the codes stay
    return [
        Rewrite(name, weight, updates, encoder, rounding, merge_base, keeps, keeps_parts, calibrates, scaling)
    ]


def _encoder(name: str, weight: Weight, quantize: bool, own_dtype: Dtype, choices: Choices) -> Encoder | None:
    """How the output stores a weight; None for what can only be copied."""
    if not weight.dtype.is_float:
        return None
    dtype = choices.dtype or own_dtype
    if quantize:
        assert choices.quant is not None
        return choices.quant.encoder(name, weight.shape, dtype)
    if weight.dtype.name not in DENSE:
        if choices.dtype is not None:
            raise UnsupportedError(
                f"{name} is {weight.dtype}, which --dtype {choices.dtype.name} cannot convert"
            )
        return None
    return FORMATS[dtype.name].encoder(name, weight.shape, dtype)


def _rounded_in_training(base: Base, choices: Choices) -> frozenset[str]:
    """Weights that bitsandbytes would have replaced when the model was loaded for QLoRA."""
    if choices.merge_base is None:
        return frozenset()
    shapes = {name: weight.shape for name, weight in base.weights.items()}
    return frozenset(select(shapes, base.index.config, DEFAULT_IGNORE).quantized)


# -- calibration -------------------------------------------------------------------------------------------------


def _rescaling(
    base: Base,
    weights: Mapping[str, Weight],
    chosen: _Quantized,
    options: MergeOptions,
    grounds: Grounds | None,
) -> Rescaling | None:
    """Which weights are rescaled together; None where that is not asked for. Raises UnsupportedError."""
    asked = options.calibration
    if asked is None or asked.rescale == "none":
        return None
    assert grounds is not None
    return find_rescaling(
        asked.rescale,
        base.index.storage.location,
        grounds.model_type,
        grounds.heads,
        {name: weight.shape for name, weight in weights.items()},
        grounds.weights,
        chosen.weights,
    )


def _plan_calibration(
    by_weight: Sequence[Sequence[Step]],
    options: MergeOptions,
    feedback: FeedbackOptions | None,
    rescaling: Rescaling | None,
    grounds: Grounds,
) -> CalibrationPlan:
    """Raises OptionError for a text or sequences of a length that would not do, and where nothing is calibrated."""
    asked = options.calibration
    assert asked is not None
    length = _sequence_length(asked, grounds)
    tokens = asked.tokens // length * length
    steps = [step for each in by_weight for step in each if isinstance(step, Rewrite) and step.calibrated]
    if feedback is not None:
        _check_calibrated(steps, asked, tokens, length)
    threads = asked.threads or len(os.sched_getaffinity(0))
    has_gradients = feedback is not None and not feedback.searches
    return CalibrationPlan(
        data=grounds.data,
        name=grounds.name,
        sha256=grounds.sha256,
        is_data_set=grounds.is_data_set,
        tokens=tokens,
        sequence_length=length,
        options=feedback,
        threads=threads,
        transformers=grounds.transformers,
        gradient_tokens=min(tokens, -(-asked.gradient_tokens // length) * length) if has_gradients else 0,
        rescaling=rescaling,
    )


def _check_calibrated(steps: Sequence[Rewrite], asked: Calibration, tokens: int, length: int) -> None:
    """Raise OptionError where so many `tokens` are too few for `steps`, or there is nothing to be calibrated."""
    if not steps:
        raise OptionError(
            "calibration text would change nothing: every weight in the decoder layers keeps its codes; leave "
            "--calibration out"
        )
    widest = max(steps, key=lambda step: step.columns)
    least = -(-TOKENS_AN_INPUT * widest.columns // length) * length
    if tokens < least:
        raise OptionError(
            f"--calibration-tokens {asked.tokens} is too few: {widest.name} has {widest.columns} inputs, and with less "
            f"than {TOKENS_AN_INPUT} tokens for each, feedback does worse than nearest rounding; give {least} or more"
        )
    _check_rank(steps, asked.residual_rank)


def _check_rank(steps: Sequence[Rewrite], rank: int) -> None:
    """Raise OptionError for a residual adapter with more to it than the weights it repairs."""
    narrowest = min(steps, key=lambda step: min(step.rows, step.columns))
    most = min(narrowest.rows, narrowest.columns)
    if rank >= most:
        raise OptionError(
            f"--residual-rank {rank} is too high: {narrowest.name} is {narrowest.rows} x {narrowest.columns}, and "
            f"a rank of {most} repairs all of it; give less, such as 16"
        )


def _sequence_length(asked: Calibration, grounds: Grounds) -> int:
    positions = grounds.positions or MAX_SEQUENCE_LENGTH
    if asked.sequence_length is None:
        return min(MAX_SEQUENCE_LENGTH, positions)
    if grounds.positions is not None and asked.sequence_length > grounds.positions:
        raise OptionError(
            f"--calibration-sequence-length {asked.sequence_length} is more than the {grounds.positions} positions of "
            "the model; give that or less"
        )
    return asked.sequence_length


# -- shards ------------------------------------------------------------------------------------------------------


def _split(
    base: Base, by_weight: Sequence[Sequence[Step]], choices: Choices, options: MergeOptions
) -> list[list[Step]]:
    """Steps by shard: the base's own shards where the output stores the same tensors, else filled up to a limit."""
    is_recoded = choices.quant is not None or base.quantized is not None
    if options.max_shard_bytes is not None or is_recoded or base.depth is not None:
        return split_by_size(by_weight, options.max_shard_bytes or DEFAULT_SHARD_BYTES)
    shard_of = {name: tensor.file.name for name, tensor in base.index.tensors.items()}
    shards: dict[str, list[Step]] = {shard.file.name: [] for shard in base.index.shards}
    last = base.index.shards[-1].file.name
    for step in (step for steps in by_weight for step in steps):
        shards[shard_of.get(step.name, last)].append(step)
    return [steps for steps in shards.values() if steps]


def _as_stored(index: CheckpointIndex, shards: Sequence[ShardPlan]) -> tuple[ShardPlan, ...]:
    """`shards`, those that hold just what a file of the base holds laid out as it is there, header and all.

    Such a shard can share the file's blocks on disk, and on the Hub, which knows files by their hash.
    """
    stored = {shard.file: shard for shard in index.shards}
    names = {file: set[str]() for file in stored}
    for tensor in index.tensors.values():
        names[tensor.file].add(tensor.name)

    def as_stored(shard: ShardPlan) -> ShardPlan:
        copies = [placed.step for placed in shard.steps if isinstance(placed.step, Copy)]
        files = {copy.tensor.file for copy in copies}
        is_renamed = any(copy.name != copy.tensor.name for copy in copies)
        if is_renamed or len(copies) < len(shard.steps) or len(files) != 1:
            return shard
        (file,) = files
        if {copy.name for copy in copies} != names[file]:
            return shard
        copies.sort(key=lambda copy: copy.tensor.offset)
        steps: tuple[Placed[Step], ...] = tuple(
            Placed(copy, copy.tensor.offset, copy.tensor.nbytes) for copy in copies
        )
        return replace(shard, header=stored[file].header, size=file.size, steps=steps, same_as=file)

    return tuple(as_stored(shard) for shard in shards)


def _config_dtype(base: Base, choices: Choices) -> str | None:
    """What config.json should call the dtype; None leaves it as it is."""
    del base
    return choices.dtype.name if choices.dtype else None


def read_base(index: CheckpointIndex, weights: Sequence[Weight]) -> Base:
    """The base of a plan.

    Raises UnsupportedError where its quantized weights are of more than one format, or transposed.
    """
    formats = sorted({weight.format for weight in weights if weight.decoder.grid is not None})
    if len(formats) > 1:
        raise UnsupportedError(
            f"{index.storage.location}: its weights are quantized in several formats ({', '.join(formats)}); "
            "only checkpoints with one are read"
        )
    for weight in weights:
        if weight.decoder.grid is not None and is_conv1d(module_of(weight.name), index.config):
            raise UnsupportedError(
                f"{index.storage.location}: {weight.name} is a Conv1D, which bitsandbytes stores transposed once it is "
                "quantized; this is not supported yet, give the 16-bit base model instead"
            )
    by_name = {weight.name: weight for weight in weights}
    return Base(index, by_name, find_tie(by_name, index.config), formats[0] if formats else None)


def _check_unknown_tie(base: Base, touched: Iterable[str]) -> None:
    """Raise UnsupportedError where the adapter changes what may be tied, and what is tied to what is not known."""
    if find_embedding(base.weights) is not None or True not in _declared_ties(base.index.config):
        return
    sizes = {level.get("vocab_size") for level in _levels(base.index.config)}
    for name in touched:
        weight = base.weights.get(name)
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] in sizes:
            raise UnsupportedError(
                f"the adapter changes {name}, and the base ties its embeddings, but which tensors it ties is not known "
                f"for the model type {base.index.config.get('model_type')!r}; merge it with PEFT's merge_and_unload"
            )


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def _declared_ties(config: Mapping[str, Any]) -> list[Any]:
    return [level.get("tie_word_embeddings") for level in _levels(config)]


def find_tie(weights: Mapping[str, Weight], config: Mapping[str, Any]) -> Tie | None:
    """Embedding and head that share one tensor, or None.

    They do where the config says so, and where a language model's head is not stored at all: saving leaves
    out what loading ties again, and the key is absent where it has the model's default.
    """
    embedding = find_embedding(weights)
    head = next((name for name in HEADS if name in weights), None)
    declared = _declared_ties(config)
    if embedding is None or False in declared:
        return None
    architectures = [str(name) for name in config.get("architectures") or ()]
    has_head = any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures
    )
    if head is None and has_head:
        return Tie(embedding, "lm_head.weight")
    return Tie(embedding, head) if head is not None and True in declared else None
