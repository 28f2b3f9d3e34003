"""The pass that raises scales of a base over whole weights, where updates have made weights too large for them.

    raised/greatest.json      magnitudes found so far, see `survey.py`
    raised/N.safetensors      scales of a partner that no update touches, as they are stored with the raised one

Partners that share a scale in the base share it in the output, whichever of them an update touches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv.calibration.subject import Subject
from streamconv.calibration.tensor_files import stored_in, write_file
from streamconv.checkpoint.layout import Placed
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import Stopped
from streamconv.formats.base import ScaleScope, Surveyed, Weight
from streamconv.formats.kinds import is_surveyed
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.pipeline.passes.survey import Magnitudes, file_bytes, telling_of_memory
from streamconv.planning.memory import plan_memory
from streamconv.planning.partners import partners
from streamconv.planning.plan import Copy, Memory, Need, Pass, Plan, Rewrite, ShardPlan, Step
from streamconv.planning.scales import FRESH, OfBase
from streamconv.progress import OnBytes, StopRequest
from streamconv.rounding.adaptive import Adaptive
from streamconv.running.opened import load_side
from streamconv.running.surveying import bytes_surveyed, magnitude_beyond, surveying
from streamconv.running.workers import Workers

NAME = "enlarge"
FOLDER = "raised"
_HEADER_BYTES = 4096
_log = logging.getLogger(__name__)


def growing(plan: Plan) -> tuple[Rewrite, ...]:
    """Steps whose scale over the whole weight is the base's, while their rounding may choose others below it.

    None where codes are chosen by a text: these are cut where they go beyond.
    """
    if plan.calibrated:
        return ()
    steps = (placed.step for shard in plan.shards for placed in shard.steps)
    return tuple(step for step in steps if isinstance(step, Rewrite) and _may_grow(step))


def _may_grow(step: Rewrite) -> bool:
    encoder = step.encoder
    return (
        is_surveyed(encoder)
        and encoder.scope is ScaleScope.PARTNERS
        and encoder.is_known
        and encoder.raised(_ANY) != encoder
        and bool(step.updates)
        and (step.scales == FRESH or isinstance(step.rounding, Adaptive))
    )


# Beyond any scale; those that cannot be raised are of blocks alone.
_ANY = 1e30


def _plan(subject: Subject) -> Pass | None:
    steps = growing(subject.plan)
    if not steps:
        return None
    memory = _memory(subject.plan, steps)
    kept = file_bytes(steps) + sum(
        _HEADER_BYTES + sum(part.nbytes for role, part in weight.parts.items() if role != weight.decoder.main)
        for weight in _untouched(subject, steps).values()
    )
    need = Need(memory.ram, memory.vram, 2 * kept, sum(map(bytes_surveyed, steps)))
    return Pass(
        NAME,
        FOLDER,
        need,
        kept,
        holds="to look for weights that outgrow the base's scales: a part of the largest one, and its adapter",
        remedy="choose --rounding stochastic, which keeps all scales",
    )


def _memory(plan: Plan, steps: Sequence[Rewrite]) -> Memory:
    return plan_memory([*map(surveying, steps), *steps], plan.options, plan.device)


def _sharing(subject: Subject) -> Mapping[str, Surveyed]:
    """Encoders of the base's weights that may share a scale, by name."""
    return {
        name: weight.keep
        for name, weight in subject.base.weights.items()
        if is_surveyed(weight.keep) and weight.keep.scope is ScaleScope.PARTNERS
    }


def _untouched(subject: Subject, steps: Sequence[Rewrite]) -> Mapping[str, Weight]:
    """Partners of the weights of `steps` that have the same scale in the base, and that no step rewrites."""
    encoders, rewritten = _sharing(subject), _rewritten(subject.plan)
    groups, weights = partners(encoders), subject.base.weights
    return {
        name: weights[name]
        for step in steps
        for name in groups.get(step.name, ())
        if name not in rewritten and encoders[name].following(step.weight.decoder) == encoders[name]
    }


