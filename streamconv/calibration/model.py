"""A subject opened to be walked: its float32 targets, its layers, and which weights of them are calibrated."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from streamconv.calibration.subject import Subject
from streamconv.calibration.targets import Targets
from streamconv.dtypes import F32
from streamconv.errors import UnsupportedError
from streamconv.forward.matrices import Matrices, matrices_of, take_experts_in_turn
from streamconv.forward.skeleton import build_planned
from streamconv.forward.walk import Walk
from streamconv.forward.weights import WeightSource
from streamconv.planning.plan import Plan, Rewrite
from streamconv.planning.planner import build_plan


@dataclass(frozen=True, slots=True)
class Model:
    """Walk through a model's layers, and the targets that its weights come from."""

    walk: Walk
    targets: Targets

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.walk.skeleton.layers)

    def stored_bytes(self, number: int) -> int:
        """Bytes that are read for decoder layer `number`."""
        return sum(map(self.targets.stored_bytes, self.walk.layer_weights(number)))

    def matrices(self, number: int) -> Matrices:
        """Matrices of decoder layer `number` that are calibrated, by name of the weight."""
        return matrices_of(self.walk, number, self.targets.steps)

    def modules(self, number: int) -> Mapping[str, str]:
        """Paths of modules, by name of the weight that each has."""
        return {
            name: parameter.removesuffix(".weight")
            for parameter, name in self.walk.plain_weights(number).items()
        }

    def layer_steps(self, number: int) -> Sequence[Rewrite]:
        return [self.targets.steps[name] for name in self.matrices(number)]


@contextmanager
def opened(subject: Subject) -> Iterator[Model]:
    """Raises UnsupportedError, which names it, for a model that cannot be run layer by layer."""
    plan = subject.plan
    skeleton = build_planned(plan, subject.base.index, F32.torch)
    with Targets(plan, _reference(subject)) as targets:
        walk = Walk(skeleton, targets, plan.device)
        _check_all_found(walk, targets.steps)
        _see_experts(walk, targets.steps)
        yield Model(walk, targets)


@contextmanager
def opened_targets(subject: Subject, wanted: Container[str], *, is_equalized: bool = False) -> Iterator[Walk]:
    """The model with all weights its targets, equalized or not; nothing of them is held. Raises what `opened` does.

    `wanted` are weights whose inputs are to be seen.
    """
    plan = subject.plan
    skeleton = build_planned(plan, subject.base.index, F32.torch)
    reference = _reference(subject, is_equalized=is_equalized)
    with WeightSource(reference, plan.device, lambda _: None) as source:
        walk = Walk(skeleton, source, plan.device)
        _see_experts(walk, wanted)
        yield walk


def _check_all_found(walk: Walk, steps: Mapping[str, Rewrite]) -> None:
    found = {name for number in range(len(walk.skeleton.layers)) for name in matrices_of(walk, number, steps)}
    missing = sorted(steps.keys() - found)
    if missing:
        raise UnsupportedError(
            f"{missing[0]} cannot be calibrated: {walk.skeleton.name} has no linear layer in a decoder layer that is "
            "stored as this weight; leave it in 16 bit with --ignore, or leave --calibration out"
        )


def _see_experts(walk: Walk, wanted: Container[str]) -> None:
    """Have the inputs of experts seen, where any of them are `wanted`."""
    layers = range(len(walk.skeleton.layers))
    if any(
        each.expert is not None for number in layers for each in matrices_of(walk, number, wanted).values()
    ):
        take_experts_in_turn(walk.skeleton)


def _reference(subject: Subject, *, is_equalized: bool = True) -> Plan:
    """The plan of an output that holds the targets themselves, in float32."""
    options = replace(
        subject.plan.options,
        quant="none",
        group_size=None,
        dtype=F32.name,
        rounding="auto",
        ignore=(),
        quant_for=(),
        max_shard_bytes=None,
        calibration=None,
    )
    equalizers = subject.plan.equalizers if is_equalized else {}
    return build_plan(subject.base, subject.adapter, options, subject.plan.device, equalizers)
