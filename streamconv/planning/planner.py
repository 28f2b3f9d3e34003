"""Make a Plan of options, headers and configs, without reading a weight, and refuse all that can be refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from streamconv.adapters.base import Adapter, Replace, Update
from streamconv.adapters.embeddings import HEADS, find_embedding
from streamconv.checkpoint.container import Container, Gguf, Safetensors
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import AdapterError, OptionError
from streamconv.formats import container_of, dense_weight, stored_as
from streamconv.formats.base import Grouped, Weight
from streamconv.formats.gguf_blocks import Typed
from streamconv.formats.linear import module_of
from streamconv.formats.mixed import weights_by_format
from streamconv.formats.stacks import ExpertStacker
from streamconv.gguf.model import GgufModel
from streamconv.gguf.pieces import GgufPiece
from streamconv.planning.base import Base
from streamconv.planning.calibration import (
    CalibrationFacts,
    check_measured,
    plan_calibration,
    plan_equalization,
)
from streamconv.planning.choices import Choices, Facts, choose
from streamconv.planning.devices import Device
from streamconv.planning.experts import notes_on_experts
from streamconv.planning.fingerprint import fingerprint
from streamconv.planning.gguf import by_tensor, is_gguf, plan_model, zeros
from streamconv.planning.gguf_keep import as_stored, file_format, kept_set, kept_steps, stored_container
from streamconv.planning.gguf_pieces import taken_apart
from streamconv.planning.keeping import kept_encoders
from streamconv.planning.memory import plan_memory
from streamconv.planning.options import MergeOptions
from streamconv.planning.passing import check_passes, keeps_quantization, notes_on_passed
from streamconv.planning.plan import CalibrationPlan, Memory, Plan, ShardPlan, Step
from streamconv.planning.quantized import QuantizedSet, choose_quantized, with_group_size
from streamconv.planning.shards import as_stored_shards, metadata_of, split_steps
from streamconv.planning.stacking import stacked_steps
from streamconv.planning.steps import plan_steps
from streamconv.planning.ties import check_unknown_tie
from streamconv.planning.unmerged import notes_on_factors

_NOT_EQUALIZED: Mapping[str, Equalizer] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan but for what depends on the others of its run."""

    options: MergeOptions
    choices: Choices
    calibration: CalibrationPlan | None
    quantized: QuantizedSet
    shards: tuple[ShardPlan, ...]
    vocab_size: tuple[int, int] | None
    names: tuple[str, ...]
    container: Container
    notes: tuple[str, ...] = ()


def build_plan(
    base: Base,
    adapter: Adapter | None,
    options: MergeOptions,
    device: Device,
    equalizers: Mapping[str, Equalizer] = _NOT_EQUALIZED,
) -> Plan:
    """Everything a run will do. Raises InputError, ResourceError where it could not succeed.

    `equalizers`: by weight, what it is equalized by, as another plan has it.
    """
    (plan,) = build_plans(base, adapter, [options], device, equalizers=equalizers)
    return plan


def build_plans(
    base: Base,
    adapter: Adapter | None,
    options: Sequence[MergeOptions],
    device: Device,
    facts: CalibrationFacts | None = None,
    equalizers: Mapping[str, Equalizer] = _NOT_EQUALIZED,
) -> tuple[Plan, ...]:
    """A plan for each of `options`, to be carried out in one pass: as it would be alone, but for the memory, which is
    that of the whole run in each. `facts` are there if one of `options` has a calibration; `equalizers` as for
    `build_plan`.

    Raises what `build_plan` does, and OptionError where two outputs would be the same.
    """
    drafts = [_draft(base, adapter, each, facts, equalizers) for each in options]
    _check_different(drafts)
    steps, *further = ([placed.step for shard in draft.shards for placed in shard.steps] for draft in drafts)
    shards = 1 if further else len(drafts[0].shards)  # of several outputs, one shard each is in work at once
    memory = plan_memory(steps, options[0], device, shards, further)
    return tuple(_plan(base, adapter, draft, device, memory) for draft in drafts)


def facts_of(base: Base, adapter: Adapter | None) -> Facts:
    kept = frozenset(weight.format for weight in base.weights.values() if weight.keep is not None)
    return Facts(
        base.index.storage.location,
        base.quantized,
        adapter is not None,
        base.formats,
        kept,
        bool(base.undecoded),
        file_format(base),
    )


