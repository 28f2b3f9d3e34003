"""The other ways to merge, as commands: what each needs, and why one that cannot run here is left out."""

import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.results import ROOT

MERGEKIT = "mergekit==0.1.5"
MERGEKIT_VENV = ROOT / ".venv-mergekit"


@dataclass(frozen=True, slots=True)
class Rival:
    """`script` merges `base adapter out` and syncs. `ram_factor`: memory it needs, of the checkpoint's size."""

    name: str
    script: str
    python: Path
    ram_factor: float
    prepare: Callable[[], str | None] = lambda: None  # why it cannot run, once it has tried to install it

    def command(self, base: Path, adapter: Path, out: Path) -> Sequence[str]:
        return (str(self.python), "-m", f"tools.bench.{self.script}", str(base), str(adapter), str(out))


def install_mergekit() -> str | None:
    """Make mergekit's environment where it is missing; return why that failed, or None."""
    ready = MERGEKIT_VENV / f"ready-{MERGEKIT}"
    if ready.exists():
        return None
    print(f"installing {MERGEKIT} into {MERGEKIT_VENV.name}", file=sys.stderr, flush=True)
    venv.create(MERGEKIT_VENV, clear=not (MERGEKIT_VENV / "bin/pip").exists(), with_pip=True)
    pip = (str(MERGEKIT_VENV / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    constraint = (
        "--constraint",
        str(ROOT / "tools/constraints.txt"),
    )  # the torch and PEFT that others run with
    tried = subprocess.run((*pip, *constraint, MERGEKIT), check=False, capture_output=True, text=True)
    if tried.returncode:
        lines = tried.stderr.strip().splitlines()
        return f"pip could not install {MERGEKIT}: {lines[-1] if lines else 'it gave no reason'}"
    ready.touch()
    return None


def free_memory() -> int:
    """Bytes that programs could take now: what is free, and what only caches files."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")


def refusal(rival: Rival, checkpoint_bytes: int) -> str | None:
    """Why `rival` cannot run on such a checkpoint here, or None."""
    needed = int(rival.ram_factor * checkpoint_bytes)
    if needed > (free := free_memory()):
        return f"it needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    return rival.prepare()


_HERE = Path(sys.executable)

RIVALS = {
    "peft": Rival("PEFT merge_and_unload", "peft_merge", _HERE, ram_factor=1.3),
    # A shard as read, as merged, and as it is put together for the file.
    "loop": Rival("load shard, merge, save_file", "shard_loop", _HERE, ram_factor=2),
    "mergekit": Rival(
        "mergekit base+lora",
        "mergekit_merge",
        MERGEKIT_VENV / "bin/python",
        ram_factor=1.3,
        prepare=install_mergekit,
    ),
}
