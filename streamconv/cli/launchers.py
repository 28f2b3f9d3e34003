"""Number of this worker and of all, as a launcher has set them in the environment of each process that it starts.

Read only where it is asked for, by `--part auto`: a plain merge inside somebody's job makes all of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamconv.errors import OptionError
from streamconv.planning.parts import Part, parse_part

_AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Rank:
    """Number of a worker, from 0, and of all workers; `count` is None where the launcher does not say it."""

    launcher: str
    number: int
    count: int | None


def named_part(text: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The part that `--part` names, as K/N: given so, or by auto or auto/N. Raises OptionError.

    That is where it cannot be meant, or launchers do not say one thing.
    """
    word, slash, count = (text or "").partition("/")
    if word.lower() != _AUTO:
        return text
    given = parse_part(f"1/{count}").count if slash else None
    part = _part_of(_settled(find_ranks(environment)), given)
    return f"{part.number}/{part.count}"


def find_ranks(environment: Mapping[str, str]) -> list[Rank]:
    """Ranks that the launchers in an environment give this process. Raises OptionError for numbers that are none."""
    found = [find(environment) for find in _LAUNCHERS]
    return [rank for rank in found if rank is not None]


def _settled(ranks: list[Rank]) -> Rank:
    """The one rank that all launchers give, or that of torchrun, which others start. Raises OptionError."""
    if not ranks:
        raise OptionError(
            "--part auto finds no launcher: neither RANK and WORLD_SIZE (torchrun), a task of srun or a Slurm array, "
            "SKYPILOT_NODE_RANK and SKYPILOT_NUM_NODES, nor JOB_COMPLETION_INDEX (Kubernetes) are set; give K/N, or "
            "leave --part out to make all"
        )
    inner = [rank for rank in ranks if rank.launcher == "torchrun"]
    if inner:
        return inner[0]
    # One that has started this process alone, such as an array of one task, is not what the work is shared by.
    ranks = [rank for rank in ranks if rank.count != 1] or ranks
    if len({(rank.number, rank.count) for rank in ranks}) > 1:
        said = "; ".join(map(_said, ranks))
        raise OptionError(f"--part auto is ambiguous here ({said}); give the part that is meant as K/N")
    return ranks[0]


def _part_of(rank: Rank, count: int | None) -> Part:
    """The part of a rank, of `count` where that is given. Raises OptionError where they do not fit."""
    if rank.count is None and count is None:
        raise OptionError(
            f"--part auto: {rank.launcher} says that this is worker {rank.number + 1}, and not of how many; give "
            "--part auto/N with the number of completions of the job"
        )
    if None not in (rank.count, count) and rank.count != count:
        raise OptionError(f"--part auto/{count}: {_said(rank)}; make both the same, or leave /{count} out")
    total = rank.count or count or 0
    if not 0 <= rank.number < total:
        raise OptionError(f"--part auto: {rank.launcher} says worker {rank.number + 1} of {total}; give K/N")
    return Part(rank.number + 1, total)


def _said(rank: Rank) -> str:
    count = "" if rank.count is None else f" of {rank.count}"
    return f"{rank.launcher} says worker {rank.number + 1}{count}"


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise OptionError(
            f"--part auto: {name} is {environment[name]!r}, no whole number; give K/N"
        ) from None


def _by_names(launcher: str, number: str, count: str) -> Callable[[Mapping[str, str]], Rank | None]:
    """A launcher that sets two variables, the number from 0."""

    def find(environment: Mapping[str, str]) -> Rank | None:
        if number not in environment or count not in environment:
            return None
        return Rank(launcher, _number(environment, number), _number(environment, count))

    return find


def _torch(environment: Mapping[str, str]) -> Rank | None:
    """RANK and WORLD_SIZE, which scripts set by hand as well: torchrun itself alone says that it is the innermost."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE"
    return _by_names(launcher, "RANK", "WORLD_SIZE")(environment)


def _task(environment: Mapping[str, str]) -> Rank | None:
    """A task of srun. In a batch script itself SLURM_PROCID is 0 whatever the number of tasks, and no step is named."""
    return _by_names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")(environment)


def _array_task(environment: Mapping[str, str]) -> Rank | None:
    """A task of a Slurm array, whose numbers need not begin at 0, but must have one distance."""
    if "SLURM_ARRAY_TASK_ID" not in environment or "SLURM_ARRAY_TASK_COUNT" not in environment:
        return None
    task, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
    first, last = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX"))
    step = (last - first) // max(count - 1, 1) or 1
    if first + step * (count - 1) != last or (task - first) % step:
        raise OptionError(
            f"--part auto: the tasks of this Slurm array are {count} from {first} to {last} with gaps, so it is not "
            "known which part is whose; use an array such as 0-7, or give K/N"
        )
    return Rank("the Slurm array", (task - first) // step, count)


# The innermost first.
_LAUNCHERS = (
    _torch,
    _task,
    _array_task,
    _by_names("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    lambda environment: (
        Rank("Kubernetes", _number(environment, "JOB_COMPLETION_INDEX"), None)
        if "JOB_COMPLETION_INDEX" in environment
        else None
    ),
)