def _draft(
    base: Base,
    adapter: Adapter | None,
    options: MergeOptions,
    facts: CalibrationFacts | None,
    equalizers: Mapping[str, Equalizer],
) -> _Draft:
    replaces = {whole.parameter: whole for whole in (adapter.replaces if adapter else ())}
    updates = _updates_by_parameter(adapter)
    check_unknown_tie(base.weights, base.index.config, (*replaces, *updates))
    weights = _output_weights(base, adapter, replaces)
    if adapter is not None and adapter.head is not None and options.calibration is not None:
        raise OptionError(
            f"--calibration runs a language model, and the adapter makes a {adapter.head.architecture} of the base;"
            " leave it out"
        )
    options = with_group_size(base, weights, replaces, options)
    choices = choose(facts_of(base, adapter), options)
    kept = kept_encoders(base, weights, options)
    check_passes(base, weights, {*updates} - {*kept}, adapter, choices)
    pieces: Mapping[str, GgufPiece] = {}
    shapes = {name: weight.shape for name, weight in weights.items()}
    in_output: Mapping[str, Weight] = weights
    family = base.index.config.get("model_type")
    if choices.keeps_file:
        shapes = taken_apart(weights, {}, family).shapes
    elif is_gguf(choices.quant):
        apart = taken_apart(weights, updates, family, in_blocks=isinstance(choices.quant, Typed))
        in_output, updates, pieces, shapes = apart.weights, dict(apart.updates), apart.pieces, apart.shapes
    model = plan_model(base, shapes, choices)
    if choices.keeps_file:
        chosen = kept_set(base)
    else:
        chosen = choose_quantized(base, weights, replaces, choices, options, kept, model, pieces)
    within = facts.weights if facts is not None and choices.feedback is not None else frozenset()
    equalization = plan_equalization(base, weights, chosen, options, facts)
    if equalization is not None:
        equalizers = equalization.equalizers({name: weight.shape for name, weight in weights.items()})
    if choices.keeps_file:
        by_weight = kept_steps(base, weights, updates, choices, within, equalizers)
    else:
        by_weight = plan_steps(base, in_output, updates, chosen, choices, within, equalizers, model, pieces)
    calibration = None
    if options.calibration is not None and choices.quant is not None:
        assert facts is not None
        calibration = plan_calibration(by_weight, options, choices.feedback, equalization, facts)
    else:
        check_measured(by_weight, None)
    if isinstance(choices.quant, ExpertStacker):
        by_weight = stacked_steps(dict(zip(in_output, by_weight, strict=True)))
    of_head = adapter.head.parameters if adapter is not None and adapter.head is not None else ()
    vocabulary = _new_vocabulary(base, weights, of_head)
    container, shards = _files(base, by_weight, choices, options, model, stays=choices.passes or bool(kept))
    notes = model.notes if model else ()
    return _Draft(options, choices, calibration, chosen, shards, vocabulary, tuple(weights), container, notes)


