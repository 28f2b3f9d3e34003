"""A subject opened to be walked: its float32 targets, its layers, and which weights of them are calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from streamconv.calibration.groups import Linears
from streamconv.calibration.subject import Subject
from streamconv.calibration.targets import Targets
from streamconv.dtypes import F32
from streamconv.forward.skeleton import build_skeleton
from streamconv.forward.walk import Walk
from streamconv.plan import Plan, Rewrite
from streamconv.planner import build_plan
from streamconv.sidecars import edit_config


@dataclass(frozen=True, slots=True)
class Model:
    """`steps` are those of weights that are linear layers of decoder layers."""

    walk: Walk
    targets: Targets
    steps: Mapping[str, Rewrite]

    def linears(self, number: int) -> Linears:
        """Linear layers of decoder layer `number` that are calibrated, by name of the weight."""
        return _linears(self.walk, number, self.targets.steps)

    def layer_steps(self, number: int) -> Sequence[Rewrite]:
        return [self.steps[name] for name in self.linears(number)]

    @property
    def widest(self) -> Rewrite | None:
        """The calibrated weight with the most inputs."""
        return max(self.steps.values(), key=lambda step: step.columns, default=None)


@contextmanager
def opened(subject: Subject) -> Iterator[Model]:
    """Raises UnsupportedError, which names it, for a model that cannot be run layer by layer."""
    plan = subject.plan
    config = edit_config(
        subject.base.index.config,
        dtype=F32.name,
        quantization=None,
        untie=plan.untied,
        vocab_size=plan.vocab_size,
    )
    skeleton = build_skeleton(config, subject.base.index.storage.location, F32.torch)
    with Targets(plan, subject.steps, _reference(subject)) as targets:
        walk = Walk(skeleton, targets, plan.device)
        numbers = range(len(skeleton.layers))
        names = {name for number in numbers for name in _linears(walk, number, targets.steps)}
        yield Model(walk, targets, {name: step for name, step in targets.steps.items() if name in names})


def _reference(subject: Subject) -> Plan:
    """The plan of an output that holds the targets themselves, in float32."""
    options = replace(
        subject.plan.options,
        quant="none",
        dtype=F32.name,
        rounding="auto",
        ignore=(),
        max_shard_bytes=None,
        calibration=None,
    )
    return build_plan(subject.base, subject.adapter, options, subject.plan.device)


def _linears(walk: Walk, number: int, wanted: Mapping[str, Rewrite]) -> Linears:
    found = {}
    for parameter, name in walk.plain_weights(number).items():
        path, _, last = parameter.rpartition(".")
        module = walk.skeleton.module(path)
        if name in wanted and last == "weight" and isinstance(module, nn.Linear):
            found[name] = module
    return found
