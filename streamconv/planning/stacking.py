"""Steps of experts that an output stores stacked (`formats/stacks.py`), in the order of their tensors.

All main parts come first, in turn, then all scales, then all biases: each expert is a step of its own, whose side parts
wait in memory for their place. So a stack is never held whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from streamconv.checkpoint.layout import joined
from streamconv.checkpoint.types import TensorSpec
from streamconv.errors import CheckpointError, OptionError
from streamconv.formats.stacks import stacked_expert
from streamconv.planning.plan import Copy, Rewrite, SideParts, Step


@dataclass(frozen=True, slots=True)
class _Member:
    """An expert's weight in a stack: its number, its steps, and the parts that they write."""

    name: str
    expert: int
    steps: tuple[Step, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for step in self.steps for spec in step.specs)


def stacked_steps(by_weight: Mapping[str, Sequence[Step]]) -> list[list[Step]]:
    """Steps by weight, those of stacked experts joined to one list for each stack, where its first expert was.

    Raises CheckpointError where experts are missing or differ in shape, OptionError where they differ in format.
    """
    stacks: dict[str, list[_Member]] = defaultdict(list)
    for name, steps in by_weight.items():
        if (stack := _stack_of(name, steps)) is not None:
            stacks[stack.name].append(replace(stack, name=name))
    found: list[list[Step]] = []
    for name, steps in by_weight.items():
        stack = _stack_of(name, steps)
        if stack is None:
            found.append(list(steps))
        elif members := stacks.pop(stack.name, None):
            found.append(list(_steps_of(stack.name, sorted(members, key=lambda member: member.expert))))
    return found


def _stack_of(name: str, steps: Sequence[Step]) -> _Member | None:
    """A member that is called as its stack; None for a weight in none."""
    place = stacked_expert(name)
    if place is None or not steps or not steps[0].specs[0].name.startswith(f"{place.stack}."):
        return None
    return _Member(place.stack, place.expert, tuple(steps))


def _steps_of(stack: str, members: Sequence[_Member]) -> Iterator[Step]:
    _check_alike(stack, members)
    count = len(members[0].specs)
    for number in range(count):
        for is_rewritten, run in groupby(members, key=lambda member: isinstance(member.steps[0], Rewrite)):
            group = list(run)
            if not is_rewritten:
                yield from _copies(member.steps[number] for member in group)
            elif number == 0:
                for member in group:
                    main = member.steps[0]
                    assert isinstance(main, Rewrite)
                    yield replace(main, waits=count > 1)
            else:
                spec = joined([member.specs[number] for member in group])
                yield SideParts(spec.name, tuple(member.name for member in group), number - 1, spec)


def _copies(steps: Iterable[Step]) -> Iterator[Step]:
    """Copies of experts' shares, as one where they follow each other in their file as well."""
    last: Copy | None = None
    for step in steps:
        assert isinstance(step, Copy)
        if last is not None and _goes_on(last, step):
            count, *shape = last.tensor.shape
            last = replace(last, tensor=replace(last.tensor, shape=(count + step.tensor.shape[0], *shape)))
            continue
        if last is not None:
            yield last
        last = step
    if last is not None:
        yield last


def _goes_on(step: Copy, following: Copy) -> bool:
    one, other = step.tensor, following.tensor
    is_plain = step.spec is None and following.spec is None
    return is_plain and one.file == other.file and one.offset + one.nbytes == other.offset


def _check_alike(stack: str, members: Sequence[_Member]) -> None:
    numbers = [member.expert for member in members]
    if numbers != list(range(len(members))):
        missing = min({*range(len(members))} - {*numbers})
        raise CheckpointError(
            f"{stack}: expert {missing} is missing, which would be in one tensor with {len(members)} others; the "
            "checkpoint is incomplete, download it again"
        )
    first = members[0]
    other = next((member for member in members if member.specs != first.specs), None)
    if other is None:
        return
    shapes = [[list(spec.shape) for spec in each.specs] for each in (first, other)]
    if shapes[0] == shapes[1]:
        types = [each.specs[-1].dtype for each in (first, other)]
        raise OptionError(
            f"{first.name} is of {types[0]} and {other.name} of {types[1]}, and {stack} has all experts in one tensor; "
            "choose a type with --dtype"
        )
    raise OptionError(
        f"{first.name} would have parts of shapes {shapes[0]} and {other.name} {shapes[1]}, and {stack} has all experts"
        " in one tensor, so that they need one shape and one format: let --quant-for name all or none"
    )