def _files(
    base: Base,
    by_weight: list[list[Step]],
    choices: Choices,
    options: MergeOptions,
    model: GgufModel | None,
    *,
    stays: bool,
) -> tuple[Container, tuple[ShardPlan, ...]]:
    """Container of an output, and its files. `stays`: whether quantized weights are stored as the base has them."""
    if choices.keeps_file and choices.quant is not None:
        stored = stored_container(base, choices.quant)
        return stored, as_stored(base, stored.lay_out(by_weight, zeros))
    container = container_of(choices.quant)
    if model is not None:
        by_weight = by_tensor(by_weight, model)
    if model is not None and isinstance(container, Gguf):
        container = container.with_pairs(model.pairs)
    steps = split_steps(base, by_weight, choices, options, keeps_files=stays)
    files = Safetensors(metadata=metadata_of(base.index, steps)) if stays else container
    shards = files.lay_out(steps, zeros)
    return container, shards if model is not None else as_stored_shards(base.index, shards)


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
        formats=_mixture(draft.quantized),
        skipped=tuple(draft.quantized.skipped),
        unfit=draft.quantized.unfit,
        group_size=choices.quant.group_size if isinstance(choices.quant, Grouped) else None,
        method=adapter.label if adapter else None,
        adapted=dict(adapter.modules) if adapter else {},
        replaced=tuple(sorted(each.parameter for each in adapter.replaces)) if adapter else (),
        renamed=adapter.renamed if adapter else None,
        depth=base.depth,
        untied=bool(adapter and adapter.untie),
        head=adapter.head if adapter else None,
        dtype=_config_dtype(base, choices),
        vocab_size=draft.vocab_size,
        fingerprint=fingerprint(
            base.index, adapter, options, choices.rounding_choice, draft.calibration, device, shards
        ),
        notes=(
            *notes_on_factors(base.index),
            *notes_on_experts(choices.quant, base.index.config, draft.names, draft.quantized.weights),
            *(adapter.notes if adapter else ()),
            *notes_on_passed(base, choices, shards),
            *draft.notes,
        ),
        keeps_quantization=keeps_quantization(base, adapter, choices, options, shards),
        members=adapter.members if adapter else (),
        container=draft.container,
    )


def _mixture(chosen: QuantizedSet) -> Mapping[str, tuple[str, ...]]:
    """Weights by format, where they have several; of those that stay as they are, by what their encoders call it."""
    found = {
        stored_as(storage_format): tuple(names) for storage_format, names in weights_by_format(chosen.formats)
    }
    kept = defaultdict[str, list[str]](list)
    for name in sorted(chosen.kept):
        kept[chosen.kept[name].format].append(name)
    found |= {form: tuple(names) for form, names in kept.items()}
    return found if len(found) > 1 else {}


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


def _output_weights(
    base: Base, adapter: Adapter | None, replaces: Mapping[str, Replace]
) -> dict[str, Weight]:
    """Output name -> the weight it is made from, in the base's order; an untied head comes last."""
    weights = dict(base.weights)
    if adapter is not None and adapter.untie:
        assert base.tie is not None
        # A head that is stored though the config ties it counts: transformers 5 uses it where the two differ.
        weights.setdefault(base.tie.head, base.weights[base.tie.embedding])
        # Untied by its config, BERT's head no longer has the bias that is stored one level up, either.
        module, _, last = module_of(base.tie.head).rpartition(".")
        if last == "decoder" and f"{module}.bias" in base.weights:
            weights.setdefault(f"{module}.{last}.bias", base.weights[f"{module}.bias"])
    for name in adapter.head.left_out if adapter is not None and adapter.head is not None else ():
        del weights[name]
    known = {*weights, *(adapter.head.parameters if adapter is not None and adapter.head is not None else ())}
    for name, whole in replaces.items():
        _check_known(name, known, adapter)
        weights[name] = dense_weight(name, whole.tensor)
    for update in adapter.updates if adapter is not None else ():
        _check_known(update.parameter, weights, adapter)
    return weights


def _check_known(name: str, known: Collection[str], adapter: Adapter | None) -> None:
    """Raise AdapterError for a parameter that no class of the output has: beside the base's it would lie unused."""
    if name not in known:
        raise AdapterError(
            f"{adapter.location if adapter else ''}: the adapter changes {name}, which the base does not store, nor"
            " does a head that it brings; give the base that the adapter was trained on"
        )


def _new_vocabulary(
    base: Base, weights: Mapping[str, Weight], of_head: Collection[str]
) -> tuple[int, int] | None:
    """Rows of the embedding before and after, if the adapter brought other tokens; None if it did not.

    `of_head` are parameters whose rows are labels.

    Raises AdapterError where a weight changes its shape and the config could not follow.
    """
    embedding = find_embedding(base.weights)
    tied = () if base.tie is None else (base.tie.head,)
    heads = [name for name in {*HEADS, *tied} if name in weights] if embedding else []
    for name, weight in weights.items():
        shape = base.weights[name].shape if name in base.weights else weight.shape
        if weight.shape != shape and name not in (embedding, *heads, *of_head):
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


def _config_dtype(base: Base, choices: Choices) -> str | None:
    """Name that config.json should give the dtype; None leaves it as it is."""
    del base
    return choices.dtype.name if choices.dtype else None
