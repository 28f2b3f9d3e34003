"""Steps of a plan: what becomes of each weight, in the base's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from streamconv.adapters.base import Update, UpdateAccess
from streamconv.dtypes import DENSE, Dtype
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import Encoder, Weight
from streamconv.formats.fp8 import ACTIVATIONS
from streamconv.formats.kinds import is_input_measured, is_surveyed
from streamconv.formats.linear import DEFAULT_IGNORE, select
from streamconv.gguf.model import GgufModel
from streamconv.gguf.pieces import GgufPiece
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices, takes_calibration
from streamconv.planning.gguf import F16_FORMAT, gguf_encoder
from streamconv.planning.plan import Copy, Rewrite, Step
from streamconv.planning.quantized import QuantizedSet
from streamconv.planning.scales import FRESH, scales_of_base
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Rounding


def plan_steps(
    base: Base,
    weights: Mapping[str, Weight],
    updates: Mapping[str, tuple[Update, ...]],
    chosen: QuantizedSet,
    choices: Choices,
    within: frozenset[str],
    equalizers: Mapping[str, Equalizer],
    model: GgufModel | None = None,
    pieces: Mapping[str, GgufPiece] = MappingProxyType({}),
) -> list[list[Step]]:
    """Steps of each weight, weights in the base's order: one step, or a copy of every part.

    `within` are weights that can be calibrated where their format can, `equalizers` what weights are equalized by. Of
    those that are kept as their file has them, other parts are copied. `model` has the places in GGUF files, None for
    others; `pieces` are those of weights that such files have otherwise.
    """
    seen_by_training = _rounded_in_training(base, choices)
    steps: list[list[Step]] = []
    for name, weight in weights.items():
        if model is not None and name not in model.places:
            continue
        encoder = chosen.kept.get(name)
        if model is not None and choices.quant is not None:
            own = chosen.formats.get(name) or chosen.dense.get(name, F16_FORMAT)
            encoder = gguf_encoder(model.places[name], weight, own, pieces.get(name))
        elif encoder is None:
            encoder = _encoder(name, weight, chosen, _own_dtype(base, name, weight), choices)
        copied = _copied_blocks(name, weight, encoder, pieces.get(name))
        if copied is not None:
            steps.append([copied])
            continue
        merge_base = None
        # What the adapter holds whole was trained in full precision.
        is_rounded = name in seen_by_training and weight is base.weights.get(name)
        if is_rounded and choices.merge_base is not None:
            merge_base = choices.merge_base.encoder(name, weight.shape, weight.dtype)
        if is_surveyed(encoder) and not encoder.is_known and merge_base is None:
            encoder = encoder.following(weight.decoder)
        if is_input_measured(encoder) and not encoder.is_measured and name not in equalizers:
            encoder = encoder.inheriting(weight.decoder)
        found = weight_steps(
            name,
            weight,
            updates.get(name, ()),
            encoder,
            merge_base,
            choices.rest,
            name in within and takes_calibration(encoder),
            equalizers.get(name),
        )
        constants = [step.encoder.constants for step in found if isinstance(step, Rewrite)]
        beside = _beside(weight, found) if name in chosen.kept else []
        if name in equalizers:
            _check_activations(name, [part.name for part in weight.parts.values()] if beside else [])
        steps.append([*found, *(constant for each in constants for constant in each), *beside])
    return steps


def _copied_blocks(
    name: str, weight: Weight, encoder: Encoder | None, piece: GgufPiece | None
) -> Copy | None:
    """Copy of a piece that stays, where a file has it in the very blocks of the output; else None."""
    if piece is None or not piece.stays or len(weight.parts) > 1 or encoder is None:
        return None
    (part,), (spec, *_) = weight.parts.values(), encoder.parts
    return Copy(name, part, spec) if part.dtype == spec.dtype else None


def _check_activations(name: str, parts: Sequence[str]) -> None:
    """Raise UnsupportedError where a scale of activations is kept beside a weight that is rescaled."""
    measured = next((each for each in parts if each.rpartition(".")[2] in ACTIVATIONS), None)
    if measured is not None:
        raise UnsupportedError(
            f"{name} has {measured} beside it, measured of activations before these are rescaled; leave --rescale out, "
            "or choose --quant fp8, which scales activations as they come"
        )


def _beside(weight: Weight, steps: Sequence[Step]) -> list[Copy]:
    """Copies of parts that no step writes: scales of activations, which no update of the weight changes."""
    written = {spec.name for step in steps for spec in step.specs}
    return [Copy(part.name, part) for part in weight.parts.values() if part.name not in written]


def _own_dtype(base: Base, name: str, weight: Weight) -> Dtype:
    """The output's type where none is asked for: the base's, also for what the adapter holds whole."""
    original = base.weights.get(name)
    if original is None and base.tie is not None and name == base.tie.head:
        original = base.weights[base.tie.embedding]
    if original is None:  # a head that only the adapter has is stored as most of the base
        counts = Counter(each.dtype for each in base.weights.values() if each.dtype.name in DENSE)
        return counts.most_common(1)[0][0] if counts else weight.dtype
    return original.dtype if original.dtype.name in DENSE else weight.dtype


def weight_steps(
    name: str,
    weight: Weight,
    updates: tuple[Update, ...],
    encoder: Encoder | None,
    merge_base: Encoder | None,
    rounding: Rounding | None,
    calibrates: bool,
    equalizer: Equalizer | None = None,
) -> list[Step]:
    """Steps of one weight: a rewrite, or a copy of every part. Raises UnsupportedError for what cannot be made."""
    if equalizer is not None and encoder is None:
        raise UnsupportedError(
            f"{name} is {weight.dtype}, which cannot be rescaled; leave --rescale out, or give a base in 16 bit"
        )
    changes = bool(updates) or merge_base is not None or equalizer is not None
    if encoder is None or (not changes and (encoder.format, encoder.dtype) == (weight.format, weight.dtype)):
        return _copies(name, weight, encoder)
    _check_updates(name, weight, updates, merge_base)
    if not updates and equalizer is None and merge_base is not None and merge_base.format == encoder.format:
        # Rounding the original gives just what training saw; rounding that once more would move its scales.
        return [Rewrite(name, weight, (), encoder, ROUNDINGS["nearest"])]
    step = Rewrite(name, weight, updates, encoder, merge_base=merge_base, equalizer=equalizer)
    if encoder.grid is None:
        return [step]
    assert rounding is not None
    return [_quantizing(step, rounding, calibrates)]


def _copies(name: str, weight: Weight, encoder: Encoder | None) -> list[Step]:
    """Copies of all parts; only a dense weight is ever stored under another name than the base's."""
    is_dense = len(weight.parts) == 1 and not weight.is_quantized
    if is_dense and encoder is not None and encoder.parts[0].name != name:
        return [Copy(name, part, encoder.parts[0]) for part in weight.parts.values()]
    return [Copy(name if is_dense else part.name, part) for part in weight.parts.values()]


