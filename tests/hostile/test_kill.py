"""Killed at any call that changes the disk and run again, a merge gives the same bytes, and never half a model."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.commands import Commands, Outcome
from tests.models import Sizes, write_adapter, write_base

# With this budget a tile is 64 KiB, so that even these small weights are read, copied and journaled in parts.
BUDGET = "98MiB"
WATERMARK_BYTES = 50_000
POINTS = 20
FEWER = 4
SIZES = Sizes()

Tree = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """A command without its --out, and the folder that it gives when nobody disturbs it."""

    arguments: tuple[str, ...]
    calls: tuple[str, ...]
    complete: Tree

    def run(
        self,
        commands: Commands,
        out: Path,
        at: int | None = None,
        tears: bool = False,
        since: str | None = None,
    ) -> Outcome:
        return commands.run(
            *self.arguments, "-o", out, at=at, tears=tears, since=since, watermark_bytes=WATERMARK_BYTES
        )


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def command(self, *options: str) -> tuple[str, ...]:
        paths = ("--base", str(self.base), "--adapter", str(self.adapter))
        return ("merge", *paths, "--max-ram", BUDGET, *options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(write_base(folder / "base", SIZES.shapes), write_adapter(folder / "adapter", SIZES.shapes))


@pytest.fixture(scope="module")
def bf16(commands: Commands, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return undisturbed(commands, inputs.command(), tmp_path_factory.mktemp("bf16") / "out")


@pytest.fixture(scope="module")
def nf4(commands: Commands, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Case:
    options = ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "200kB")
    return undisturbed(commands, inputs.command(*options), tmp_path_factory.mktemp("nf4") / "out")


def undisturbed(commands: Commands, arguments: tuple[str, ...], out: Path, shards: int = 3) -> Case:
    done = commands.run(*arguments, "-o", out, watermark_bytes=WATERMARK_BYTES)
    assert done.code == 0, done.text
    assert sum(name.endswith(".safetensors") for name in tree(out)) == shards
    return Case(arguments, done.calls, tree(out))


def tree(folder: Path) -> Tree:
    """SHA-256 by name of everything under `folder`; folders end in a slash."""
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def check_final_names(out: Path, *complete: Tree) -> None:
    """Whatever moment it is: with config.json the folder is one of `complete`, and no shard is a part of one."""
    if not out.exists():
        return
    found = {
        name: sha256
        for name, sha256 in tree(out).items()
        if ".streamconv/" not in name and not (name.startswith(".") and name.endswith(".partial"))
    }
    if "config.json" in found:
        assert found in complete
    for name, sha256 in found.items():
        if name.endswith(".safetensors"):
            assert sha256 in {files.get(name) for files in complete}, f"{name} is not whole"


def spread(count: int, points: int = POINTS) -> Iterable[int]:
    """Numbers of so many calls, from the first to the last that every run has: some runs do with fewer writes."""
    return sorted({1 + place * (count - 1 - FEWER) // (points - 1) for place in range(points)})


@pytest.mark.parametrize("name", ["bf16", "nf4"])
def test_killed_anywhere_and_run_again_the_folder_is_the_same(
    commands: Commands, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    case: Case = request.getfixturevalue(name)
    resumed = 0
    for number, at in enumerate(spread(len(case.calls))):
        out = tmp_path / str(at)
        killed = case.run(commands, out, at, tears=number % 2 == 0)
        assert killed.code == -signal.SIGKILL
        check_final_names(out, case.complete)
        again = case.run(commands, out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        resumed += again.resumed_inside
    assert resumed >= 5, "shards were not continued from their middle"


def test_killed_while_codes_are_held_whole(commands: Commands, inputs: Inputs, tmp_path: Path) -> None:
    command = inputs.command("--quant", "gptq", "--group-size", "32", "--max-shard-size", "400kB")
    case = undisturbed(commands, command, tmp_path / "whole", shards=2)
    resumed = 0
    for number, at in enumerate(spread(len(case.calls), 4)):
        out = tmp_path / str(at)
        assert case.run(commands, out, at, tears=number % 2 == 0).code == -signal.SIGKILL
        check_final_names(out, case.complete)
        again = case.run(commands, out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        resumed += again.resumed_inside
    assert resumed >= 1, "no shard was continued from its middle"


def test_killed_by_the_clock(commands: Commands, bf16: Case, tmp_path: Path) -> None:
    for moment in (0.03, 0.08, 0.13, 0.2):
        out = tmp_path / str(moment)
        commands.run(
            *bf16.arguments, "-o", out, watermark_bytes=WATERMARK_BYTES, kill_after_s=moment, slow_s=0.002
        )
        check_final_names(out, bf16.complete)
        assert bf16.run(commands, out).code == 0
        assert tree(out) == bf16.complete


def test_killed_over_and_over(commands: Commands, nf4: Case, tmp_path: Path) -> None:
    kills = 0
    while (done := nf4.run(commands, tmp_path / "out", at=20 + 5 * kills, tears=True)).code:
        assert done.code == -signal.SIGKILL
        check_final_names(tmp_path / "out", nf4.complete)
        kills += 1
    assert kills > 3
    assert tree(tmp_path / "out") == nf4.complete


@pytest.fixture(scope="module")
def three(commands: Commands, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """In 16 bit, nf4 and int8: of one reading, the more bits, the more watermarks."""
    out = tmp_path_factory.mktemp("three") / "out"
    command = inputs.command("--max-ram", "99MiB", "--also", "nf4-dq", "--also", "int8")
    case = undisturbed(commands, command, out, shards=5)
    for quant in ("nf4-dq", "int8"):
        alone = out.parent / quant
        assert commands.run(*inputs.command("--quant", quant), "-o", alone).code == 0
        assert below(case.complete, quant) == tree(alone)
    return case


def below(files: Tree, folder: str) -> Tree:
    return {
        name.removeprefix(f"{folder}/"): sha256
        for name, sha256 in files.items()
        if name.startswith(f"{folder}/") and name != f"{folder}/"
    }


def test_killed_while_several_outputs_are_made(commands: Commands, three: Case, tmp_path: Path) -> None:
    """Each goes on from where it is, and none is ever half there; the main one is there when all are."""
    resumed = 0
    for number, at in enumerate(spread(len(three.calls), 9)):
        out = tmp_path / str(at)
        assert three.run(commands, out, at, tears=number % 2 == 0).code == -signal.SIGKILL
        check_final_names(out, three.complete)
        for folder in ("nf4-dq", "int8"):
            check_final_names(out / folder, below(three.complete, folder))
        again = three.run(commands, out)
        assert again.code == 0, f"killed at {at}, {three.calls[at - 1]}: {again.text}"
        assert tree(out) == three.complete, f"killed at {at}, {three.calls[at - 1]}"
        resumed += again.resumed_inside
    assert resumed >= 2, "shards were not continued from their middle"


def test_several_outputs_stopped_by_a_signal(commands: Commands, three: Case, tmp_path: Path) -> None:
    stopped = commands.run(
        *three.arguments, "-o", tmp_path / "out", at=60, signal=signal.SIGTERM, slow_s=0.03
    )
    assert stopped.code == 143
    again = three.run(commands, tmp_path / "out")
    assert again.code == 0
    assert {name.split()[0] for name, (header, start) in again.starts.items() if start > header} == {
        "None",
        "nf4-dq",
        "int8",
    }
    assert tree(tmp_path / "out") == three.complete


@pytest.fixture(scope="module")
def old_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes in as many shards of the same sizes, but other values; more shards; files of its own."""
    folder = write_base(tmp_path_factory.mktemp("old") / "model", SIZES.shapes, seed=7)
    (folder / "chat_template.jinja").write_text("of the old model only")
    (folder / "model-00004-of-00004.safetensors").write_bytes(b"left by a still older one")
    (folder / "notes.txt").write_text("the user's own")
    return folder


