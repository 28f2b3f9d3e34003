"""Steps of a plan: what becomes of each weight, in the base's order."""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.adapters.base import Update, UpdateAccess
from streamconv.dtypes import DENSE, Dtype
from streamconv.equalization.equalizer import Equalizer
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS
from streamconv.formats.base import Encoder, Weight
from streamconv.formats.linear import DEFAULT_IGNORE, select
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.plan import (
    Copy,
    Rewrite,
    Step,
    stores_the_same,
)
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Rounding


def plan_steps(
    base: Base,
    weights: Mapping[str, Weight],
    updates: Mapping[str, tuple[Update, ...]],
    quantized: frozenset[str],
    choices: Choices,
    within: frozenset[str],
    equalizers: Mapping[str, Equalizer],
) -> list[list[Step]]:
    """What becomes of each weight, in the base's order: one step, or a copy of every part.

    `within` are weights that can be calibrated, `equalizers` what weights are equalized by.
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
        found = weight_steps(
            name,
            weight,
            updates.get(name, ()),
            encoder,
            merge_base,
            choices.rest,
            name in within,
            equalizers.get(name),
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
    if equalizer is not None and encoder is None:
        raise UnsupportedError(
            f"{name} is {weight.dtype}, which cannot be rescaled; leave --rescale out, or give a base in 16 bit"
        )
    changes = bool(updates) or merge_base is not None or equalizer is not None
    if encoder is None or (not changes and (encoder.format, encoder.dtype) == (weight.format, weight.dtype)):
        # Only a weight of one part is ever stored under another name than the base's.
        is_dense = len(weight.parts) == 1
        return [Copy(name if is_dense else part.name, part) for part in weight.parts.values()]
    if weight.decoder.grid is not None and any(update.needs_original for update in updates):
        raise UnsupportedError(
            f"{name} is {weight.format}, and the adapter was trained on what its initialisation had left of the weight "
            "before that was quantized; give the 16-bit base model instead"
        )
    needs_pass = any(update.access is not UpdateAccess.ROW for update in updates)
    if merge_base is not None and needs_pass:
        raise UnsupportedError(
            f"{name}: this update needs a pass over the whole weight, and so does --merge-base {merge_base.format}; "
            "merge onto the original base"
        )
    if not updates and equalizer is None and merge_base is not None and merge_base.format == encoder.format:
        # Rounding the original gives just what training saw; rounding that once more would move its scales.
        return [Rewrite(name, weight, (), encoder, ROUNDINGS["nearest"])]
    if encoder.grid is None:
        return [Rewrite(name, weight, updates, encoder, merge_base=merge_base, equalizer=equalizer)]
    assert rounding is not None
    base_grid = merge_base.grid if merge_base else weight.decoder.grid
    is_on_grid = base_grid == encoder.grid and equalizer is None
    keeps = is_on_grid and (rounding.keeps_scales or not updates)
    if rounding.searches_scales and encoder.nested and needs_pass:
        raise UnsupportedError(
            f"{name}: this update needs a pass over the whole weight, and so does --rounding {rounding.name} with "
            f"double-quantized scales; choose another --rounding, or a --quant other than {encoder.format}"
        )
    keeps_parts = keeps and merge_base is None and stores_the_same(weight, encoder)
    calibrates &= bool(updates) or not is_on_grid  # else the codes stay
    return [
        Rewrite(
            name, weight, updates, encoder, rounding, merge_base, keeps, keeps_parts, calibrates, equalizer
        )
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
