"""What a calibration needs in memory and on disk, from headers and the config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamconv.calibration.model import Model, opened
from streamconv.calibration.subject import Subject
from streamconv.forward.memory import BATCH_TOKENS, FIXED_BYTES, sequence_bytes, table_bytes
from streamconv.forward.walk import Walk
from streamconv.plan import Need, Rewrite

# Bytes for every entry of H, and for every weight, that `feedback` has at once beside them.
_METRIC_BYTES = 40
_CHOICE_BYTES = 48
_HEADER_BYTES = 2**20


def calibration_need(subject: Subject) -> Need:
    """Raises UnsupportedError for a model that cannot be walked; reads no weight."""
    text = subject.calibration
    with opened(subject) as model:
        return need_of(model, (text.tokens // text.sequence_length, text.sequence_length), subject)


def batch_of(length: int) -> int:
    """Sequences that are computed at a time. Sums depend on it, so no budget decides it."""
    return max(1, BATCH_TOKENS // length)


def need_of(model: Model, shape: Sequence[int], subject: Subject) -> Need:
    """`shape` is that of the text, [sequences, length]."""
    walk, crosses = model.walk, subject.calibration.options.asymmetry != 0
    count, length = shape
    batch = min(count, batch_of(length))
    on_host, on_device = 0, 0
    for number in range(len(walk.skeleton.layers)):
        steps = model.layer_steps(number)
        twice = sum(4 * step.rows * step.columns for step in steps) if crosses else 0
        working = max(
            batch * sequence_bytes(walk, length)
            + max((_moment_bytes(step, crosses) for step in steps), default=0),
            max((_moment_bytes(step, crosses) + _choice_bytes(step) for step in steps), default=0),
        )
        on_device = max(on_device, walk.layer_bytes(number) + twice + working)
        on_host = max(on_host, sum(map(_held_bytes, steps)))
    on_device += table_bytes(walk, count * length)
    states = 4 * count * length * walk.hidden
    packed = sum(spec.nbytes for step in model.steps.values() for spec in step.specs)
    disk = 4 * states + packed + len(walk.skeleton.layers) * _HEADER_BYTES
    on_host += FIXED_BYTES + 4 * batch * length * walk.hidden
    if walk.device.is_cpu:
        return Need(on_host + on_device, 0, disk, sum(layer_sizes(walk)))
    return Need(on_host + _factor_bytes(model), on_device, disk, sum(layer_sizes(walk)))


def layer_sizes(walk: Walk) -> Sequence[int]:
    """Bytes that are read for the weights of each layer."""
    return [
        sum(map(walk.source.stored_bytes, walk.layer_weights(number)))
        for number in range(len(walk.skeleton.layers))
    ]


def _moment_bytes(step: Rewrite, crosses: bool) -> int:
    return 4 * step.columns**2 * (1 + crosses)


def _choice_bytes(step: Rewrite) -> int:
    return _METRIC_BYTES * step.columns**2 + _CHOICE_BYTES * step.rows * step.columns


def _factor_bytes(model: Model) -> int:
    """H and its factor in float64 in host memory."""
    return 16 * model.widest.columns**2 if model.widest is not None else 0


def _held_bytes(step: Rewrite) -> int:
    """A weight as stored, with its adapter, and what becomes of it."""
    stored = sum(part.nbytes for part in step.weight.parts.values())
    adapter = sum(4 * math.prod(part.shape) for update in step.updates for part in update.parts.values())
    return stored + adapter + sum(spec.nbytes for spec in step.specs)
