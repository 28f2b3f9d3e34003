"""Memory and disk that passes of a text need, from headers and the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from streamconv.calibration.cost import (
    CARD,
    CORE,
    CostCounts,
    Sizes,
    TextSize,
    cpu_seconds,
    device_seconds,
    groups_of,
    layer_work,
)
from streamconv.calibration.model import Model, opened, opened_targets
from streamconv.calibration.subject import Subject
from streamconv.equalization import awq
from streamconv.equalization.pairs import WeightPair
from streamconv.forward.memory import BATCH_TOKENS, sequence_bytes, table_bytes
from streamconv.forward.walk import Walk
from streamconv.planning.plan import Need, Rewrite
from streamconv.rounding import residual
from streamconv.rounding.feedback import device_working_bytes, factoring_bytes, metric_bytes, working_bytes

# transformers and what it loads, compiled kernels, thread stacks, and what the allocator keeps of freed memory;
# measured for a model of a megabyte, whose own need is next to nothing: 212 MiB.
_FIXED_BYTES = 224 * 2**20
_HEADER_BYTES = 2**20
# Rows of the vocabulary that a token is drawn from at a time. Sums depend on it, so no budget decides it.
HEAD_ROWS = 8192
_LOGIT_COPIES = 6
# Moments of one layer's experts that are gathered in a pass. What is found does not depend on it.
STAGE_BYTES = 2**30
# What a layer keeps to be differentiated, beside what it has at once when it is only run.
_BACKWARD = 3
_BACKWARD_ON_DEVICE = 1.6  # counted: 1.3 to 1.55


def calibrating_need(subject: Subject) -> Need:
    """Bytes that choosing codes needs. Raises UnsupportedError for a model that cannot be walked; reads no weight."""
    with opened(subject) as model:
        return replace(need_of(model, subject), seconds=seconds_of(model, subject))


def seconds_of(model: Model, subject: Subject) -> float:
    """Seconds, about, that choosing codes takes on the plan's device, by the rates that `cost` assumes."""
    calibration, device = subject.calibration, model.walk.device
    text = TextSize(calibration.tokens, calibration.gradient_tokens)
    work = CostCounts()
    for number in range(model.layers):
        steps = model.layer_steps(number)
        groups = groups_of([(step.name, step.rows, step.columns) for step in steps])
        sizes = Sizes(groups, model.walk.hidden)
        work += layer_work(sizes, text, subject.feedback, model.stored_bytes(number), not device.is_cpu)
    if device.is_cpu:
        return cpu_seconds(work, CORE, calibration.threads)
    return device_seconds(work, CARD)


def equalizing_need(subject: Subject) -> Need:
    """Bytes that choosing scales needs. Raises what `calibrating_need` does."""
    with opened_targets(subject, consumers_of(subject)) as walk:
        return pairs_need(walk, subject)


def measuring_need(subject: Subject) -> Need:
    """Bytes that measuring inputs needs. Raises what `calibrating_need` does."""
    names = frozenset(step.name for step in subject.plan.measured)
    with opened_targets(subject, names, is_equalized=True) as walk:
        return inputs_need(walk, subject)


def consumers_of(subject: Subject) -> frozenset[str]:
    """Weights whose inputs tell the scales of pairs."""
    return frozenset(name for pair in subject.equalization.pairs for name in pair.consumers)


def pairs_in(walk: Walk, number: int, subject: Subject) -> Sequence[WeightPair]:
    """Pairs that are equalized in decoder layer `number`."""
    there = set(walk.layer_weights(number))
    return [pair for pair in subject.equalization.pairs if pair.producer in there]


def pairs_need(walk: Walk, subject: Subject) -> Need:
    """Need of the pass that chooses scales: a layer, the moments of all its pairs, and a batch or a choice in work."""
    forward = _forward_bytes(walk, subject)
    layers = range(len(walk.skeleton.layers))
    layer = max(_pairs_layer_bytes(walk, number, subject, forward) for number in layers)
    return _walk_need(walk, subject, layer, subject.plan.equalizer_bytes)


def inputs_need(walk: Walk, subject: Subject) -> Need:
    """Need of the pass that measures inputs: a layer, and a batch in work."""
    forward = _forward_bytes(walk, subject)
    layers = range(len(walk.skeleton.layers))
    return _walk_need(walk, subject, max(walk.layer_bytes(number) + forward for number in layers), 0)


