"""Judgement of a run with a fault: exit code, text and files, and the run after it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.fault_calls import KILL, Fault, allowed

# SHA-256 by name of file; folders end in a slash and have none.
Tree = Mapping[str, str]
WORK = ".streamconv/"
LLVM = "LLVM ends a process that gets no memory for compiled code by itself (abort); the next run goes on"
OPENMP = "OpenMP's library ends a process that gets no thread by itself, with a line of its own; the next run goes on"
LEFT = (
    "a refused unlink or rmdir leaves an empty .streamconv beside a complete output; the next run removes it"
)
HANG = None


@dataclass(frozen=True, slots=True)
class Ended:
    """An ended command: exit code, or minus the signal that killed it, or None if it had to be killed; what it said.

    `hits` are the calls that failed, as lines of strace.
    """

    code: int | None
    text: str
    seconds: float
    hits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """Trees that may stand in an output folder: `complete` of the command, `old` from before it."""

    complete: Tree
    old: Tree | None = None
    outputs: tuple[str, ...] = ("",)


def tree(folder: Path) -> Tree:
    """Everything under `folder`; nothing if there is no folder."""
    return {
        path.relative_to(folder).as_posix() + "/" * path.is_dir(): ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def visible(files: Tree) -> Tree:
    """What a user sees: without work folders, and files that are being written."""
    return {
        name: sha256
        for name, sha256 in files.items()
        if WORK not in name
        and not (Path(name).name.startswith(".") and name.rstrip("/").endswith(".partial"))
    }


def below(files: Tree, folder: str, others: Collection[str]) -> Tree:
    """Files of the output in `folder` ("" for the main one), without those of `others`."""
    inside = {
        name.removeprefix(f"{folder}/") if folder else name: sha256
        for name, sha256 in files.items()
        if not folder or (name.startswith(f"{folder}/") and name != f"{folder}/")
    }
    return {
        name: sha256
        for name, sha256 in inside.items()
        if not any(each and each != folder and name.startswith(f"{each}/") for each in others)
    }


def wrong_files(found: Tree, made: Made) -> list[str]:
    """Wrong bytes under final names: a model with a config.json is one of the whole ones, a shard is never a part."""
    problems = []
    for folder in made.outputs:
        seen = below(visible(found), folder, made.outputs)
        whole = [below(visible(made.complete), folder, made.outputs)]
        whole += [] if made.old is None else [below(visible(made.old), folder, made.outputs)]
        if "config.json" in seen and seen not in whole:
            problems.append(f"wrong files: {_difference(seen, whole[0])}")
        for name, sha256 in seen.items():
            if name.endswith(".safetensors") and sha256 not in {files.get(name) for files in whole}:
                problems.append(f"wrong bytes: {name}")
    return problems


def is_complete(found: Tree, made: Made) -> bool:
    """Whether the output is that of an undisturbed run; an empty work folder may be left, as after a refused rmdir."""
    return {name: sha256 for name, sha256 in found.items() if not name.endswith(WORK)} == made.complete


def accepted(ended: Ended, found: Tree, made: Made) -> str:
    """Why an end that is not as it should be is accepted; nothing if it need not be."""
    if ended.code == -6 and "LLVM ERROR" in ended.text:
        return LLVM
    if ended.code == 1 and "libgomp: " in ended.text:
        return OPENMP
    return LEFT if ended.code == 0 and found != made.complete and is_complete(found, made) else ""


def judge(fault: Fault, ended: Ended, found: Tree, made: Made, roles: Sequence[str]) -> list[str]:
    """Problems of the run with the fault, each in a few words; none if it is right. `roles` are those of the hits."""
    problems = wrong_files(found, made)
    if ended.code is HANG:
        return [*problems, "hang"]
    if accepted(ended, found, made):
        return problems
    if "Traceback (most recent call last)" in ended.text:
        problems.append("traceback")
    if ended.code == 0 and not is_complete(found, made):
        problems.append(f"wrong success: {_difference(found, made.complete)}")
    right = allowed(fault, roles)
    if ended.code not in right:
        problems.append(f"exit {ended.code}, not {' or '.join(map(str, sorted(right)))}")
    if ended.code not in (0, -9) and "Error" not in ended.text and "terminal" not in roles:
        problems.append("no word")
    return problems


def judge_again(again: Ended, found: Tree, made: Made) -> list[str]:
    """Problems of the same command without a fault, after it."""
    if again.code != 0:
        return [f"again: {'hang' if again.code is HANG else f'exit {again.code}'}"]
    if found != made.complete and not (is_complete(found, made) and WORK not in made.complete):
        return [f"again: {_difference(found, made.complete)}"]
    return ["again: an empty work folder is left"] if found != made.complete else []


def was_hit(fault: Fault, ended: Ended) -> bool:
    return bool(ended.hits) or (fault.error == KILL and ended.code == -9)


def _difference(found: Tree, wanted: Tree) -> str:
    missing = [f"-{name}" for name in wanted.keys() - found.keys()]
    more = [f"+{name}" for name in found.keys() - wanted.keys()]
    other = [f"~{name}" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    return " ".join(sorted(missing + more + other)[:8])