def _rewritten(plan: Plan) -> Mapping[str, Rewrite]:
    steps = (placed.step for shard in plan.shards for placed in shard.steps)
    return {step.name: step for step in steps if isinstance(step, Rewrite)}


def _run(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
    plan, steps = subject.plan, growing(subject.plan)
    _log.info("looking whether %d weights outgrow the scales of the base", len(steps))
    file = Magnitudes(folder, plan.digest, file_bytes(steps))
    known, memory = file.read(), _memory(plan, steps)
    with TensorReader() as reader, Workers(memory.workers) as workers, telling_of_memory(plan.device):
        for step in steps:
            read = 0

            def add(nbytes: int) -> None:
                nonlocal read
                read += nbytes
                on_bytes(nbytes)
                if stop.signal_number is not None:
                    file.write(known)
                    raise Stopped(
                        "stopped by a signal; run the same command again to go on", stop.signal_number
                    )

            if step.name not in known:
                known[step.name] = magnitude_beyond(step, reader, workers, plan.device, memory, add)
            add(bytes_surveyed(step) - read)
        reader.check_recent()
    file.write(known)
    raised = dict(_raised(subject, steps, known))
    stored = _written(subject, raised, folder)
    return Found(partial(_informed, raised=raised, stored=stored))


def _raised(
    subject: Subject, steps: Sequence[Rewrite], known: Mapping[str, float]
) -> Iterator[tuple[str, Surveyed]]:
    """Encoders with raised scales of all weights that share one with a weight that outgrows it."""
    encoders, rewritten = _sharing(subject), _rewritten(subject.plan)
    groups = partners(encoders)
    for step in steps:
        own = encoders.get(step.name)
        names = [step.name] if own is None else groups[step.name]
        sharing = [
            name
            for name in names
            if name == step.name or encoders[name].following(step.weight.decoder) == encoders[name]
        ]
        greatest = max(known.get(name, 0.0) for name in sharing)
        for name in sharing:
            encoder = rewritten[name].encoder if name in rewritten else encoders[name]
            assert isinstance(encoder, Surveyed)
            found = encoder.raised(greatest)
            if found != encoder:
                yield name, found


def _written(subject: Subject, raised: Mapping[str, Surveyed], folder: Path) -> Mapping[str, StoredTensor]:
    """Parts of partners that no step rewrites, as they are stored with raised scales, by name."""
    found: dict[str, StoredTensor] = {}
    untouched = [name for name in raised if name not in _rewritten(subject.plan)]
    with TensorReader() as reader:
        for number, name in enumerate(untouched):
            weight, encoder = subject.base.weights[name], raised[name]
            scales = weight.decoder.scales(load_side(reader, weight))
            path = folder / f"{number:05}.safetensors"
            write_file(path, encoder.parts[1:], encoder.finish(scales, None), {})
            found |= stored_in(path)[0]
    return found


def _informed(plan: Plan, raised: Mapping[str, Surveyed], stored: Mapping[str, StoredTensor]) -> Plan:
    """`plan` with raised scales; bytes, places and fingerprint are the same."""

    def known(placed: Placed[Step]) -> Placed[Step]:
        step = placed.step
        if isinstance(step, Copy) and step.tensor.name in stored:
            return replace(placed, step=replace(step, tensor=stored[step.tensor.name]))
        if not isinstance(step, Rewrite) or step.name not in raised:
            return placed
        scales = OfBase() if isinstance(step.scales, OfBase) else step.scales
        return replace(placed, step=replace(step, encoder=raised[step.name], scales=scales))

    shards: list[ShardPlan] = [replace(each, steps=tuple(map(known, each.steps))) for each in plan.shards]
    return replace(plan, shards=tuple(shards))


ENLARGE = PassKind(None, _plan, _run)
