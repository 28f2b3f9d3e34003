"""The outputs of both trees: inputs made once, REV checked out, a process for each tree.

Below the folder of work both trees find the same relative paths: `inputs`, and outputs in `now` and `rev`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.samebytes.cases import Case, all_cases, quantized_bases
from tools.samebytes.judging import UNKNOWN_BASES, Answers, unknown_bases

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DATA = ROOT / "tests" / "data"  # the small real model and its texts; REV is given those of this tree
LIBRARIES = ("torch", "numpy", "numba", "safetensors", "bitsandbytes", "transformers", "peft")
# They decide what REV makes, as the cases and the files of DATA do.
SOURCES = ("inputs.py", "worker.py")

Tell = Callable[[str], None]


def commit_of(rev: str) -> str:
    """The full hash of a commit; ends the process if there is none."""
    found = _git("rev-parse", "--verify", f"{rev}^{{commit}}", check=False)
    if found.returncode:
        sys.exit(f"{rev} is no commit here: {found.stderr.strip()}")
    return found.stdout.strip()


def key_of(commit: str) -> str:
    """Name of the folder for what REV makes: other inputs, libraries or processors, another folder."""
    known = hashlib.sha256()
    for name in SOURCES:
        known.update((HERE / name).read_bytes())
    for path in sorted(each for each in DATA.rglob("*") if each.is_file()):
        known.update(path.read_bytes())
    known.update(json.dumps([case.job() for case in [*all_cases(), *quantized_bases()]]).encode())
    known.update(json.dumps([platform.python_version(), *map(version, LIBRARIES)]).encode())
    known.update(_processor().encode())
    return f"{commit[:12]}-{known.hexdigest()[:12]}"


def make_all(cases: Sequence[Case], commit: str, work: Path, tell: Tell) -> tuple[Answers, Answers]:
    """Make all outputs but those of REV that an earlier run left; return what the working tree and REV answered."""
    kept = _read(work / "kept.json")
    missing = [case for case in cases if case.name not in kept]
    if len(missing) < len(cases):
        tell(f"{len(cases) - len(missing)} of REV's outputs, and all inputs, are reused from {work}")
    shutil.rmtree(work / "now", ignore_errors=True)
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(_checked_out(commit, work)) if missing else None
        if tree is not None and not (work / "has-inputs").exists():
            make_inputs(tree, work, tell)
        unknown = unknown_bases(work)
        cases, missing = ([case for case in each if case.base not in unknown] for each in (cases, missing))
        tell(f"making {len(cases)} outputs with the working tree, {len(missing)} with {commit[:12]}")
        processes = [stack.enter_context(_worker(ROOT, cases, work, "now"))]
        if tree is not None:
            processes.append(stack.enter_context(_worker(tree, missing, work, "rev")))
        for process in processes:
            process.wait()
    rev = kept | (_read(work / "rev.json") if missing else {})
    lasting = {name: answer for name, answer in rev.items() if answer["outcome"] != "failed"}
    (work / "kept.json").write_text(json.dumps(lasting))
    return _read(work / "now.json"), {case.name: rev[case.name] for case in cases if case.name in rev}


def make_inputs(tree: Path, work: Path, tell: Tell) -> None:
    """Models, adapters and texts; quantized models are made of the tiny one by the tree of REV."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here needs
    from tools.samebytes import inputs  # takes seconds: transformers

    shutil.rmtree(work / "inputs", ignore_errors=True)
    inputs.make_inputs(work / "inputs", DATA)
    tell("models and adapters are made")
    with _worker(tree, quantized_bases(), work, "quantized") as process:
        process.wait()
    unknown = []
    for name, answer in _read(work / "quantized.json").items():
        if answer["outcome"] == "refused":
            unknown.append(name)
            continue
        if answer["outcome"] != "made":
            sys.exit(f"{name} cannot be made by REV: {answer['says']}")
        (work / "quantized" / name).rename(work / "inputs" / "bases" / name)
    (work / UNKNOWN_BASES).write_text(json.dumps(unknown))
    (work / "has-inputs").touch()
    tell("quantized models are made")


@contextlib.contextmanager
def _worker(tree: Path, cases: Sequence[Case], work: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that makes outputs in the folder `name` with what is in `tree`; it ends with the block.

    What it answers is in `name`.json then. Ends this process, too, if it fails.
    """
    outputs, jobs, answers = work / name, work / f"{name}.jobs.json", work / f"{name}.json"
    outputs.mkdir(exist_ok=True)
    for case in cases:
        shutil.rmtree(outputs / case.name, ignore_errors=True)
    jobs.write_text(json.dumps([case.job() for case in cases]))
    answers.unlink(missing_ok=True)
    command = [sys.executable, "-P", str(HERE / "worker.py"), *map(str, (tree, outputs, jobs, answers))]
    log = work / f"{name}.log"
    with (
        log.open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=_environment(tree)) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
    if process.returncode:
        sys.exit(f"{tree}: its process ended with {process.returncode}\n{log.read_text()}")


def _environment(tree: Path) -> dict[str, str]:
    """Variables of a worker: modules from `tree` first, and no options from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMCONV_")}
    return kept | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


@contextlib.contextmanager
def _checked_out(commit: str, work: Path) -> Iterator[Path]:
    """REV in a git worktree of its own, which is removed with the block."""
    tree = work / "tree"
    _remove_worktree(tree)
    _git("worktree", "add", "--detach", "--force", str(tree), commit)
    try:
        yield tree
    finally:
        _remove_worktree(tree)


def _remove_worktree(tree: Path) -> None:
    _git("worktree", "remove", "--force", str(tree), check=False)
    shutil.rmtree(tree, ignore_errors=True)


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _processor() -> str:
    """Model and capabilities of the processor, by which kernels are compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
