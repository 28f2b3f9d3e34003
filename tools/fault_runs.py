"""Runs of the command line in forked children, with strace at their calls.

A child is a copy of a process that has everything imported and compiled. It stops before the command begins, and goes
on once strace is attached, so that its calls are counted from the command's first one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from tqdm import tqdm

from streamconv import cli, threads
from streamconv.output import sink
from tests.hostile.commands import Request
from tests.hostile.fork_server import Child
from tests.hub_stub import TOKEN, Hub, serve
from tools.fault_calls import ERRORS, SEAMS, SHORT, Fault, role
from tools.fault_commands import REPOSITORY, WATERMARK_BYTES, Command
from tools.fault_judge import Ended, Made, Tree, accepted, judge, judge_again, tree, was_hit

LIMIT_S = 20.0
START_S = 8.0  # how long a run waits here for a thread that does not begin
# How Python ends if what was printed cannot be written at the end.
AT_EXIT = 120
BEGUN = re.compile(r"^(\d+) +(\w+)\(", re.MULTILINE)
TEXT_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Row:
    """A judged fault. `hits` are the lines of strace that failed; the rest is shortened to what a reader needs."""

    fault: str
    hit: bool
    code: int | None
    problems: tuple[str, ...]
    hits: tuple[str, ...]
    text: str
    text_again: str
    seconds: float
    role: str
    accepted: str


@dataclass(frozen=True, slots=True)
class Place:
    """Folders of one process: `folder` is its own and emptied for each fault, `inputs` are shared and never written."""

    folder: Path
    inputs: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def lines(self) -> Path:
        return self.folder / "strace"

    @property
    def roots(self) -> Mapping[str, str]:
        return {str(self.out): "output", str(self.text): "terminal", str(self.inputs): "input"}


def warm_up(command: Command, place: Place) -> None:
    """Run it in this process, so that what is imported and compiled late is there for all children.

    But without gradients: a process whose torch has computed some has threads that a fork does not have.
    """
    line = [*command.line(place.out), *command.warm]
    with fresh(command, place) as hub, contextlib.redirect_stdout(io.StringIO()) as said:
        point_at(hub)
        try:
            cli.main(line, prog_name="streamconv")
        except SystemExit as end:
            if end.code:
                sys.exit(f"{command.name} ends with {end.code} without any fault: {said.getvalue()}")


def run(command: Command, place: Place, hub: str, fault: Fault | None = None) -> Ended:
    """The command in a child."""
    began = time.monotonic()
    place.text.unlink(missing_ok=True)
    place.lines.unlink(missing_ok=True)
    child = _fork(lambda: _answer(command, place, hub, fault))
    os.waitpid(child, os.WUNTRACED)
    traced = fault is not None and fault.error != SHORT
    with _strace(child, place.lines, _options(fault)) if traced else contextlib.nullcontext():
        os.kill(child, signal.SIGCONT)
        code = _wait(child)
    text = place.text.read_text(errors="replace")[-TEXT_BYTES:] if place.text.exists() else ""
    return Ended(code, text, time.monotonic() - began, hits_in(place.lines))


def calls_of(command: Command, place: Place) -> Mapping[str, int]:
    """How often each call is made undisturbed, by the thread that makes it most often."""
    with fresh(command, place) as hub:
        child = _fork(lambda: _answer(command, place, hub, None))
        os.waitpid(child, os.WUNTRACED)
        with _strace(child, place.lines, (f"trace={','.join(f'?{call}' for call in ERRORS)}",)):
            os.kill(child, signal.SIGCONT)
            code = _wait(child)
        if code != 0:
            sys.exit(
                f"{command.name} ends with {code} under strace without any fault: {place.text.read_text()}"
            )
        counts = Counter(BEGUN.findall(place.lines.read_text(errors="replace")))
    most: dict[str, int] = {}
    for (_, call), count in counts.items():
        most[call] = max(most.get(call, 0), count)
    return most


def undisturbed(command: Command, place: Place) -> Tree:
    """What it makes."""
    with fresh(command, place) as hub:
        ended = run(command, place, hub)
        if ended.code != 0:
            sys.exit(f"{command.name} ends with {ended.code} without any fault: {ended.text}")
        return _found(command, place, hub)


def attempt(command: Command, fault: Fault, place: Place, inputs: Tree) -> Row:
    """Run it with the fault, and then without; judge both."""
    assert command.complete is not None
    old = None if command.before is None else tree(command.before)
    made = Made(command.complete, old, command.outputs)
    with fresh(command, place) as hub:
        ended = run(command, place, hub, fault)
        found = _found(command, place, hub)
        roles = [role(line, place.roots) for line in ended.hits]
        problems = judge(fault, ended, found, made, roles)
        again = run(command, place, hub)
        problems += judge_again(again, _found(command, place, hub), made)
    if tree(place.inputs) != inputs:
        problems.append("inputs changed")
    return Row(
        str(fault),
        was_hit(fault, ended),
        ended.code,
        tuple(problems),
        tuple(line[:300] for line in (*ended.hits[:3], *ended.hits[3:][-1:])),
        _shortened(ended.text),
        _shortened(again.text) if problems else "",
        ended.seconds,
        "+".join(sorted(set(roles))),
        accepted(ended, found, made),
    )


@contextlib.contextmanager
def fresh(command: Command, place: Place) -> Iterator[str]:
    """An emptied folder with what the command finds there; the address of a Hub of its own if it needs one."""
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir(parents=True)
    command.prepare(place.out)
    if not command.pushes:
        yield ""
        return
    reader, writer = os.pipe()
    hub = _fork(lambda: _serve(writer))
    os.close(writer)
    try:
        with os.fdopen(reader) as lines:
            yield lines.readline().strip()
    finally:
        os.kill(hub, signal.SIGKILL)
        os.waitpid(hub, 0)


def _serve(writer: int) -> int:
    with serve(Hub()) as hub:
        os.write(writer, f"{hub.url}\n".encode())
        os.close(writer)
        while True:
            time.sleep(60)


def _found(command: Command, place: Place, hub: str) -> Tree:
    """The output folder, or what stands in the repository; but what every new one has."""
    if not command.pushes:
        return tree(place.out)
    url = f"{hub}/api/models/{REPOSITORY}/tree/main"
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(asked) as answer:
            entries = json.load(answer)
    except urllib.error.HTTPError:
        return {}
    files = {entry["path"]: entry.get("lfs", entry)["oid"] for entry in entries}
    return {name: oid for name, oid in files.items() if name != ".gitattributes"}


def point_at(hub: str) -> None:
    """Let huggingface_hub talk to the stub at `hub`, if any, and to nobody else."""
    url = hub or "http://127.0.0.1:9"
    vars(constants)["ENDPOINT"] = url
    vars(constants)["HUGGINGFACE_CO_URL_TEMPLATE"] = url + "/{repo_id}/resolve/{revision}/{filename}"
    vars(constants)["HF_HUB_DISABLE_XET"] = True
    os.environ["HF_TOKEN"] = TOKEN


def _answer(command: Command, place: Place, hub: str, fault: Fault | None) -> int:
    """The command, in a child; its exit code."""
    point_at(hub)
    text = os.open(place.text, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(text, 1)
    os.dup2(text, 2)
    os.close(text)
    faulthandler.register(signal.SIGUSR2)  # to see where a run hangs
    sink.WATERMARK_BYTES = WATERMARK_BYTES
    threads.START_S = START_S
    # What the process that is forked must not have, lest it has other threads.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    tqdm.monitor_interval = 10
    child = Child(_request(command.line(place.out), fault))
    if fault is not None and fault.error == SHORT:
        child.install()
    os.kill(os.getpid(), signal.SIGSTOP)
    code = child.run()
    if child.hits:
        place.lines.write_text("".join(f"{hit} (INJECTED)\n" for hit in child.hits))
    return code


def _request(line: tuple[str, ...], fault: Fault | None) -> Request:
    if fault is None or fault.error != SHORT:
        return Request(line)
    of = (SEAMS[fault.call],)
    return Request(
        line, fault=SHORT, of=of, at=fault.at, onward=fault.onward, watermark_bytes=WATERMARK_BYTES
    )


def _fork(answer: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = answer()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        sys.stdout.flush()
    except OSError:
        code = code or AT_EXIT
    os._exit(code)


@contextlib.contextmanager
def _strace(child: int, lines: Path, options: Sequence[str]) -> Iterator[None]:
    """strace attached to `child`, its lines in a file."""
    expressions = [word for option in options for word in ("-e", option)]
    line = ["strace", "-f", "-y", "-s", "0", "-o", str(lines), *expressions, "-p", str(child)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        if "attached" not in said:
            os.kill(child, signal.SIGKILL)
            sys.exit(f"strace: {said}")
        yield
        strace.wait(LIMIT_S)


def _options(fault: Fault | None) -> tuple[str, ...]:
    return () if fault is None else (f"trace={fault.call}", fault.injection)


def hits_in(lines: Path) -> tuple[str, ...]:
    """Calls that failed; one that strace tells in two parts, as another came between, with both of them."""
    hits, begun = [], dict[str, str]()
    for line in lines.read_text(errors="replace").splitlines() if lines.exists() else ():
        process = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
        elif line.endswith("(INJECTED)"):
            is_rest = "<... " in line and process in begun
            hits.append(begun[process] + line.partition("resumed>")[2] if is_rest else line)
    return tuple(hits)


def _wait(child: int) -> int | None:
    """Exit code, or minus the signal; None after it was killed because it did not end in time."""
    watched = os.pidfd_open(child)
    try:
        is_over = bool(select.select([watched], [], [], LIMIT_S)[0])
    finally:
        os.close(watched)
    if not is_over:
        os.kill(child, signal.SIGUSR2)
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if is_over else None


def _shortened(text: str) -> str:
    """Its ends: how it began to fail, and what was said last."""
    return text if len(text) <= 4000 else f"{text[:2500]}\n...\n{text[-1500:]}"
