"""Inputs that change while a run is at work: found, or without effect; put back, the same command ends as ever."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from tests.hostile.commands import Commands
from tests.hostile.test_kill import Tree, check_final_names, tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=72, layers=2, vocabulary=90)
PUBLISHING = "unlink config.json"


@dataclass(frozen=True)
class Inputs:
    """A command without its --out, its inputs, and what it gives when nobody disturbs it."""

    folder: Path
    arguments: tuple[str, ...]
    complete: Tree


@pytest.fixture(scope="module")
def inputs(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = write_base(folder / "base", SIZES.shapes, shards=2)
    adapter = write_adapter(folder / "adapter", SIZES.shapes)
    arguments = ("merge", "--base", str(base), "--adapter", str(adapter))
    done = commands.run(*arguments, "-o", folder / "out")
    assert done.code == 0, done.text
    return Inputs(folder, arguments, tree(folder / "out"))


def change_a_byte(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    return bytes(content)


def replace(path: Path) -> None:
    """Another file of the same size and time, as `cp -p` and rsync put in place."""
    found, other = path.stat(), path.with_name("other")
    other.write_bytes(change_a_byte(path))
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


def edit(path: Path) -> None:
    """A byte in the same file, and its time set back."""
    found, changed = path.stat(), change_a_byte(path)
    with path.open("r+b") as file:
        file.write(changed)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: Mapping[str, Callable[[Path], object]] = {
    "replaced": replace,
    "edited": edit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "touched": os.utime,
    "removed": Path.unlink,
    "a pipe": pipe,
}
FILES = (
    "base/model-00001-of-00002.safetensors",
    "base/model-00002-of-00002.safetensors",
    "base/model.safetensors.index.json",
    "base/config.json",
    "base/tokenizer.json",
    "base/generation_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)
MOMENTS: Mapping[str, Mapping[str, object]] = {
    "first": {"at": 1},
    "shards": {"at": 15},
    "publishing": {"at": 1, "since": PUBLISHING},
    "late": {"at": 12, "since": PUBLISHING},
}
SHORT = [
    ("base/model-00001-of-00002.safetensors", "replaced", "shards"),
    ("base/model-00002-of-00002.safetensors", "replaced", "first"),
    ("base/model-00002-of-00002.safetensors", "edited", "shards"),
    ("base/model-00002-of-00002.safetensors", "truncated", "shards"),
    ("adapter/adapter_model.safetensors", "replaced", "first"),
    ("adapter/adapter_model.safetensors", "edited", "shards"),
    ("adapter/adapter_config.json", "replaced", "shards"),
    ("base/config.json", "edited", "shards"),
    ("base/config.json", "removed", "publishing"),
    ("base/tokenizer.json", "replaced", "shards"),
    ("base/tokenizer.json", "edited", "publishing"),
    ("base/generation_config.json", "a pipe", "shards"),
]


@pytest.fixture
def put_back(inputs: Inputs, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Makes the inputs what they were, their times included; so it is at the end."""
    names, kept = ("base", "adapter"), tmp_path / "kept"
    for name in names:
        shutil.copytree(inputs.folder / name, kept / name)

    def again() -> None:
        for name in names:
            shutil.rmtree(inputs.folder / name)
            shutil.copytree(kept / name, inputs.folder / name)

    yield again
    again()


def check_change(
    commands: Commands, inputs: Inputs, put_back: Callable[[], None], out: Path, given: Sequence[str]
) -> None:
    file, change, moment = given
    stopped = commands.run(*inputs.arguments, "-o", out, signal=signal.SIGSTOP, **MOMENTS[moment])
    assert stopped.code == -signal.SIGSTOP, stopped.text
    CHANGES[change](inputs.folder / file)
    ended = commands.run(goes_on=stopped.process)
    check_final_names(out, inputs.complete)
    if ended.code:
        assert ended.code == 3, f"{given}: {ended.text}"
        assert Path(file).name in ended.text, f"{given}: {ended.text}"
    else:
        assert tree(out) == inputs.complete, given
    put_back()
    again = commands.run(*inputs.arguments, "-o", out)
    assert again.code == 0, f"{given}: {again.text}"
    assert tree(out) == inputs.complete, given


@pytest.mark.parametrize("given", SHORT, ids=" ".join)
def test_an_input_that_changes_is_found_or_has_no_effect(
    commands: Commands,
    inputs: Inputs,
    put_back: Callable[[], None],
    tmp_path: Path,
    given: tuple[str, str, str],
) -> None:
    check_change(commands, inputs, put_back, tmp_path / "out", given)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_any_input_that_changes_at_any_moment(
    commands: Commands, inputs: Inputs, put_back: Callable[[], None], tmp_path: Path
) -> None:
    for given in product(FILES, CHANGES, MOMENTS):
        check_change(commands, inputs, put_back, tmp_path / " ".join(given).replace("/", " "), given)


def test_another_adapter_of_the_same_size_and_time_is_named(
    commands: Commands, inputs: Inputs, put_back: Callable[[], None], tmp_path: Path
) -> None:
    """After planning: nothing is made of another adapter than the manifest says."""
    del put_back
    stopped = commands.run(*inputs.arguments, "-o", tmp_path / "out", at=1, signal=signal.SIGSTOP)
    replace(inputs.folder / "adapter/adapter_model.safetensors")
    ended = commands.run(goes_on=stopped.process)
    assert ended.code == 3
    assert "adapter_model.safetensors was written to or replaced while it was in use" in ended.text


def test_a_lock_of_a_run_that_is_dead_locks_nothing(
    commands: Commands, inputs: Inputs, tmp_path: Path
) -> None:
    """Stopped it holds the folder; killed, the same command goes on, and another is told whose work is there."""
    out = tmp_path / "out"
    first = commands.run(
        *inputs.arguments, "-o", out, signal=signal.SIGSTOP, at=1, since="fsync journal.jsonl"
    )
    assert "is in use by another run" in commands.run(*inputs.arguments, "-o", out).text
    os.kill(first.process, signal.SIGKILL)
    assert commands.run(goes_on=first.process).code == -signal.SIGKILL
    assert (out / ".streamconv" / "lock").exists()
    other = commands.run(*inputs.arguments, "--quant", "nf4", "-o", out)
    assert other.code == 4
    assert "in use" not in other.text
    assert commands.run(*inputs.arguments, "-o", out).code == 0
    assert tree(out) == inputs.complete
