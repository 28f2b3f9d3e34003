"""From options, headers and configs to a Plan. Pure: reads no weights, and refuses all that can be refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.adapters.base import Adapter, Replace, Tie, Update, WholeUpdate
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.devices import Device
from streamconv.dtypes import DENSE, Dtype
from streamconv.errors import AdapterError, OptionError, UnsupportedError
from streamconv.fingerprint import fingerprint
from streamconv.formats import FORMATS, dense_weight
from streamconv.formats.base import Encoder, Format, Weight
from streamconv.formats.linear import DEFAULT_IGNORE, is_conv1d, matches, module_of, select
from streamconv.layout import Placed, lay_out, split_by_size
from streamconv.memory import plan_memory
from streamconv.plan import Choice, Copy, Depth, Memory, MergeOptions, Plan, Rewrite, ShardPlan, Step
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Rounding

DEFAULT_SHARD_BYTES = 5 * 10**9


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
class _Result:
    """What the options came to: the output's formats, and where targets and codes come from."""

    quant: Format | None
    dtype: Dtype | None
    merge_base: Format | None
    target: Choice
    rounding: Rounding | None
    rounding_choice: Choice | None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan but for what depends on the others of its run."""

    options: MergeOptions
    result: _Result
    quantized: frozenset[str]
    skipped: Sequence[str]
    shards: tuple[ShardPlan, ...]
    vocab_size: tuple[int, int] | None


def build_plan(base: Base, adapter: Adapter | None, options: MergeOptions, device: Device) -> Plan:
    """Everything a run will do. Raises InputError, ResourceError where it could not succeed."""
    (plan,) = build_plans(base, adapter, [options], device)
    return plan


def build_plans(
    base: Base, adapter: Adapter | None, options: Sequence[MergeOptions], device: Device
) -> tuple[Plan, ...]:
    """A plan for each of `options`, to be carried out in one pass: as it would be alone, but for the memory, which is
    that of the whole run in each.

    Raises what `build_plan` does, and OptionError where two outputs would be the same.
    """
    drafts = [_draft(base, adapter, each) for each in options]
    _check_different(drafts)
    steps, *further = ([placed.step for shard in draft.shards for placed in shard.steps] for draft in drafts)
    shards = 1 if further else len(drafts[0].shards)  # of several outputs, one shard each is in work at once
    memory = plan_memory(steps, options[0], device, shards, further)
    return tuple(_plan(base, adapter, draft, device, memory) for draft in drafts)


def options_alone(base: Base, options: MergeOptions, quants: Sequence[str]) -> list[MergeOptions]:
    """The options with which a run alone makes each output of a run for all `quants`.

    A rounding is for those that are quantized; where none is, all keep it, to be refused.
    """
    each = [replace(options, quant=quant) for quant in quants]
    quantized = [_resolve_quant(base, alone)[0] is not None for alone in each]
    if not any(quantized):
        return each
    return [
        alone if rounds else replace(alone, rounding="auto")
        for alone, rounds in zip(each, quantized, strict=True)
    ]


def _draft(base: Base, adapter: Adapter | None, options: MergeOptions) -> _Draft:
    result = _resolve(base, adapter, options)
    replaces = {whole.parameter: whole for whole in (adapter.replaces if adapter else ())}
    updates = _updates_by_parameter(adapter)
    _check_unknown_tie(base, (*replaces, *updates))
    weights = _output_weights(base, adapter, replaces)
    quantized, skipped = _choose_quantized(base, weights, replaces, result, options)
    by_weight = _steps(base, weights, updates, quantized, result)
    shards = _as_stored(base.index, lay_out(_split(base, by_weight, result, options)))
    return _Draft(options, result, quantized, skipped, shards, _new_vocabulary(base, weights))


def _plan(base: Base, adapter: Adapter | None, draft: _Draft, device: Device, memory: Memory) -> Plan:
    result, options, shards = draft.result, draft.options, draft.shards
    return Plan(
        options=options,
        device=device,
        shards=shards,
        memory=memory,
        quant=result.quant.name if result.quant else None,
        target=result.target,
        rounding=result.rounding_choice,
        quantized=tuple(sorted(draft.quantized)),
        skipped=tuple(draft.skipped),
        adapted=dict(adapter.modules) if adapter else {},
        replaced=tuple(sorted(each.parameter for each in adapter.replaces)) if adapter else (),
        renamed=adapter.renamed if adapter else None,
        depth=base.depth,
        untied=bool(adapter and adapter.untie),
        dtype=_config_dtype(base, result),
        vocab_size=draft.vocab_size,
        fingerprint=fingerprint(base.index, adapter, options, result.rounding_choice, device, shards),
    )


def _check_different(drafts: Sequence[_Draft]) -> None:
    """Raise OptionError if two outputs would hold the same tensors in the same files."""
    seen: dict[tuple[str | None, tuple[bytes, ...]], str] = {}
    for draft in drafts:
        format_name = draft.result.quant.name if draft.result.quant else None
        content = format_name, tuple(shard.header for shard in draft.shards)
        if content in seen:
            raise OptionError(
                f"--also {draft.options.quant} would give the same files as {seen[content]}; leave one of them out"
            )
        seen[content] = draft.options.quant


# -- options -----------------------------------------------------------------------------------------------------


def _resolve(base: Base, adapter: Adapter | None, options: MergeOptions) -> _Result:
    quant, dtype = _resolve_quant(base, options)
    merge_base, target = _resolve_target(base, adapter, options)
    rounding, choice = _resolve_rounding(base, adapter, options, quant, merge_base)
    return _Result(quant, dtype, merge_base, target, rounding, choice)


def _resolve_quant(base: Base, options: MergeOptions) -> tuple[Format | None, Dtype | None]:
    """The format of quantized weights (None: dense), and the dtype asked for (None: each weight's own)."""
    name, dtype_name = options.quant.lower(), options.dtype.lower()
    if name in DENSE:
        if dtype_name not in ("auto", name):
            raise OptionError(
                f"--quant {name} and --dtype {dtype_name} contradict each other; give one of them"
            )
        name, dtype_name = "none", name
    if dtype_name != "auto" and dtype_name not in DENSE:
        raise OptionError(f"--dtype {options.dtype} is not known; use auto, {', '.join(DENSE)}")
    dtype = None if dtype_name == "auto" else DENSE[dtype_name]
    if name == "keep":
        name = base.quantized or "none"
        if name != "none" and name not in FORMATS:
            raise UnsupportedError(
                f"{base.index.storage.location}: its weights are {name}, which is read but not written; choose "
                f"--quant none or one of {', '.join(FORMATS)}"
            )
    if name == "none":
        return None, dtype
    if name not in FORMATS:
        raise OptionError(
            f"--quant {options.quant} is not known; use keep, none, or one of {', '.join(FORMATS)}"
        )
    return FORMATS[name], dtype


def _resolve_target(
    base: Base, adapter: Adapter | None, options: MergeOptions
) -> tuple[Format | None, Choice]:
    name = options.merge_base.lower()
    if name in ("original", base.quantized):
        if base.quantized:
            return None, Choice(
                "T", f"the base is {base.quantized}, so the update is added to what it dequantizes to"
            )
        return None, Choice("F", "the update is added to the original 16-bit base")
    known = [name for name, fmt in FORMATS.items() if name not in DENSE]
    if name not in known:
        raise OptionError(
            f"--merge-base {options.merge_base} is not known; use original or one of {', '.join(known)}"
        )
    if base.quantized:
        raise OptionError(
            f"--merge-base {name} does not fit: the base is itself {base.quantized}, and its original weights are "
            "not in it; leave the option out, or give the 16-bit base"
        )
    if adapter is None:
        raise OptionError(
            f"--merge-base {name} says what an update is added to, but there is no adapter; leave it out"
        )
    return FORMATS[name], Choice(
        "T", f"the base is first rounded to {name}, as QLoRA training saw it, and the update is added to that"
    )


def _resolve_rounding(
    base: Base,
    adapter: Adapter | None,
    options: MergeOptions,
    quant: Format | None,
    merge_base: Format | None,
) -> tuple[Rounding | None, Choice | None]:
    name = options.rounding.lower()
    if name != "auto" and name not in ROUNDINGS:
        raise OptionError(
            f"--rounding {options.rounding} is not known; use auto or one of {', '.join(ROUNDINGS)}"
        )
    if quant is None:
        if name != "auto":
            raise OptionError(
                f"--rounding {name} chooses codes, but the output is not quantized; add --quant FORMAT"
            )
        return None, None
    if name != "auto":
        return ROUNDINGS[name], Choice(name, "asked for by name")
    source = merge_base or (FORMATS.get(base.quantized) if base.quantized else None)
    if source is None or source.grid != quant.grid:
        return ROUNDINGS["nearest"], Choice("nearest", f"the target does not lie on the {quant.name} grid")
    if adapter is None:
        return ROUNDINGS["nearest"], Choice(
            "nearest", "the base lies on that grid already, so its codes stay"
        )
    return ROUNDINGS["stochastic"], Choice(
        "stochastic",
        f"the target is the base's own {source.name} grid plus a small update, which nearest rounding would erase",
    )


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
    result: _Result,
    options: MergeOptions,
) -> tuple[frozenset[str], Sequence[str]]:
    """Weights the output stores quantized, and the linear modules it leaves in 16 bit: one decision."""
    _check_ignore(options.ignore, weights)
    if result.quant is None:
        return frozenset(), ()
    ignore, dense = list(options.ignore), {module_of(name) for name in replaces}  # exactly these, no pattern
    if base.quantized:  # what it leaves in 16 bit stays so, what it quantizes does too
        modules = {name: module_of(name) for name in base.weights}
        packed = {modules[name] for name, weight in base.weights.items() if weight.format == base.quantized}
        dense |= set(modules.values()) - packed  # a packed weight's bias is not packed
    else:
        ignore += DEFAULT_IGNORE
    shapes = {name: weight.shape for name, weight in weights.items()}
    selection = select(shapes, base.index.config, ignore, dense)
    if not selection.quantized:
        raise OptionError(
            f"--quant {result.quant.name} would quantize nothing: {base.index.storage.location} has no linear "
            "weights that a loader would quantize, or --ignore names them all; leave --quant out"
        )
    return frozenset(selection.quantized), selection.skipped


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
    result: _Result,
) -> list[list[Step]]:
    """What becomes of each weight, in the base's order: one step, or a copy of every part."""
    seen_by_training = _rounded_in_training(base, result)
    steps: list[list[Step]] = []
    for name, weight in weights.items():
        encoder = _encoder(name, weight, name in quantized, _own_dtype(base, name, weight), result)
        merge_base = None
        # What the adapter holds whole was trained in full precision.
        is_rounded = name in seen_by_training and weight is base.weights[name]
        if is_rounded and result.merge_base is not None:
            merge_base = result.merge_base.encoder(name, weight.shape, weight.dtype)
        found = _weight_steps(name, weight, updates.get(name, ()), encoder, merge_base, result)
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
    result: _Result,
) -> list[Step]:
    changes = bool(updates) or merge_base is not None
    if encoder is None or (not changes and (encoder.format, encoder.dtype) == (weight.format, weight.dtype)):
        main = weight.parts[weight.decoder.main].name
        # Only a weight of one part is ever stored under another name than the base's.
        return [Copy(name if part.name == main else part.name, part) for part in weight.parts.values()]
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
    if not updates and merge_base is not None and merge_base.format == encoder.format:
        # Rounding the original gives just what training saw; rounding that once more would move its scales.
        return [Rewrite(name, weight, (), encoder, ROUNDINGS["nearest"])]
    if encoder.grid is None:
        return [Rewrite(name, weight, updates, encoder, merge_base=merge_base)]
    assert result.rounding is not None
    base_grid = merge_base.grid if merge_base else weight.decoder.grid
    keeps = base_grid == encoder.grid and (result.rounding.keeps_scales or not updates)
    keeps_parts = keeps and merge_base is None and weight.format == encoder.format
    return [Rewrite(name, weight, updates, encoder, result.rounding, merge_base, keeps, keeps_parts)]


