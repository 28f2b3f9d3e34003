"""The GGUF side of a plan: encoders of weights by their places, and tensors that are made of several steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from streamconv.checkpoint.container import Gguf
from streamconv.checkpoint.gguf_header import Pairs
from streamconv.checkpoint.types import PADDING, Shape, TensorSpec
from streamconv.dtypes import F16, F32, U8
from streamconv.errors import OptionError, UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import Constant, Encoder, Format, Weight
from streamconv.formats.ggml_mixes import MixedModel
from streamconv.formats.ggml_mxfp4 import GGML_MXFP4
from streamconv.formats.gguf import PREFIX, ColumnsEncoder, full_encoder, turned_encoder, with_rows_of_heads
from streamconv.formats.gguf_blocks import Typed
from streamconv.formats.linear import matches, module_of
from streamconv.gguf.donor import donor_pairs
from streamconv.gguf.model import GgufModel, TensorPlace, gguf_model
from streamconv.gguf.pieces import GgufPiece
from streamconv.planning.assignment import FormatRule, ModuleFormats, rule_for
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.fingerprint import digests
from streamconv.planning.plan import Plan, Step
from streamconv.planning.reading import read_donor

DONOR = "gguf_donor"
"""Key of fingerprints of files that have something of a donor."""

F16_FORMAT = FORMATS["gguf:f16"]


def is_gguf(quant: Format | None) -> bool:
    return quant is not None and quant.name.startswith(PREFIX)


def plan_model(base: Base, shapes: Mapping[str, Shape], choices: Choices) -> GgufModel | None:
    """Places of the output's weights in GGUF files; None where the output is another.

    Raises UnsupportedError for a model that is not written as GGUF, OptionError for options that are not for these.
    """
    if choices.quant is None or not is_gguf(choices.quant):
        return None
    if choices.dtype is not None:
        raise OptionError(
            f"--dtype {choices.dtype.name} is for what a quantized model leaves in 16 bit, and --quant"
            f" {choices.quant.name} says all of a GGUF file's types; leave --dtype out"
        )
    return gguf_model(base.index.storage.location, base.index.config, shapes, choices.quant.name)


def formats_of(
    model: GgufModel,
    quant: Format,
    mixture: ModuleFormats,
    pieces: Mapping[str, GgufPiece],
    ignore: Sequence[str],
) -> dict[str, Format]:
    """Formats of matrices by name of the weight: types that a file called `quant` has, of `mixture`'s rules, or F16.

    That have rows that are whole blocks of no type, modules that `ignore` names, and what is turned as it is written.
    Pieces that stay are in MXFP4, as they are in the base.

    Raises UnsupportedError for a rule that is not for these files, OptionError for one whose type cannot store a row.
    """
    facts = _facts(model)
    found: dict[str, Format] = {}
    for name, place in model.places.items():
        if place.is_full:
            continue
        rule = rule_for(module_of(name), mixture.rules)
        piece = pieces.get(name)
        is_left = matches(module_of(name), ignore) or (piece is not None and piece.is_turned)
        stays = isinstance(quant, Typed) and piece is not None and piece.stays
        if rule is None and mixture.quantizes_rest and not is_left and stays:
            found[name] = GGML_MXFP4
        elif rule is None and mixture.quantizes_rest and not (is_left and isinstance(quant, Typed)):
            found[name] = _typed(quant, place, facts)
        elif rule is None or is_left:
            found[name] = F16_FORMAT
        else:
            found[name] = _by_rule(rule, name, place, facts)
    return found


def _typed(quant: Format, place: TensorPlace, facts: MixedModel) -> Format:
    """The format of one tensor."""
    return FORMATS[quant.type_of(place.tensor, place.shape[-1], facts)] if isinstance(quant, Typed) else quant


def _by_rule(rule: FormatRule, name: str, place: TensorPlace, facts: MixedModel) -> Format:
    if rule.format is None:
        return F16_FORMAT
    if not is_gguf(rule.format):
        able = ", ".join(key for key in FORMATS if key.startswith(PREFIX))
        raise UnsupportedError(
            f"--quant-for {rule}: a GGUF file has types of its own, and {rule.format.name} is none; use none, or one "
            f"of {able}"
        )
    found = _typed(rule.format, place, facts)
    if rule.format.grid is not None and found.grid is None:
        raise OptionError(
            f"--quant-for {rule}: {name} has shape {list(place.shape)}, whose rows are no whole blocks of 32; leave it "
            "out of the pattern, or choose gguf:f16"
        )
    return found


def _facts(model: GgufModel) -> MixedModel:
    """Facts that types depend on, from the header."""

    def number(key: str) -> int:
        found = model.pairs.get(f"{model.architecture}.{key}")
        return found.value if found is not None and isinstance(found.value, int) else 0

    return MixedModel.of(
        dict.fromkeys(place.tensor for place in model.places.values()),
        model.architecture,
        layers=number("block_count"),
        experts=number("expert_count"),
        heads=number("attention.head_count"),
        key_heads=number("attention.head_count_kv"),
    )


def gguf_encoder(place: TensorPlace, weight: Weight, quant: Format, piece: GgufPiece | None) -> Encoder:
    """Encoder of a weight at its place, or of a piece of one, in the format that it has if it is a matrix.

    Raises UnsupportedError for what only can be copied.
    """
    if not weight.dtype.is_float:
        raise UnsupportedError(
            f"{weight.name} is {weight.dtype}, expected numbers that a GGUF file can store"
        )
    if piece is not None and piece.is_turned:
        rows, width = weight.shape
        (spec,) = quant.encoder(place.tensor, place.shape, F16).parts
        return turned_encoder(spec, rows, width, piece.columns)
    if piece is not None and piece.expert is None and len(piece.columns) < weight.shape[-1]:
        return ColumnsEncoder(TensorSpec(place.tensor, F32, place.shape), columns=piece.columns)
    if place.is_full:
        encoder: Encoder = full_encoder(place.tensor, place.shape, place.shift)
    else:
        encoder = quant.encoder(place.tensor, place.shape, weight.dtype)
    return encoder if place.heads is None else with_rows_of_heads(encoder, place.heads)


def by_tensor(by_weight: Sequence[Sequence[Step]], model: GgufModel) -> list[list[Step]]:
    """Steps of each tensor, tensors in the base's order, experts by number; constants come last."""
    tensors: dict[str, list[Step]] = {}
    for step in (step for steps in by_weight for step in steps):
        tensors.setdefault(step.specs[0].name, []).append(step)
    for steps in tensors.values():
        steps.sort(key=lambda step: model.places[step.name].expert)
    constants: list[list[Step]] = [[Constant(spec, content)] for spec, content in model.constants]
    return [*tensors.values(), *constants]