def _forward_bytes(walk: Walk, subject: Subject) -> int:
    """Bytes of the batch that a layer computes."""
    length = subject.calibration.sequence_length
    return min(subject.sequences, batch_of(length)) * sequence_bytes(walk, length)


def _walk_need(walk: Walk, subject: Subject, layer: int, found: int) -> Need:
    """Need of one stream through all layers: `layer` bytes are the most at one, `found` those of what is found."""
    length, tokens = subject.calibration.sequence_length, subject.calibration.tokens
    batch, layers = min(subject.sequences, batch_of(length)), range(len(walk.skeleton.layers))
    before = walk.layer_bytes(0) + _forward_bytes(walk, subject) + table_bytes(walk, tokens)
    on_device = max(layer, before)
    on_host = _FIXED_BYTES + 4 * batch * length * walk.hidden + found
    disk = 2 * 4 * tokens * walk.hidden + found + len(layers) * _HEADER_BYTES
    read = sum(walk.source.stored_bytes(name) for number in layers for name in walk.layer_weights(number))
    if walk.device.is_cpu:
        return Need(on_host + on_device, 0, disk, read)
    return Need(on_host, on_device, disk, read)


def rounds_of(pairs: Sequence[WeightPair]) -> Iterator[list[WeightPair]]:
    """Pairs whose moments are gathered at once: all that all tokens come to, and experts as far as there is room."""
    taken, room = [pair for pair in pairs if not pair.is_routed], STAGE_BYTES
    for pair in pairs:
        if not pair.is_routed:
            continue
        if taken and room < 4 * pair.inputs**2:
            yield taken
            taken, room = [], STAGE_BYTES
        taken.append(pair)
        room -= 4 * pair.inputs**2
    yield taken


def _pairs_layer_bytes(walk: Walk, number: int, subject: Subject, forward: int) -> int:
    rounds = [[pair.inputs for pair in pairs] for pairs in rounds_of(pairs_in(walk, number, subject))]
    moments = max(sum(4 * each**2 for each in inputs) for inputs in rounds)
    choosing = max((awq.working_bytes(each) for inputs in rounds for each in inputs), default=0)
    return walk.layer_bytes(number) + moments + max(forward, choosing)