def _encoder(name: str, weight: Weight, quantize: bool, own_dtype: Dtype, result: _Result) -> Encoder | None:
    """How the output stores a weight; None for what can only be copied."""
    if not weight.dtype.is_float:
        return None
    dtype = result.dtype or own_dtype
    if quantize:
        assert result.quant is not None
        return result.quant.encoder(name, weight.shape, dtype)
    if weight.dtype.name not in DENSE:
        if result.dtype is not None:
            raise UnsupportedError(
                f"{name} is {weight.dtype}, which --dtype {result.dtype.name} cannot convert"
            )
        return None
    return FORMATS[dtype.name].encoder(name, weight.shape, dtype)


def _rounded_in_training(base: Base, result: _Result) -> frozenset[str]:
    """Weights that bitsandbytes would have replaced when the model was loaded for QLoRA."""
    if result.merge_base is None:
        return frozenset()
    shapes = {name: weight.shape for name, weight in base.weights.items()}
    return frozenset(select(shapes, base.index.config, DEFAULT_IGNORE).quantized)


# -- shards ------------------------------------------------------------------------------------------------------


def _split(
    base: Base, by_weight: Sequence[Sequence[Step]], result: _Result, options: MergeOptions
) -> list[list[Step]]:
    """Steps by shard: the base's own shards where the output stores the same tensors, else filled up to a limit."""
    is_recoded = result.quant is not None or base.quantized is not None
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


def _config_dtype(base: Base, result: _Result) -> str | None:
    """What config.json should call the dtype; None leaves it as it is."""
    del base
    return result.dtype.name if result.dtype else None


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