def zeros(nbytes: int) -> Step:
    """Padding between tensors."""
    return Constant(TensorSpec(PADDING, U8, (nbytes,)), bytes(nbytes))


def with_donor(plan: Plan, donor: str, tokenizer: str) -> Plan:
    """The plan with what the GGUF file `donor` gives its header; `tokenizer` as for `with_tokenizer`.

    Raises CheckpointError where that is of another model.
    """
    assert isinstance(plan.container, Gguf), "donors are for files of ours"
    shapes = {name: spec.shape for name, spec in plan.tensors.items()}
    pairs = donor_pairs(donor, read_donor(donor), plan.container.pairs, shapes)
    found = with_tokenizer(plan, pairs, tokenizer)
    return replace(found, fingerprint={**found.fingerprint, DONOR: True})


def with_tokenizer(plan: Plan, pairs: Pairs, tokenizer: str) -> Plan:
    """The plan with the pairs of a tokenizer in its header; as it is for another container.

    `tokenizer` is the option by which it was chosen: what chose it otherwise would give another header.
    """
    if not isinstance(plan.container, Gguf):
        return plan
    container = plan.container.with_pairs(pairs)
    steps = [[placed.step for placed in shard.steps if placed.step.name != PADDING] for shard in plan.shards]
    shards = container.lay_out(steps, zeros)
    fingerprint = {**plan.fingerprint, "output": digests(shards), "tokenizer": tokenizer}
    return replace(plan, container=container, shards=shards, fingerprint=fingerprint)
