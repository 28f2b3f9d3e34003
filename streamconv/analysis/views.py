"""The ways to store each adapted weight that are looked at: by target, format and rounding, as merges plan them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.analysis.options import USUAL_MERGE_BASE, AnalysisOptions
from streamconv.analysis.rounded import BYTES_PER_BLOCK
from streamconv.errors import InputError, OptionError, ResourceError
from streamconv.formats.base import group_of
from streamconv.pipeline import Prepared
from streamconv.planning.devices import Device
from streamconv.planning.memory import plan_memory
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Choice, Memory, Plan, Rewrite
from streamconv.planning.planner import build_plan

# The ways to choose codes that need nothing but the weights.
DATA_FREE = ("nearest", "stochastic", "search")
# What the sums of all workers take, stretch by stretch.
_STRETCH_BYTES = 64 * 2**20
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class View:
    """One step that would write a weight. `format` and `rounding` are None where it is stored dense."""

    target: str
    format: str | None
    rounding: str | None
    step: Rewrite

    @property
    def measures_grid(self) -> bool:
        """Whether steps and block maxima are measured here: where the base's own scales stay, if it has any."""
        return self.rounding == "stochastic"

    @property
    def block_bytes(self) -> int:
        """Bytes held for the blocks of its grid."""
        grid = self.step.encoder.grid
        return 0 if grid is None else -(-self.step.rows * self.step.columns // grid.block) * BYTES_PER_BLOCK


@dataclass(frozen=True, slots=True)
class ViewGroup:
    """Views of one weight that are looked at together, in the same reading."""

    views: tuple[View, ...]
    memory: Memory


@dataclass(frozen=True, slots=True)
class AnalyzedWeight:
    """A weight under its name in the result. `layer` is the first number in the name."""

    name: str
    groups: tuple[ViewGroup, ...]

    @property
    def step(self) -> Rewrite:
        return self.groups[0].views[0].step

    @property
    def kind(self) -> str:
        """Name that such weights have in every layer: `q_proj`."""
        return [part for part in self.name.split(".") if part != "weight" and not part.isdigit()][-1]

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """All that an analysis looks at. `targets` says what each is, `auto` what `--rounding auto` chooses by target and
    format.
    """

    subjects: tuple[AnalyzedWeight, ...]
    targets: Mapping[str, Choice]
    auto: Mapping[tuple[str, str], Choice]
    device: Device

    @property
    def memory(self) -> Memory:
        """The most that a weight needs."""
        needs = [group.memory for subject in self.subjects for group in subject.groups]
        return max(needs, key=lambda memory: (memory.ram, memory.vram))


def plan_views(prepared: Prepared, options: AnalysisOptions) -> AnalysisPlan:
    """Every view of every adapted weight, in the order of the checkpoint.

    Raises what planning a merge raises; InputError where nothing is adapted, OptionError where `--layers` names none.
    """
    device = prepared.plan.device
    views: dict[str, list[View]] = {}
    targets: dict[str, Choice] = {}
    auto: dict[tuple[str, str], Choice] = {}
    for merge_base in _merge_bases(prepared, options.merge_base):
        for quant in ("none", *options.formats):
            own = replace(without_budget(options.job.options), quant=quant, merge_base=merge_base)
            asked = replace(own, group_size=_own_group_size(prepared, quant))
            plan = build_plan(prepared.base, prepared.adapter, asked, device)
            target = plan.target.name
            targets[target] = plan.target
            plans: dict[str | None, Plan] = {None: plan}
            if plan.rounding is not None:
                auto[target, quant] = plan.rounding
                plans = {
                    name: build_plan(prepared.base, prepared.adapter, replace(asked, rounding=name), device)
                    for name in DATA_FREE
                }
            for rounding, each in plans.items():
                for step in _adapted(each, quant):
                    view = View(target, None if rounding is None else quant, rounding, step)
                    views.setdefault(step.name, []).append(view)
    wanted = _of_layers(views, options.layers)
    _check_memory([view for of_weight in wanted.values() for view in of_weight], options.job.options, device)
    subjects = tuple(
        AnalyzedWeight(name, tuple(_groups(tuple(of_weight), options.job.options, device)))
        for name, of_weight in wanted.items()
    )
    return AnalysisPlan(subjects, targets, auto, device)


def _own_group_size(prepared: Prepared, quant: str) -> int | None:
    """Group size of a base in the very format, so that its grid is the same; None for any other base."""
    name, size = group_of(prepared.base.quantized or "")
    return size if name == quant else None


def without_budget(options: MergeOptions) -> MergeOptions:
    """`options` of plans that are never carried out: the memory of an analysis is planned by groups of views."""
    return replace(options, max_ram_bytes=sys.maxsize, max_vram_bytes=sys.maxsize)


def layer_of(name: str) -> int | None:
    """The first number in a weight's name, which is that of its layer."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def _merge_bases(prepared: Prepared, merge_base: str) -> tuple[str, ...]:
    """Values of `--merge-base` that updates are added to: F and T where the base is in 16 bit."""
    if prepared.base.quantized:
        return ("original" if merge_base == "auto" else merge_base,)
    if merge_base == "original":
        return ("original",)
    return ("original", USUAL_MERGE_BASE if merge_base == "auto" else merge_base)


def _adapted(plan: Plan, quant: str) -> Iterator[Rewrite]:
    """Steps of weights with an update; of an output in `quant`, those whose weight is quantized."""
    for shard in plan.shards:
        for placed in shard.steps:
            step = placed.step
            if (
                isinstance(step, Rewrite)
                and step.updates
                and (quant == "none" or step.encoder.grid is not None)
            ):
                yield step


def _of_layers(
    views: Mapping[str, Sequence[View]], layers: frozenset[int] | None
) -> Mapping[str, Sequence[View]]:
    if not views:
        raise InputError(
            "the adapter updates no weight, it only replaces some (modules_to_save); there is nothing to analyze"
        )
    found = {name: each for name, each in views.items() if layers is None or layer_of(name) in layers}
    if not found:
        numbers = sorted({layer for name in views if (layer := layer_of(name)) is not None})
        there = f"layers {numbers[0]} to {numbers[-1]}" if numbers else "weights outside of layers only"
        asked = ",".join(map(str, sorted(layers or ())))
        raise OptionError(f"--layers {asked} names no layer that the adapter updates; it updates {there}")
    return found


def _check_memory(views: Sequence[View], options: MergeOptions, device: Device) -> None:
    """Raise ResourceError, with a size that is enough, unless each of `views` fits the memory alone."""
    beside = _STRETCH_BYTES + max(view.block_bytes for view in views)
    plan_memory([view.step for view in views], options, device, beside=beside, watched=True)


def _groups(views: tuple[View, ...], options: MergeOptions, device: Device) -> Iterator[ViewGroup]:
    """`views` of one weight in as few groups as the memory allows: halved until each fits, as each alone does."""
    try:
        yield ViewGroup(views, _memory(views, options, device))
        return
    except ResourceError:
        if len(views) == 1:
            raise
    half = len(views) // 2
    yield from _groups(views[:half], options, device)
    yield from _groups(views[half:], options, device)


def _memory(views: Sequence[View], options: MergeOptions, device: Device) -> Memory:
    first, *others = ([view.step] for view in views)
    beside = _STRETCH_BYTES + sum(view.block_bytes for view in views)
    return plan_memory(first, options, device, 1, others, beside, watched=True)
