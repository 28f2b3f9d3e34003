"""Running a command inside a memory limit, by the strictest means that this machine allows.

A control group counts all that its processes cause, page cache included, which the kernel takes back under pressure
(cgroups(7); Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst). RLIMIT_DATA bounds what a process may
allocate, not what it touches (setrlimit(2)): it is the last resort.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

V2, V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True)
class Limit:
    """`wrap` a command to run it inside; `peak` is what the kernel counted, None where it does not say."""

    name: str
    wrap: Callable[[Sequence[str]], Sequence[str]]
    peak: Callable[[], int | None]


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Limit]:
    """The first kind of limit under which a process cannot in fact take more than `nbytes`.

    Exits the program where there is none.
    """
    for kind in (_group_v2, _group_v1, _systemd, _data_limit):
        with kind(nbytes) as limit:
            if limit is not None and holds(limit, nbytes):
                yield limit
                return
    sys.exit("this machine offers no way to limit memory: no control group, no systemd-run, no RLIMIT_DATA")


def holds(limit: Limit, nbytes: int) -> bool:
    """Whether a process inside `limit` fails to take a quarter more than `nbytes`, and one that takes little lives."""
    script = "import sys; held = bytearray(b'x') * int(sys.argv[1])"
    small, large = (
        subprocess.run(
            limit.wrap([sys.executable, "-c", script, str(size)]), check=False, capture_output=True
        ).returncode
        for size in (nbytes // 8, nbytes * 5 // 4)
    )
    return small == 0 and large != 0


@contextmanager
def _group_v2(nbytes: int) -> Iterator[Limit | None]:
    if "memory" not in _read(V2 / "cgroup.subtree_control"):
        yield None
        return
    with _group(V2, {"memory.max": nbytes, "memory.swap.max": 0}) as group:
        yield None if group is None else _group_limit("control group (v2)", group, "memory.peak")


@contextmanager
def _group_v1(nbytes: int) -> Iterator[Limit | None]:
    with _group(V1, {"memory.limit_in_bytes": nbytes, "memory.memsw.limit_in_bytes": nbytes}) as group:
        peak = "memory.max_usage_in_bytes"
        yield None if group is None else _group_limit("control group (v1)", group, peak)


@contextmanager
def _group(root: Path, settings: dict[str, int]) -> Iterator[Path | None]:
    """A new control group under `root`, gone afterwards; None where it cannot be made."""
    group = root / f"streamconv-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        for name, value in settings.items():
            with suppress(OSError):  # swap may not be counted; whether the limit holds is tried out
                (group / name).write_text(str(value))
        yield group
    finally:
        group.rmdir()


def _group_limit(name: str, group: Path, peak: str) -> Limit:
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return Limit(
        name, lambda command: ("sh", "-c", script, str(group), *command), lambda: _number(group / peak)
    )


@contextmanager
def _systemd(nbytes: int) -> Iterator[Limit | None]:
    properties = ("-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0")
    scope = ("systemd-run", "--user", "--scope", "--quiet", "--collect", *properties)
    try:
        subprocess.run((*scope, "true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    yield Limit("systemd-run", lambda command: (*scope, *command), lambda: None)


@contextmanager
def _data_limit(nbytes: int) -> Iterator[Limit | None]:
    script = f'ulimit -d {nbytes // 1024} && exec "$@"'
    yield Limit("RLIMIT_DATA", lambda command: ("sh", "-c", script, "sh", *command), lambda: None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