def batch_of(length: int) -> int:
    """Sequences that are computed at a time. Sums depend on it, so no budget decides it."""
    return max(1, BATCH_TOKENS // length)


def need_of(model: Model, subject: Subject) -> Need:
    """Need of the pass that chooses codes, for `model`, which is the subject's."""
    walk, crosses = model.walk, subject.feedback.needs_cross
    length, tokens = subject.calibration.sequence_length, subject.calibration.tokens
    batch = min(subject.sequences, batch_of(length))
    forward = batch * sequence_bytes(walk, length)
    is_two_sided = subject.gradient_sequences > 0
    rank = subject.plan.residual_rank
    on_device = max(
        _layer_need(model, number, forward, crosses, is_two_sided, rank) for number in range(model.layers)
    )
    on_device = max(on_device, walk.layer_bytes(0) + forward + table_bytes(walk, tokens))
    held = max(
        sum(_held_bytes(step, rank) for step in model.layer_steps(number))
        + max((step.whole_bytes for step in model.layer_steps(number)), default=0)
        for number in range(model.layers)
    )
    on_host = held + _FIXED_BYTES + 2 * 4 * batch * length * walk.hidden
    packed = subject.plan.calibrated_bytes
    disk = 4 * 4 * tokens * walk.hidden + packed + model.layers * _HEADER_BYTES
    read = sum(map(model.stored_bytes, range(model.layers)))
    if crosses and walk.device.is_cpu:
        disk += 4 * tokens * max(_inputs(model, number) for number in range(model.layers))
    if is_two_sided:
        disk += _gradient_disk(model, subject)
        read = 3 * read + 2 * walk.head_bytes
        on_device = max(on_device, _gradient_need(model, subject, batch, forward))
        on_host += max(_output_bytes(model, number) for number in range(model.layers)) * (
            subject.calibration.gradient_tokens
        )
    if walk.device.is_cpu:
        return Need(on_host + on_device, 0, disk, read)
    factoring = max(
        factoring_bytes(step.rows, step.columns, is_two_sided) for step in subject.plan.calibrated
    )
    originals = max(_original_bytes(model, number, crosses) for number in range(model.layers))
    return Need(on_host + factoring + originals, on_device, disk, read)


def _gradient_need(model: Model, subject: Subject, batch: int, forward: int) -> int:
    """The most of a layer that is differentiated, and of a tile of the head."""
    walk, length = model.walk, subject.calibration.sequence_length
    backward = _BACKWARD if walk.device.is_cpu else _BACKWARD_ON_DEVICE
    layer = walk.largest_layer_bytes + int(backward * forward)
    head = 4 * HEAD_ROWS * (walk.hidden + _LOGIT_COPIES * batch * length)
    return max(layer, head) + 4 * 4 * subject.calibration.gradient_tokens * walk.hidden


def _gradient_disk(model: Model, subject: Subject) -> int:
    tokens, hidden = subject.calibration.gradient_tokens, model.walk.hidden
    outputs = sum(_output_bytes(model, number) for number in range(model.layers))
    return tokens * (8 * (model.layers + 1) * hidden + outputs) + (model.layers + 1) * _HEADER_BYTES


def _inputs(model: Model, number: int) -> int:
    """Inputs of a layer's groups, at most; which weights share theirs is not known yet."""
    return sum(step.columns for step in model.layer_steps(number))


def _output_bytes(model: Model, number: int) -> int:
    """Bytes a token of the gradients that are kept of a layer's linear layers."""
    return sum(2 * step.rows for step in model.layer_steps(number))


def _layer_need(model: Model, number: int, forward: int, crosses: bool, is_two_sided: bool, rank: int) -> int:
    """A layer in float32, and either a batch, with what it was before, or a choice in work."""
    steps, is_cpu = model.layer_steps(number), model.walk.device.is_cpu
    twice, stage = _original_bytes(model, number, crosses), _stage_bytes(model, number)
    moments = max((_moment_bytes(step, crosses) for step in steps), default=0)
    gathering = twice + forward + max(moments, stage)
    choosing = max(
        (
            max(_moment_bytes(step, crosses), stage)
            + bool(stage) * 4 * step.rows * step.columns  # which is read apart from the others
            + is_two_sided * 4 * step.rows**2
            + _choosing_bytes(step, is_two_sided, is_cpu)
            + (residual.working_bytes(step.rows, step.columns, rank, is_two_sided) if rank else 0)
            for step in steps
        ),
        default=0,
    )
    return model.walk.layer_bytes(number) + max(gathering, choosing + is_cpu * twice)


def _choosing_bytes(step: Rewrite, is_two_sided: bool, is_cpu: bool) -> int:
    """Bytes that choosing codes takes where it is done; on a CPU, at least those of factoring in float64 before it."""
    rows, columns = step.rows, step.columns
    if not is_cpu:
        block = step.encoder.grid.block if step.encoder.grid else 1
        return device_working_bytes(rows, columns, block, is_two_sided)
    metrics = metric_bytes(rows, columns, is_two_sided)
    working = working_bytes(rows, columns, is_two_sided)
    return max(working, metrics + factoring_bytes(rows, columns, is_two_sided))


def _original_bytes(model: Model, number: int, crosses: bool) -> int:
    """A layer's weights as they were before they were replaced, for the other stream to run again: on the host."""
    return crosses * sum(4 * step.rows * step.columns for step in model.layer_steps(number))


def _stage_bytes(model: Model, number: int) -> int:
    """Moments of a layer's experts, as many as are gathered at once."""
    sizes: dict[str, dict[int, int]] = {}
    for matrix in model.matrices(number).values():
        if matrix.expert is not None:
            sizes.setdefault(matrix.parameter, {})[matrix.expert] = 4 * matrix.inputs**2
    return max(
        (min(sum(each.values()), max(STAGE_BYTES, *each.values())) for each in sizes.values()),
        default=0,
    )


def _moment_bytes(step: Rewrite, crosses: bool) -> int:
    return 4 * step.columns**2 * (1 + crosses)


def _held_bytes(step: Rewrite, rank: int) -> int:
    """A weight as stored, with its adapter, and what becomes of it."""
    stored = sum(part.nbytes for part in step.weight.parts.values())
    adapter = sum(4 * math.prod(part.shape) for update in step.updates for part in update.parts.values())
    factors = rank * residual.FACTOR_DTYPE.itemsize * (step.rows + step.columns)
    scales = step.equalizer.nbytes if step.equalizer else 0
    # What an update learns of a whole weight is that weight anew.
    learnt = step.prepared_bytes + (4 * step.rows * step.columns if step.whole_bytes else 0)
    return stored + adapter + learnt + scales + sum(spec.nbytes for spec in step.encoder.parts) + factors
