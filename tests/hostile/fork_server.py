"""Runs the command line in forked children, and in one raises a signal, or an error, at a call to the system.

A process of its own, which has imported everything once. Requests and answers are lines of JSON; tests use
`commands.py`. What a child prints goes to FOLDER/PID.text.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from streamconv import cli
from streamconv.checkpoint import blocks
from streamconv.disk import BLOCK
from streamconv.kernels import compiled_kernels
from streamconv.output import sink
from streamconv.pipeline import production
from streamconv.running import executor, lanes
from streamconv.running.sink import Output
from tests.hostile.commands import Request

WATCHED = (
    "pwrite",
    "pwritev",
    "write",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "truncate",
    "ftruncate",
)
# More that may fail, by the module that has them; watched on request alone, as they are called very often.
FAULTY: Mapping[str, ModuleType] = dict.fromkeys(WATCHED, os) | {
    "open": os,
    "read": os,
    "pread": os,
    "preadv": os,
    "close": os,
    "lseek": os,
    "stat": os,
    "lstat": os,
    "fstat": os,
    "listdir": os,
    "scandir": os,
    "statvfs": os,
    "sched_getaffinity": os,
    "flock": fcntl,
}
# A killed process loses nothing that it had written, so these are counted and not done, which is a lot faster.
SYNCS = ("fsync", "fdatasync")


class Child:
    """What happens in a forked child."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.calls: list[str] = []
        self.hits: list[str] = []
        self._counting = threading.Lock()
        self._counted = 0
        self._is_over = False
        self.starts: dict[str, tuple[int, int]] = {}

    def install(self) -> None:
        for name in self.request.of or WATCHED:
            setattr(FAULTY[name], name, self._watched(name, getattr(FAULTY[name], name)))
        vars(production)["run_plans"] = self._noting_starts(executor.run_plans)
        sink.WATERMARK_BYTES = self.request.watermark_bytes
        blocks.GATHERED_BYTES = BLOCK  # so that small outputs are written in many calls
        lanes.GRACE_S = self.request.grace_s

    def run(self) -> int:
        """The command; its exit code."""
        try:
            cli.main(list(self.request.arguments), prog_name="streamconv")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        finally:
            self._is_over = True
        return 0

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        writes = name in ("write", "pwrite")

        def watched(*given: Any, **options: Any) -> Any:
            if self._is_over or (writes and given[0] <= 2):
                return call(*given, **options)
            with self._counting:  # bytes are written in one thread and brought to the disk in another
                self.calls.append(f"{name} {_name_of(given[0] if given else '.')}")
                self._counted += self._counted > 0 or self.request.since in (None, self.calls[-1])
                number = self._counted
            if name == "pwrite":
                time.sleep(self.request.slow_s)
            if self.request.fault:
                return self._fail(name, call, given) if self._is_due(number) else call(*given, **options)
            if self.request.at and number in (self.request.at, self.request.at + self.request.again):
                if writes and self.request.tears:
                    with contextlib.suppress(OSError):  # half a block cannot be written directly
                        call(given[0], given[1][: len(given[1]) // 2], *given[2:])
                os.kill(os.getpid(), self.request.signal)
            return None if name in SYNCS else call(*given, **options)

        return watched

    def _is_due(self, number: int) -> bool:
        at = self.request.at
        return at is not None and (number == at or (self.request.onward and number > at))

    def _fail(self, name: str, call: Callable[..., Any], given: Sequence[Any]) -> Any:
        """End the call as the fault says: with an error, or with less done than was asked for."""
        self.hits.append(f'{name} "{_path_of(given[0] if given else ".")}"')
        if self.request.fault == "short":
            return call(given[0], _half(name, given[1]), *given[2:])
        if self.request.fault == "end":
            return 0 if name == "preadv" else b""
        if name == "close":  # what cannot be written is told, but the file is closed
            call(*given)
        number = getattr(errno, self.request.fault)
        names = [os.fspath(each) for each in given[:1] if isinstance(each, str | os.PathLike)]
        raise OSError(number, os.strerror(number), *names)

    def _noting_starts(self, run_plans: Callable[..., None]) -> Callable[..., None]:
        def noting(outputs: Sequence[Output], *rest: Any) -> None:
            for each in outputs:
                headers = {shard.name: len(shard.header) for shard in each.plan.shards}
                label = f"{each.plan.quant} " if len(outputs) > 1 else ""
                self.starts |= {f"{label}{name}": (headers[name], at) for name, at in each.starts.items()}
            run_plans(outputs, *rest)

        return noting


def _half(name: str, asked: Any) -> Any:
    """What a call that does only the first half is asked for: bytes to write, buffers to fill, or a count."""
    if name == "preadv":
        (buffer,) = asked
        return [memoryview(buffer).cast("B")[: max(1, memoryview(buffer).nbytes // 2)]]
    return (
        max(1, asked // 2)
        if isinstance(asked, int)
        else memoryview(asked).cast("B")[: max(1, len(asked) // 2)]
    )


def _name_of(target: object) -> str:
    """The last name of a path, or of the file behind a descriptor."""
    return _path_of(target).name


def _path_of(target: object) -> Path:
    if not isinstance(target, int):
        return Path(str(target))
    try:
        return Path(f"/proc/self/fd/{target}").readlink()
    except FileNotFoundError:  # it was closed by a call that failed
        return Path("closed")


def replace(number: int, kind: str) -> None:
    """Make a standard stream what it may be where a program is started; Python has none where its number is free."""
    if kind == "closed":
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    else:
        reads, writes = os.pipe()
        os.dup2(writes, number)
        os.close(reads)
        os.close(writes)


def fork(request: Request, folder: Path) -> int:
    """The process id of a child that runs the request; its answer will be in FOLDER/PID.json."""
    process = os.fork()
    if process:
        return process
    code, resident = 1, _resident()
    (folder / f"{os.getpid()}.json").unlink(missing_ok=True)  # numbers of processes come again
    text = os.open(folder / f"{os.getpid()}.text", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(text, 1)
    os.dup2(text, 2)
    for number, kind in request.streams.items():
        replace(int(number), kind)
    for ignored in request.ignored:
        signal.signal(ignored, signal.SIG_IGN)
    child = Child(request)
    try:
        child.install()
        code = child.run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # which fails where the program has left what cannot be written
    answer = {
        "code": code,
        "calls": list(child.calls),
        "hits": child.hits,
        "starts": child.starts,
        "resident": resident,
    }
    (folder / f"{os.getpid()}.json").write_text(json.dumps(answer))
    os._exit(0)


def outcome(process: int, folder: Path) -> dict[str, Any]:
    """How the child ended; or that it stopped."""
    began = time.monotonic()
    _, status, used = os.wait4(process, os.WUNTRACED)
    answer: dict[str, Any] = {"calls": [], "hits": [], "starts": {}}
    if os.WIFSTOPPED(status):
        answer["code"] = -os.WSTOPSIG(status)
    elif os.WIFSIGNALED(status):
        answer["code"] = -os.WTERMSIG(status)
    elif (said := folder / f"{process}.json").exists():
        answer = json.loads(said.read_text())
    else:
        answer["code"] = os.WEXITSTATUS(status)
    began_with = answer.pop("resident", _resident())
    return {
        **answer,
        "seconds": time.monotonic() - began,
        "process": process,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "grown_bytes": max(0, used.ru_maxrss * 1024 - began_with),
    }


def _resident() -> int:
    """Memory of this process. A child has less at its start: files that are mapped are not there before it looks."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(request: Request, folder: Path) -> dict[str, Any]:
    if request.goes_on is not None:
        os.kill(request.goes_on, signal.SIGCONT)
        return outcome(request.goes_on, folder)
    process = fork(request, folder)
    if request.kill_after_s is None:
        return outcome(process, folder)
    timer = threading.Timer(request.kill_after_s, os.kill, (process, signal.SIGKILL))
    timer.start()
    try:
        return outcome(process, folder)
    finally:
        timer.cancel()
        timer.join()  # a fork must not find another thread


def main() -> None:
    folder, modules = Path(sys.argv[1]), sys.argv[2:]
    for module in modules:
        import_module(module)
    compiled_kernels()  # looks for a compiler, of whose import each run would have 0.2 s
    gc.freeze()  # what is here stays, and is not gone through, and so copied, by each run
    for line in sys.stdin:
        fields = json.loads(line)
        request = Request(**{**fields, "arguments": tuple(fields["arguments"])})
        print(json.dumps(serve(request, folder)), flush=True)


if __name__ == "__main__":
    main()
