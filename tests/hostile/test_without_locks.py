"""Two commands in one folder whose locks hold nobody off: no mixture of theirs that ends well, or that a loader takes.

Each run is stopped before one of its calls that change the disk, the other then goes as far as it can or is stopped as
well; so the moments at which one takes over from the other are chosen, not left to chance.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.commands import Commands, Outcome, fork_server
from tests.hostile.test_kill import Tree, tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)
WORK = ".streamconv"


@dataclass(frozen=True)
class Pair:
    """Two commands for one folder, and what either gives alone."""

    commands: Commands
    first: tuple[str, ...]
    second: tuple[str, ...]
    alone: tuple[Tree, Tree]
    calls: tuple[tuple[str, ...], tuple[str, ...]]


@pytest.fixture(scope="module")
def unlocked() -> Iterator[Commands]:
    with fork_server("tests.hostile.no_locks") as server:
        yield server


@pytest.fixture(scope="module")
def pair(unlocked: Commands, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base = write_base(folder / "base", SIZES.shapes, shards=3)
    commands, trees, calls = [], [], []
    for seed in (1, 2):
        adapter = write_adapter(folder / f"adapter{seed}", SIZES.shapes, seed=seed)
        commands.append(("merge", "--base", str(base), "--adapter", str(adapter)))
        done = unlocked.run(*commands[-1], "-o", folder / str(seed), watermark_bytes=1000)
        assert done.code == 0, done.text
        trees.append(tree(folder / str(seed)))
        calls.append(done.calls)
    return Pair(unlocked, commands[0], commands[1], (trees[0], trees[1]), (calls[0], calls[1]))


def models(out: Path) -> Tree:
    """What a loader would take: nothing where there is no config.json."""
    found = {name: sha256 for name, sha256 in tree(out).items() if not name.startswith(WORK)}
    return found if "config.json" in found else {}


def check(pair: Pair, out: Path, *outcomes: Outcome) -> None:
    codes = [each.code for each in outcomes]
    texts = "\n".join(each.text for each in outcomes)
    assert set(codes) <= {0, 4}, texts
    assert models(out) in ({}, *pair.alone), f"a mixture, {codes}: {texts}"
    if 0 in codes:
        assert models(out) in pair.alone, f"a model that was told of is not there, {codes}: {texts}"


OPTIONS = ((), ("--no-resume",), ("--overwrite",), ("--no-resume", "--overwrite"))


@pytest.mark.parametrize("number", range(24))
def test_two_commands_never_mix(pair: Pair, tmp_path: Path, number: int) -> None:
    """The first is stopped at some call, the second at another; both go on, in either order."""
    chance = random.Random(number)
    out, commands = tmp_path / "out", pair.commands
    options = OPTIONS[number % len(OPTIONS)]
    at = chance.randint(1, len(pair.calls[0])), chance.randint(1, len(pair.calls[1]) + 10)
    first = commands.run(*pair.first, "-o", out, at=at[0], signal=signal.SIGSTOP, watermark_bytes=1000)
    assert first.code == -signal.SIGSTOP
    second = commands.run(
        *pair.second, "-o", out, *options, at=at[1], signal=signal.SIGSTOP, watermark_bytes=1000
    )
    order = [first] + [second] * (second.code == -signal.SIGSTOP)
    chance.shuffle(order)
    ended = [commands.run(goes_on=each.process) for each in order]
    check(pair, out, *ended, *([] if second in order else [second]))
    # And whatever is left, the same command brings it to its end.
    for command, whole in ((pair.first, pair.alone[0]), (pair.second, pair.alone[1])):
        again = commands.run(*command, "-o", out, "--no-resume", "--overwrite", watermark_bytes=1000)
        assert again.code == 0, again.text
        assert tree(out) == whole


@pytest.mark.parametrize("number", range(6))
def test_the_same_command_twice_gives_what_it_gives_once(pair: Pair, tmp_path: Path, number: int) -> None:
    chance = random.Random(number)
    out, commands = tmp_path / "out", pair.commands
    at = chance.randint(1, len(pair.calls[0]))
    first = commands.run(*pair.first, "-o", out, at=at, signal=signal.SIGSTOP, watermark_bytes=1000)
    second = commands.run(*pair.first, "-o", out, watermark_bytes=1000)
    check(pair, out, commands.run(goes_on=first.process), second)
    again = commands.run(*pair.first, "-o", out, watermark_bytes=1000)
    assert again.code == 0, again.text
    assert tree(out) == pair.alone[0]


def test_a_run_that_was_taken_over_from_says_who_did(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pair.commands.run(*pair.first, "-o", out, at=17, signal=signal.SIGSTOP, watermark_bytes=10**9)
    second = pair.commands.run(*pair.second, "-o", out, "--no-resume", at=30, signal=signal.SIGSTOP)
    assert second.code == -signal.SIGSTOP, second.text
    before = tree(out)
    told = pair.commands.run(goes_on=first.process)
    assert told.code == 4
    assert f"another run (process {second.process} on " in told.text
    assert "wait for it, or choose another --out" in told.text
    assert tree(out) == before
    assert pair.commands.run(goes_on=second.process).code == 0
    assert tree(out) == pair.alone[1]


@pytest.mark.parametrize("number", range(12))
def test_parts_and_a_run_of_the_whole_never_mix(pair: Pair, tmp_path: Path, number: int) -> None:
    """Workers of a part, and whoever takes over from them, are stopped at some call and go on in either order."""
    chance = random.Random(number)
    out, commands = tmp_path / "out", pair.commands
    options = (("--part", "1/2"), ("--part", "2/2"), ("--part", "1/2"), (), ("--part", "1/3"))
    stopped, ended = list[Outcome](), list[Outcome]()
    for each in chance.sample(options, 3):
        at = chance.randint(1, len(pair.calls[0]))
        made = commands.run(*pair.first, "-o", out, *each, at=at, signal=signal.SIGSTOP, watermark_bytes=1000)
        (stopped if made.code == -signal.SIGSTOP else ended).append(made)
    chance.shuffle(stopped)
    ended += [commands.run(goes_on=each.process) for each in stopped]
    codes, texts = {each.code for each in ended}, "\n".join(each.text for each in ended)
    assert codes <= {0, 4}, texts
    assert models(out) in ({}, pair.alone[0]), f"a mixture: {texts}"
    again = commands.run(*pair.first, "-o", out, watermark_bytes=1000)
    assert again.code == 0, again.text
    assert tree(out) == pair.alone[0]
