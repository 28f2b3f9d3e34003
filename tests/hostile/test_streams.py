"""Standard streams that are closed, full or read by nobody, and terminals that hang up, decide over no run."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from streamconv.cli.printing import safe_streams
from streamconv.cli.progress import progress
from tests.hostile.commands import Commands
from tests.hostile.test_kill import SIZES, tree
from tests.models import write_adapter, write_base

ALL = ("closed", "full", "gone")


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    base, adapter = (
        write_base(folder / "base", SIZES.shapes),
        write_adapter(folder / "adapter", SIZES.shapes),
    )
    return ("merge", "--base", base, "--adapter", adapter)


@pytest.fixture(scope="module")
def complete(
    commands: Commands, merge: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, str]:
    out = tmp_path_factory.mktemp("complete") / "out"
    assert commands.run(*merge, "-o", out).code == 0
    return tree(out)


@pytest.mark.parametrize(
    "streams",
    [
        *({"2": kind} for kind in ALL),
        *({"1": kind} for kind in ALL),
        {"1": "full", "2": "full"},
        {"0": "closed", "1": "closed", "2": "closed"},
    ],
    ids=str,
)
def test_a_merge_is_made_whatever_becomes_of_what_it_says(
    commands: Commands,
    merge: tuple[str | Path, ...],
    complete: Mapping[str, str],
    tmp_path: Path,
    streams: Mapping[str, str],
) -> None:
    done = commands.run(*merge, "-o", tmp_path / "out", streams=streams)
    assert done.code == 0, done.text
    assert "Traceback" not in done.text
    assert tree(tmp_path / "out") == complete


@pytest.mark.parametrize(("stream", "code"), [("closed", 0), ("full", 5), ("gone", 0)])
def test_a_report_that_a_full_disk_has_cut_off_is_no_success(
    commands: Commands,
    merge: tuple[str | Path, ...],
    complete: Mapping[str, str],
    tmp_path: Path,
    stream: str,
    code: int,
) -> None:
    done = commands.run(*merge, "--json", "-o", tmp_path / "out", streams={"1": stream})
    assert done.code == code, done.text
    assert ("Error: standard output cannot take the result: No space left" in done.text) == bool(code)
    assert tree(tmp_path / "out") == complete


@pytest.mark.parametrize(("stream", "code"), [("closed", 4), ("full", 5), ("gone", 0)])
@pytest.mark.parametrize("arguments", [("formats",), ("formats", "--json"), ("plan",), ("inspect",)], ids=str)
def test_a_command_that_only_shows_something_fails_where_it_cannot(
    commands: Commands, merge: tuple[str | Path, ...], arguments: tuple[str, ...], stream: str, code: int
) -> None:
    given = {"plan": merge[1:], "inspect": merge[2:3]}.get(arguments[0], ())
    done = commands.run(*arguments, *given, streams={"1": stream})
    assert done.code == code, done.text
    assert done.text.count("\n") == bool(code)


@pytest.mark.parametrize("stream", ALL)
def test_an_error_keeps_its_code(commands: Commands, stream: str, tmp_path: Path) -> None:
    for arguments, code in ((("merge", "--nonsense"), 2), (("inspect", tmp_path), 3)):
        assert commands.run(*arguments, streams={"2": stream}).code == code
    assert commands.run("verify", tmp_path, streams={"2": stream}).code == 3


def program(
    *arguments: str, stdout: int | None = None, stderr: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, which has streams to flush at its end."""
    command = [sys.executable, "-m", "streamconv", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    outputs = [subprocess.PIPE if each is None else each for each in (stdout, stderr)]
    return subprocess.run(
        command,
        stdout=outputs[0],
        stderr=outputs[1],
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def test_the_end_of_the_interpreter_changes_no_code() -> None:
    """Python flushes both streams when it ends, and would end with 120 where it cannot."""
    full = os.open("/dev/full", os.O_WRONLY)
    reads, writes = os.pipe()
    os.close(reads)
    try:
        assert program("--version", stdout=full).returncode == 5
        assert program("--version", stdout=writes).returncode == 0
        assert program("--help", stdout=full).returncode == 5
        assert program("merge", "--nonsense", stderr=full).returncode == 2
    finally:
        os.close(full)
        os.close(writes)


def test_files_never_get_the_numbers_of_closed_streams() -> None:
    """Or what anything prints would go into a shard."""
    script = """
import os, sys
for number in range(3):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from streamconv.cli.printing import safe_streams
with safe_streams():
    opened = os.open(sys.argv[0], os.O_RDONLY)
    print("this goes nowhere")
    sys.stderr.write("and this")
os._exit(opened)
"""
    path = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = {str(path)!r}\n{script}"], timeout=60, check=False
    )
    assert done.returncode == 3


# -- signals -------------------------------------------------------------------------------------------------------


def test_a_terminal_that_hangs_up_stops_the_run_as_a_signal_to_end_does(
    commands: Commands, merge: tuple[str | Path, ...], complete: Mapping[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    gone = {"1": "gone", "2": "gone"}
    stopped = commands.run(*merge, "-o", out, at=30, signal=signal.SIGHUP, slow_s=0.03, streams=gone)
    assert stopped.code == 129
    assert not (out / "config.json").exists()
    assert commands.run(*merge, "-o", out).code == 0
    assert tree(out) == complete


def test_nohup_is_respected(
    commands: Commands, merge: tuple[str | Path, ...], complete: Mapping[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = commands.run(*merge, "-o", out, at=30, signal=signal.SIGHUP, ignored=(signal.SIGHUP,))
    assert done.code == 0
    assert tree(out) == complete


IMPORTING = """
import sys, time
class Slow:
    def find_spec(self, name, path, target=None):
        if name == "streamconv.cli":
            print("importing", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Slow())
from streamconv.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_program_is_still_imported_ends_it_in_one_line(number: signal.Signals) -> None:
    command = [sys.executable, "-c", IMPORTING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "\nstopped\n")
    assert process.returncode == 128 + number


def test_a_bar_on_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with safe_streams(), progress("merge", quiet=False) as tell:
            tell(0, 10)
            os.close(ours)
            for done in range(10):
                tell(done, 10)
                time.sleep(0.02)
            with pytest.raises(OSError, match="Input/output"):
                os.write(theirs, b"x")
