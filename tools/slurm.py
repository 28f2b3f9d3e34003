"""A Slurm of one node, this machine, for as long as it is wanted: controller and daemon of their own, in a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
# Neither systemd nor control groups are needed; tasks may share the processors, which may be few.
CONFIG = """\
ClusterName=parts
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={next_port}
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
MinJobAge=300
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def is_installed() -> bool:
    """Whether all of Slurm is here, and may be started: that takes root."""
    return os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running Slurm; `version` in its own words."""

    environment: Mapping[str, str]
    version: str

    def run(self, *command: str | Path, cwd: Path | None = None, timeout_s: float = 300) -> str:
        """Standard output of a command. Raises CalledProcessError, with what it said, where it fails."""
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_s,
        ).stdout

    def state(self, job: str) -> str:
        """State of a job or of one task of an array, in Slurm's word; GONE for one that it has forgotten."""
        with contextlib.suppress(subprocess.CalledProcessError):
            found = self.run("scontrol", "-o", "show", "job", job)
            return found.partition("JobState=")[2].split()[0] if found.strip() else "GONE"
        return "GONE"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """Start a Slurm that keeps its state in `folder`, and stop it. munged is started where none runs, and left."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    port = 16000 + os.getpid() % 4000
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            port=port,
            next_port=port + 1,
            cpus=os.cpu_count(),
        )
    )
    environment = os.environ | {"SLURM_CONF": str(config)}
    if not Path("/run/munge/munge.socket.2").exists():
        shutil.chown("/run/munge", "munge")
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged --force"], check=True)
    with contextlib.ExitStack() as stack:
        for daemon in ("slurmctld", "slurmd"):
            process = subprocess.Popen([daemon, "-D"], env=environment, stderr=subprocess.DEVNULL)
            stack.callback(_stop, process)
        version = subprocess.check_output(["sinfo", "--version"], env=environment, text=True)
        slurm = Slurm(environment, version.strip())
        _wait_for_node(slurm)
        yield slurm


def _wait_for_node(slurm: Slurm) -> None:
    for _ in range(60):
        with contextlib.suppress(subprocess.CalledProcessError):
            if "idle" in slurm.run("sinfo", "-h", "-o", "%t"):
                return
        time.sleep(0.5)
    raise TimeoutError("Slurm's node did not come up within 30 s; see its logs")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=30)
