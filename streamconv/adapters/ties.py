"""Embedding and head that share one tensor, and what becomes of them when an adapter changes one or both.

PEFT's live model is the measure: it keeps two tensors as soon as it wraps one side, though its own merge writes all
changes into the shared one. Two changes are of both sides: trained rows, which PEFT shares over a tie, and a LoRA on
the embedding with `ensure_weight_tying`, whose factors are saved a second time, transposed, as those of the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from streamconv.adapters.base import Replace, Update
from streamconv.adapters.embeddings import find_embedding
from streamconv.adapters.saved import Saved, are_equal
from streamconv.adapters.source import BaseParameters, Source
from streamconv.adapters.tokens import RowsUpdate
from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import BF16, F16
from streamconv.errors import AdapterError, UnsupportedError

# Heads over the vocabulary by the last of their names, and the architectures that have them.
_TIED = (
    "lm_head",
    "proj_out",
    "embed_out",
    "output_projection",
    "decoder",
    "vocab_projector",
    "generator_lm_head",
)
_LANGUAGE = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "MTModel"),
)


def refuse_unstored_head(source: Source, base: BaseParameters) -> None:
    """Raise UnsupportedError for a change of what the base does not store, as loading ties it to its embedding."""
    ties = [level.get("tie_word_embeddings") for level in language_levels(base.config)]
    architectures = base.config.get("architectures") or ()
    is_untied = False in ties and ties[0] is not True  # the whole model's own config decides
    if is_untied or not any(str(name).endswith(_LANGUAGE) for name in architectures):
        return
    shared = next((name for name in base.parameters if name.endswith("shared.weight")), None)
    unstored = _unstored(source, base, _TIED if shared is None else (*_TIED, "embed_tokens"))
    for name, tensor in unstored.items():
        partner = shared or find_embedding(base.parameters) or "the embedding"
        raise UnsupportedError(
            f"{tensor.name} is for {name}, which the base does not store: in a model of type"
            f" {base.config.get('model_type')!r} it is tied to {partner}, and a change of the one without the other is"
            " not handled; train without this module in target_modules and modules_to_save"
        )


def _unstored(source: Source, base: BaseParameters, names: Collection[str]) -> Mapping[str, StoredTensor]:
    """Weights of modules called one of `names` that the adapter has tensors for and the base has nothing of."""
    found: dict[str, StoredTensor] = {}
    for key, tensor in source.tensors.items():
        parts = key.split(".")
        for place in (place for place, part in enumerate(parts[:-1]) if part in names):
            found.setdefault(".".join(parts[: place + 1]), tensor)
    known = [name.split(".") for name in base.names()] if found else ()
    places = {".".join(parts[:end]) for parts in known for end in range(1, len(parts))}
    last = {parts[-2] for parts in known if len(parts) > 1 and parts[-1] == "weight"}
    return {
        f"{module}.weight": tensor
        for module, tensor in found.items()
        if module not in places and module.rpartition(".")[2] not in last
    }


@dataclass(frozen=True, slots=True)
class Settled:
    """Changes to carry out, now that the tie is settled; `untie`: embedding and head part ways."""

    updates: tuple[Update, ...]
    replaces: tuple[Replace, ...]
    untie: bool


def settle_tie(
    base: BaseParameters,
    source: Source,
    updates: tuple[Update, ...],
    saved: Saved,
    digests: Mapping[str, str],
) -> Settled:
    """Updates and replacements for a base that may tie embedding and head.

    A tied head that the base stores all the same is changed as well, or loaders would find two that differ. Raises
    AdapterError where ensure_weight_tying is set and the two are not one.
    """
    tie = base.tie
    if tie is None:
        return Settled(updates, saved.replaces, untie=False)
    pair = (tie.embedding, tie.head)
    replaces = {replace.parameter: replace for replace in saved.replaces}
    records = set(saved.records)
    stores_head = tie.head in base.parameters
    if not stores_head:
        records |= _follow_record(replaces, records, pair)
    others = tuple(update for update in updates if update.parameter not in pair)
    own = {side: [update for update in updates if update.parameter == side] for side in pair}
    head_is_saved = tie.head in replaces.keys() - records
    is_in_16_bit = _is_in_16_bit(base, source, tie.embedding)
    shared = _take_shared(own[tie.embedding], own[tie.head], head_is_saved, is_in_16_bit, source, digests)
    # PEFT wraps rows before LoRA, so a LoRA of the head is added to the new rows, too.
    both: dict[str, list[Update]] = {
        side: [*(dataclasses.replace(update, parameter=side) for update in shared.rows), *factors]
        for side, factors in zip(pair, (shared.embedding, shared.head), strict=True)
    }

    if own[tie.embedding] or own[tie.head] or _differ(replaces, records, pair, source, digests):
        kept = tuple(update for side in pair for update in (*both[side], *own[side]))
        return Settled((*others, *kept), tuple(replaces.values()), untie=True)
    if stores_head:
        return Settled(
            (*others, *both[tie.embedding], *both[tie.head]), tuple(replaces.values()), untie=False
        )
    replaces.pop(tie.head, None)
    return Settled((*others, *both[tie.embedding]), tuple(replaces.values()), untie=False)


def _follow_record(
    replaces: dict[str, Replace], records: Collection[str], pair: tuple[str, str]
) -> frozenset[str]:
    """Record for one side what the other was when training began, as the two were one; returns the side now known."""
    for one, other in (pair, pair[::-1]):
        if one in records and other not in replaces:
            replaces[other] = Replace(other, replaces[one].tensor)
            return frozenset({other})
    return frozenset()


def _differ(
    replaces: Mapping[str, Replace],
    records: Collection[str],
    pair: tuple[str, str],
    source: Source,
    digests: Mapping[str, str],
) -> bool:
    """Whether the replacements make the two sides differ."""
    embedding, head = (replaces.get(side) for side in pair)
    if embedding is not None and head is not None:
        return not are_equal(embedding.tensor, head.tensor, digests)
    if embedding is None and head is None:
        return False
    there = next(side for side in pair if side in replaces)
    missing = next(side for side in pair if side not in replaces)
    if source.config.flag("ensure_weight_tying") and there not in records:
        raise AdapterError(
            f"{source.config.name}: ensure_weight_tying is set and {there} is saved, but {missing} is not; the file"
            " is not complete"
        )
    return there not in records


@dataclass(frozen=True, slots=True)
class _Shared:
    """Changes of both sides: rows, the same for both, and LoRA, one for each, as their shapes are not the same."""

    rows: list[RowsUpdate]
    embedding: list[Update]
    head: list[Update]


def _take_shared(
    embedding: list[Update],
    head: list[Update],
    head_is_saved: bool,
    is_in_16_bit: bool,
    source: Source,
    digests: Mapping[str, str],
) -> _Shared:
    """Move what changes both sides alike out of the two lists."""
    shared = _Shared([], [], [])
    rows = {
        side: [u for u in updates if isinstance(u, RowsUpdate)]
        for side, updates in (("e", embedding), ("h", head))
    }
    if (
        rows["e"]
        and not head_is_saved
        and (not rows["h"] or _are_same_rows(rows["e"][0], rows["h"][0], digests))
    ):
        shared.rows.append(rows["e"][0])
        embedding.remove(rows["e"][0])
        for update in rows["h"]:
            head.remove(update)
    factors = [u for u in (*embedding, *head) if u.mirror]
    if source.config.flag("ensure_weight_tying") and len(factors) == 2:
        unequal = _unequal(factors[0], factors[1])
        if unequal is not None and is_in_16_bit:
            # PEFT casts factors on such a base to float32, each for itself: they part, and are trained so.
            return shared
        if unequal is not None:
            left, right = unequal
            raise AdapterError(
                f"ensure_weight_tying is set, so {right.name} must be {left.name} transposed, and it is not; if"
                " the head was trained by itself, set ensure_weight_tying to false"
            )
        shared.embedding.append(factors[0])
        shared.head.append(factors[1])
        embedding.remove(factors[0])
        head.remove(factors[1])
    return shared


def _are_same_rows(one: RowsUpdate, other: RowsUpdate, digests: Mapping[str, str]) -> bool:
    return one.places == other.places and are_equal(one.parts["rows"], other.parts["rows"], digests)


def _unequal(embedding: Update, head: Update) -> tuple[StoredTensor, StoredTensor] | None:
    """A factor of the embedding and the head's that is not the same, transposed; None where all are."""
    with TensorReader() as reader:
        for ours, theirs in embedding.mirror.items():
            left, right = embedding.parts[ours], head.parts[theirs]
            if not reader.load(left).T.equal(reader.load(right)):
                return left, right
    return None


def _is_in_16_bit(base: BaseParameters, source: Source, embedding: str) -> bool:
    """Whether training had the embedding in 16 bit: as it is saved under its factors, else as the base has it."""
    under = source.tensors.get(f"{embedding.removesuffix('.weight')}.base_layer.weight")
    stored = under or base.parameters.get(embedding)
    return stored is not None and stored.dtype in (F16, BF16)
