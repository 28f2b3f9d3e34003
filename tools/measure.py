"""What a command costs: wall time, processor time and peak anonymous memory, it and its children together.

Anonymous memory (`RssAnon` of /proc/PID/status, see proc_pid_status(5)) is what a process cannot give back;
pages of mapped files, which the kernel drops when it needs room, are not counted. What CUDA pins is shared memory
(`RssShmem`), and counts where it is asked for.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """One finished command. `peak_anon_bytes` is the highest sum seen in samples `SAMPLE_INTERVAL_S` apart."""

    exit_code: int
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    peak_anon_bytes: int


def measure(command: Sequence[str], pinned: bool = False) -> Cost:
    """Run `command` to its end; nothing else may be waited for meanwhile, or its processor time counts too.

    With `pinned`, shared memory counts as anonymous.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        cpu_before = _children_cpu_s()
        started = time.perf_counter()
        peak = 0
        with subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True) as process:
            while process.poll() is None:
                peak = max(peak, _tree_anon_bytes(process.pid, pinned))
                time.sleep(SAMPLE_INTERVAL_S)
        wall_s = time.perf_counter() - started
        cpu_s = _children_cpu_s() - cpu_before
        stdout.seek(0)
        stderr.seek(0)
        return Cost(process.returncode, stdout.read(), stderr.read(), wall_s, cpu_s, peak)


def torch_anon_bytes() -> int:
    """Anonymous memory of an interpreter that has imported torch and done nothing: what others are measured above."""
    script = "import os, torch; print(open(f'/proc/{os.getpid()}/status').read())"
    status = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return _anon_bytes(status)


def folder_bytes(folder: Path) -> int:
    """Size of the safetensors files in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree_anon_bytes(pid: int, pinned: bool) -> int:
    """Anonymous memory of process `pid` and all its descendants; those that just ended count as nothing."""
    process = Path(f"/proc/{pid}")
    try:
        own = _anon_bytes((process / "status").read_text(), pinned)
        lists = [path.read_text() for path in process.glob("task/*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return own + sum(_tree_anon_bytes(int(child), pinned) for children in lists for child in children.split())


def _anon_bytes(status: str, pinned: bool = False) -> int:
    """The `RssAnon` line, in kB there, and with `pinned` `RssShmem`; a process that is just ending has none."""
    kinds = ("RssAnon:", "RssShmem:") if pinned else ("RssAnon:",)
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kinds))