def _check_updates(
    name: str, weight: Weight, updates: tuple[Update, ...], merge_base: Encoder | None
) -> None:
    """Raise UnsupportedError unless the updates can be added to the base as it is, or as it is rounded first."""
    if weight.decoder.grid is not None and any(update.needs_original for update in updates):
        raise UnsupportedError(
            f"{name} is {weight.format}, and the adapter was trained on what its initialisation had left of the weight "
            "before that was quantized; give the 16-bit base model instead"
        )
    if merge_base is not None and _need_pass(updates):
        raise UnsupportedError(
            f"{name}: this update needs a pass over the whole weight, and so does --merge-base {merge_base.format}; "
            "merge onto the original base"
        )


def _need_pass(updates: tuple[Update, ...]) -> bool:
    """Whether an update must have seen all of the weight before its first row."""
    return any(update.access is not UpdateAccess.ROW for update in updates)


def _quantizing(step: Rewrite, rounding: Rounding, calibrates: bool) -> Rewrite:
    """The step with its rounding, and with the base's scales where the rounding leaves them.

    Raises UnsupportedError where both the update and the search for scales need a pass of their own.
    """
    if rounding.searches_scales and step.encoder.nested and _need_pass(step.updates):
        raise UnsupportedError(
            f"{step.name}: this update needs a pass over the whole weight, and so does --rounding {rounding.name} with "
            f"double-quantized scales; choose another --rounding, or a --quant other than {step.encoder.format}"
        )
    of_base = scales_of_base(step.weight, step.merge_base, step.encoder, step.equalizer)
    keeps = rounding.keeps_scales or not step.updates
    # Without an update, codes of a base on the output's grid stay as they are.
    calibrates &= bool(step.updates) or of_base == FRESH
    return replace(step, rounding=rounding, scales=of_base if keeps else FRESH, calibrated=calibrates)


def _encoder(
    name: str, weight: Weight, chosen: QuantizedSet, own_dtype: Dtype, choices: Choices
) -> Encoder | None:
    """Encoder that stores a weight in the output; None for what can only be copied."""
    if not weight.dtype.is_float or weight.undecoded is not None or (choices.passes and weight.is_quantized):
        return None
    dtype = choices.dtype or own_dtype
    if name in chosen.formats:
        return chosen.formats[name].encoder(name, weight.shape, dtype)
    if name in chosen.dense:
        return chosen.dense[name].encoder(name, weight.shape, dtype)
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