def test_killed_while_an_older_model_is_replaced(
    commands: Commands, bf16: Case, old_model: Path, tmp_path: Path
) -> None:
    """At every rename and deletion, and some calls more."""
    case = Case(
        (*bf16.arguments, "--overwrite"), (), {**bf16.complete, "notes.txt": tree(old_model)["notes.txt"]}
    )
    shutil.copytree(old_model, tmp_path / "whole")
    whole = case.run(commands, tmp_path / "whole")
    assert whole.code == 0, whole.text
    assert tree(tmp_path / "whole") == case.complete
    publishing = whole.calls.index("unlink config.json")
    published = whole.calls[publishing:]
    changes = ("replace", "unlink", "rmdir")
    points = [(at, None) for at in range(25, publishing - 10, 25)] + [
        (at, published[0]) for at, call in enumerate(published, 1) if at % 25 == 0 or call.startswith(changes)
    ]
    for at, since in points:
        out = tmp_path / f"{at} {since}"
        shutil.copytree(old_model, out)
        assert case.run(commands, out, at, since=since).code == -signal.SIGKILL
        check_final_names(out, case.complete, tree(old_model))
        again = case.run(commands, out)
        assert again.code == 0, f"killed at {at} since {since}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at} since {since}"
        shutil.rmtree(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_keeps_what_is_done(
    commands: Commands, nf4: Case, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The writer is slow, so both queues are full; no watermark is due, so only stopping can have left one."""
    out = tmp_path / "out"
    stopped = commands.run(*nf4.arguments, "-o", out, at=40, signal=number, slow_s=0.03)
    assert stopped.code == code
    assert stopped.seconds < 10
    assert "stopped by a signal; run the same command again to go on" in stopped.text
    check_final_names(out, nf4.complete)
    again = nf4.run(commands, out)
    assert again.code == 0
    assert again.resumed_inside
    assert tree(out) == nf4.complete


def test_a_second_signal_ends_the_run_at_once(commands: Commands, nf4: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = commands.run(*nf4.arguments, "-o", out, at=30, signal=signal.SIGINT, again=True, slow_s=0.03)
    assert stopped.code == 130
    assert not stopped.calls  # it said nothing more
    check_final_names(out, nf4.complete)
    assert nf4.run(commands, out).code == 0
    assert tree(out) == nf4.complete


def test_a_signal_while_publishing_lets_it_finish(commands: Commands, bf16: Case, tmp_path: Path) -> None:
    done = commands.run(
        *bf16.arguments,
        "-o",
        tmp_path / "out",
        at=1,
        since="unlink config.json",
        signal=signal.SIGTERM,
        watermark_bytes=WATERMARK_BYTES,
    )
    assert done.code == 0, done.text
    assert tree(tmp_path / "out") == bf16.complete


@pytest.mark.sweep
@pytest.mark.parametrize("tears", [False, True])
@pytest.mark.parametrize("name", ["bf16", "nf4"])
def test_killed_at_every_call(
    commands: Commands, request: pytest.FixtureRequest, tmp_path: Path, name: str, tears: bool
) -> None:
    case: Case = request.getfixturevalue(name)
    for at in range(1, len(case.calls) + 1):
        out = tmp_path / str(at)
        assert case.run(commands, out, at, tears).code == -signal.SIGKILL
        check_final_names(out, case.complete)
        assert case.run(commands, out).code == 0
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        shutil.rmtree(out)
