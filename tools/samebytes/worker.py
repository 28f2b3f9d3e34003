"""Makes the outputs of a list of jobs with the streamconv of one tree, in one process.

    PYTHONPATH=TREE python -P worker.py TREE OUTPUTS JOBS.json ANSWERS.json

It runs as a file, beside no package, so that nothing of another tree can be imported; and it uses what the project
promises to keep alone: `merge()`, `convert()` and the command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
# Lists on the command line are options given again and again.
FLAGS = {True: "--{}", False: "--no-{}"}


class NotStopped(Exception):  # noqa: N818  says what happened
    """A run that was to be killed or resumed, and was not."""


def import_from(tree: Path) -> Any:
    """The streamconv of `tree`; ends the process if it is another one."""
    import streamconv

    found = Path(streamconv.__file__).resolve()
    if not found.is_relative_to(tree.resolve()):
        sys.exit(f"{found} was imported, which is not in {tree}")
    return streamconv


def carry_out(streamconv: Any, tree: Path, job: Job) -> dict[str, Any]:
    """Make one output; say whether it was made, refused by an error of the project, or failed by another."""
    started = time.monotonic()
    try:
        _ways(job["way"])(streamconv, tree, job)
        answer = {"outcome": "made", "says": ""}
    except streamconv.StreamconvError as error:
        answer = {"outcome": "refused", "says": f"{type(error).__name__}: {error}"}
    except Exception:
        answer = {"outcome": "failed", "says": traceback.format_exc()}
    return answer | {"seconds": time.monotonic() - started}


def _ways(way: str) -> Any:
    return {
        "call": lambda streamconv, tree, job: _make(streamconv, job),
        "command line": lambda streamconv, tree, job: _by_command(job),
        "killed": _killed,
        "without numba": _without_numba,
    }[way]


def _make(streamconv: Any, job: Job, **more: Any) -> Any:
    options = {**job["options"], **more}
    if job["adapter"] is None:
        return streamconv.convert(job["base"], job["name"], **options)
    return streamconv.merge(job["base"], job["adapter"], job["name"], **options)


def arguments(job: Job) -> list[str]:
    """The job as somebody would type it."""
    given = ["convert" if job["adapter"] is None else "merge", "--base", job["base"], "-o", job["name"]]
    given += [] if job["adapter"] is None else ["--adapter", job["adapter"]]
    for name, value in job["options"].items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(FLAGS[value].format(option))
        else:
            values = value if isinstance(value, list) else [value]
            given += [word for each in values for word in (f"--{option}", str(each))]
    return given


def _by_command(job: Job) -> None:
    """Run `python -m streamconv` in this process, which has torch loaded."""
    before, sys.argv = sys.argv, ["streamconv", *arguments(job), "--quiet"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("streamconv", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit {ended.code}: {said.getvalue()}") from ended
    finally:
        sys.argv = before


def _killed(streamconv: Any, tree: Path, job: Job) -> None:
    """Kill a first run of it half way, without a chance to tidy up; then go on in this process."""
    ended = _in_process(tree, job, "--kill")
    if ended.returncode != -signal.SIGKILL:
        raise NotStopped(f"it should have been killed, and ended with {ended.returncode}: {ended.stderr}")
    if Path(job["name"], "config.json").exists():
        raise NotStopped("it was killed too late: the model was complete")
    if not _make(streamconv, job).resumed:
        raise NotStopped("the second run began anew: the first was killed too early to leave anything")


def _without_numba(streamconv: Any, tree: Path, job: Job) -> None:
    ended = _in_process(tree, job, "--no-numba")
    if ended.returncode:
        raise RuntimeError(ended.stderr)


def _in_process(tree: Path, job: Job, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(Path(__file__).resolve()), how, str(tree), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _kill_half_way(*given: Any) -> None:
    """Progress as `on_progress` is told it, bytes done and of how many in the end."""
    done, total = [each for each in given if isinstance(each, int)][-2:]
    if 2 * done >= total:
        os.kill(os.getpid(), signal.SIGKILL)


def main(given: list[str]) -> None:
    if given[0] == "--no-numba":
        sys.modules["numba"] = None  # type: ignore[assignment]  # an import of it fails
    if given[0] in ("--kill", "--no-numba"):
        more = {"on_progress": _kill_half_way} if given[0] == "--kill" else {}
        _make(import_from(Path(given[1])), json.loads(given[2]), **more)
        return
    tree, outputs, jobs, answers = map(Path, given)
    streamconv = import_from(tree)
    todo = json.loads(jobs.read_text())
    os.chdir(outputs)
    made = {job["name"]: carry_out(streamconv, tree, job) for job in todo}
    answers.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
