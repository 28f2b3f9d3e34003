"""What a calibration needs in memory and on disk, from headers and the config alone."""

from __future__ import annotations

import math

from streamconv.calibration.model import Model, opened
from streamconv.calibration.subject import Subject
from streamconv.forward.memory import BATCH_TOKENS, FIXED_BYTES, sequence_bytes, table_bytes
from streamconv.plan import Need, Rewrite

# Bytes for every entry of H, and for every weight, that `feedback` has at once beside them.
_METRIC_BYTES = 40
_CHOICE_BYTES = 48
# On a GPU, H and its factor in float64 are in host memory.
_FACTOR_BYTES = 24
_HEADER_BYTES = 2**20


def calibration_need(subject: Subject) -> Need:
    """Raises UnsupportedError for a model that cannot be walked; reads no weight."""
    with opened(subject) as model:
        return need_of(model, subject)


def batch_of(length: int) -> int:
    """Sequences that are computed at a time. Sums depend on it, so no budget decides it."""
    return max(1, BATCH_TOKENS // length)


def need_of(model: Model, subject: Subject) -> Need:
    """What `model`, which is the subject's, needs."""
    walk, crosses = model.walk, subject.calibration.options.needs_cross
    length, tokens = subject.calibration.sequence_length, subject.calibration.tokens
    batch = min(subject.sequences, batch_of(length))
    forward = batch * sequence_bytes(walk, length)
    on_device = max(_layer_need(model, number, forward, crosses) for number in range(model.layers))
    on_device += table_bytes(walk, tokens)
    held = max(sum(map(_held_bytes, model.layer_steps(number))) for number in range(model.layers))
    on_host = held + FIXED_BYTES + 2 * 4 * batch * length * walk.hidden
    packed = subject.plan.calibrated_bytes
    disk = 4 * 4 * tokens * walk.hidden + packed + model.layers * _HEADER_BYTES
    read = sum(map(model.stored_bytes, range(model.layers)))
    if walk.device.is_cpu:
        return Need(on_host + on_device, 0, disk, read)
    widest = max(step.columns for step in subject.plan.calibrated)
    return Need(on_host + _FACTOR_BYTES * widest**2, on_device, disk, read)


def _layer_need(model: Model, number: int, forward: int, crosses: bool) -> int:
    """A layer in float32, both as it was and as it will be, and either a batch or a choice in work."""
    steps = model.layer_steps(number)
    twice = sum(4 * step.rows * step.columns for step in steps) if crosses else 0
    gathering = forward + max((_moment_bytes(step, crosses) for step in steps), default=0)
    choosing = max((_moment_bytes(step, crosses) + _choice_bytes(step) for step in steps), default=0)
    return model.walk.layer_bytes(number) + twice + max(gathering, choosing)


def _moment_bytes(step: Rewrite, crosses: bool) -> int:
    return 4 * step.columns**2 * (1 + crosses)


def _choice_bytes(step: Rewrite) -> int:
    return _METRIC_BYTES * step.columns**2 + _CHOICE_BYTES * step.rows * step.columns


def _held_bytes(step: Rewrite) -> int:
    """A weight as stored, with its adapter, and what becomes of it."""
    stored = sum(part.nbytes for part in step.weight.parts.values())
    adapter = sum(4 * math.prod(part.shape) for update in step.updates for part in update.parts.values())
    return stored + adapter + sum(spec.nbytes for spec in step.specs)
