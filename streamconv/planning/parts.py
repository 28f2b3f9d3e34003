"""Parts of an output: which of its files each of several workers makes, the same by every worker's own plan."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from streamconv.errors import OptionError


class Sized(Protocol):
    """A file of an output, as far as sharing the work goes: its size in bytes."""

    @property
    def size(self) -> int: ...


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, slots=True)
class Part:
    """Part number `number`, from 1 to `count`, of the work on one output."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    @property
    def folder(self) -> str:
        """Name of its folder in the work folder of the whole."""
        return f"part-{self.number}-of-{self.count}"


def parse_part(text: str) -> Part:
    """The part that K/N names. Raises OptionError for what is none."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return Part(int(number), int(count))
    raise OptionError(
        f"--part {text} is none; give K/N with K from 1 to N, such as 1/4 for the first of four workers, or auto where "
        "torchrun, Slurm, SkyPilot or Kubernetes has started them"
    )


def shares(shards: Sequence[S], count: int) -> list[list[S]]:
    """The shards of each of `count` parts, in their order: the largest first, each to the part with the fewest bytes.

    No part has more than the mean and one shard's bytes; where there are fewer shards than parts, some have none.
    """
    loads = [(0, part) for part in range(count)]
    found: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(shards)), key=lambda place: (-shards[place].size, place)):
        load, part = heapq.heappop(loads)
        found[part].append(place)
        heapq.heappush(loads, (load + shards[place].size, part))
    return [[shards[place] for place in sorted(places)] for places in found]


def share(shards: Sequence[S], part: Part | None) -> list[S]:
    """The shards that a part makes; all of them where there are no parts."""
    return list(shards) if part is None else shares(shards, part.count)[part.number - 1]


def check_parts(part: Part | None, shards: Sequence[Sized]) -> None:
    """Raise OptionError where the output is one file, which one process writes from its beginning to its end."""
    if part is not None and len(shards) == 1:
        raise OptionError(
            f"the output is one file, and {part} would be all of it or nothing, as a file is written by one process; "
            "leave --part out, or give a --max-shard-size that makes several files of it"
        )
