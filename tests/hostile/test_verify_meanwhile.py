"""`verify` and `push` while a run publishes into the same folder: nothing half old, half new is ever passed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import streamconv
from streamconv.errors import OutputError, StreamconvError
from streamconv.output.journal import Journal, lock_holder
from streamconv.progress import OnProgress
from tests.hostile.commands import Commands
from tests.hostile.test_kill import tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=32, inner=40, layers=2, vocabulary=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and two outputs whose files have the same names and sizes."""
    folder = tmp_path_factory.mktemp("meanwhile")
    write_base(folder / "base", SIZES.shapes)
    for name, seed in (("old", 1), ("new", 2)):
        write_adapter(folder / f"{name}-adapter", SIZES.shapes, seed=seed)
        streamconv.merge(folder / "base", folder / f"{name}-adapter", folder / name)
    return folder


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "old", tmp_path / "out"))


def replacing(folder: Path, out: Path) -> tuple[str, ...]:
    options = ("--base", folder / "base", "--adapter", folder / "new-adapter", "-o", out, "--overwrite")
    return ("merge", *map(str, options))


@pytest.mark.parametrize(
    "since",
    ["unlink config.json", "replace model-00002-of-00003.safetensors", "replace .streamconv.json.partial"],
)
def test_a_run_that_is_at_work_is_told(commands: Commands, folder: Path, out: Path, since: str) -> None:
    """And is not disturbed by those who look."""
    first = commands.run(*replacing(folder, out), at=1, since=since, signal=signal.SIGSTOP)
    assert first.code == -signal.SIGSTOP
    for command in (("verify", str(out)), ("push", str(out), "me/out")):
        looked = commands.run(*command)
        assert looked.code == 4, looked.text
        assert f"{out} is being written by another run (process {first.process} on " in looked.text
    assert commands.run(goes_on=first.process).code == 0
    assert commands.run("verify", out).code == 0
    assert tree(out) == tree(folder / "new")


def test_what_an_interrupted_run_left_passes_only_if_it_is_whole(
    commands: Commands, folder: Path, out: Path
) -> None:
    """At every fourth call of a publication that replaces a model, and the last."""
    calls = commands.run(*replacing(folder, shutil.copytree(out, out.with_name("other")))).calls
    start = calls.index("unlink config.json")
    codes = []
    count = len(calls) - start
    for number in (*range(1, count, 4), count):
        here = Path(shutil.copytree(folder / "old", out.with_name(f"out-{number}")))
        killed = commands.run(*replacing(folder, here), at=number, since="unlink config.json")
        assert killed.code == -signal.SIGKILL
        looked = commands.run("verify", here)
        codes.append(looked.code)
        visible = {name: content for name, content in tree(here).items() if not name.startswith(".")}
        is_whole = any(visible == tree(folder / name) for name in ("old", "new"))
        assert looked.code == (0 if is_whole else 4), looked.text
        assert is_whole or "give its command again" in looked.text
    assert set(codes) == {0, 4}


def test_whoever_looks_holds_up_nobody(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the lock takes it for an instant."""
    (out / ".streamconv").mkdir()
    lock = os.open(out / ".streamconv" / "lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: os.close(lock))
    with Journal(out, {}, resume=True):
        assert lock_holder(out) == f"process {os.getpid()} on {socket.gethostname()}"
    assert lock_holder(out) is None


def replace(new: Path, out: Path, name: str) -> None:
    shutil.copyfile(new / name, out / f".{name}")
    (out / f".{name}").replace(out / name)


def replace_all(new: Path, out: Path) -> None:
    for path in sorted(new.iterdir()):
        replace(new, out, path.name)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "a shard": lambda new, out: replace(new, out, "model-00001-of-00003.safetensors"),
    "the last shard": lambda new, out: replace(new, out, "model-00003-of-00003.safetensors"),
    "all": replace_all,
    "config.json, by the same": lambda new, out: os.utime(out / "config.json"),
    "the tokenizer, which goes": lambda new, out: (out / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_files_that_are_replaced_meanwhile_are_never_passed(
    folder: Path, out: Path, change: str, at: int
) -> None:
    """Without a lock, too, such as by `mv` or from another host."""
    with pytest.raises(OutputError, match=r"was changed while the output was verified; verify it again"):
        streamconv.verify(out, on_progress=after(at, lambda: CHANGES[change](folder / "new", out)))
    code = 0
    try:
        streamconv.verify(out)
    except StreamconvError as error:
        code = error.exit_code
    assert code == (0 if change in ("all", "config.json, by the same") else 7)


def after(count: int, act: Callable[[], object]) -> OnProgress:
    """Progress whose watcher does something when it was told so often."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if told == count:
            act()
        told += 1

    return tell
