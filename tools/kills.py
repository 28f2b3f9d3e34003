"""Merges killed at random moments, over and over, then run to their end: what stands in the folder, what becomes of it.

Moments are drawn by a seed: before a call that changes the disk, or after half of a write, half of them anywhere in the
run and three in ten while files are put in place; else by the clock. A run that goes on is killed again with one chance
in three. After every kill, a folder that loads is the old model whole, or the new one, and no
shard under a final name is a part of one; after the last, the same command gives what an undisturbed run gives, every
visible file byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from peft import LoraConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.hostile.commands import MODEL_MODULES, Commands, Outcome, fork_server
from tests.hostile.test_kill import Tree, below, check_final_names, tree
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import llama_config, save_adapter, save_base

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results/kills.json"
PLACES = ("planning", "passes over the text", "shards", "publishing", "clearing up")
WATERMARK_BYTES = 50_000


@dataclass(frozen=True, slots=True)
class Case:
    """A command without its --out; `old` is a model in its place, to be replaced.

    `complete` is what a run leaves that nobody disturbs, `calls` are its calls that change the disk.
    """

    name: str
    arguments: tuple[str, ...]
    old: Path | None = None
    folders: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    seconds: float = 0.0
    complete: Tree | None = None

    def run(self, commands: Commands, out: Path, **settings: object) -> Outcome:
        return commands.run(*self.arguments, "-o", out, watermark_bytes=WATERMARK_BYTES, **settings)

    def begin(self, out: Path) -> Path:
        if self.old is not None:
            shutil.copytree(self.old, out)
        return out


@dataclass(frozen=True, slots=True)
class Chain:
    """Kills of one run, then its end. `failure` is empty where all was as it must be."""

    command: str
    places: tuple[str, ...]
    moments: tuple[str, ...]
    failure: str


# -- commands --------------------------------------------------------------------------------------------------------


def make_cases(folder: Path) -> list[Case]:
    """The commands, with inputs in `folder`."""
    shapes = Sizes().shapes
    base, adapter = write_base(folder / "base", shapes), write_adapter(folder / "adapter", shapes)
    old = write_base(folder / "old", shapes, shards=5, seed=7)
    (old / "chat_template.jinja").write_text("of the old model only")
    (old / "notes.txt").write_text("the user's own")
    merge = ("merge", "--base", str(base), "--adapter", str(adapter), "--max-ram", "98MiB")
    nf4 = ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "200kB")
    return [
        Case("bf16", merge),
        Case("nf4-dq", (*merge, *nf4)),
        Case("gptq", (*merge, "--quant", "gptq", "--group-size", "32", "--max-shard-size", "400kB")),
        Case("awq", (*merge, "--quant", "awq", "--group-size", "32", "--max-shard-size", "400kB")),
        Case(
            "bf16 --also nf4-dq --also int8",
            (*merge[:-1], "99MiB", "--also", "nf4-dq", "--also", "int8"),
            folders=("nf4-dq", "int8"),
        ),
        Case("bf16 --overwrite", (*merge, "--overwrite"), old),
        Case("nf4-dq --overwrite", (*merge, *nf4, "--overwrite"), old),
        *_calibrated(folder, old),
    ]


def _calibrated(folder: Path, old: Path) -> list[Case]:
    base = save_base(folder / "model", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "lora", base, lora)
    text = write_text(folder / "text.txt", 200)
    merge = ("merge", "--base", str(base), "--adapter", str(folder / "lora"), "--calibration", str(text))
    sizes = ("--calibration-tokens", "160", "--calibration-sequence-length", "32", "--device", "cpu")
    two_sided = ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--calibration-gradient-tokens", "32")
    rescaled = ("--quant", "nf4", "--rescale", "awq", "--rounding", "search")
    return [
        Case("nf4-dq, calibrated", (*merge, *sizes, *two_sided)),
        Case("nf4, rescaled", (*merge, *sizes, *rescaled)),
        Case("nf4-dq, calibrated, --overwrite", (*merge, *sizes, *two_sided, "--overwrite"), old),
    ]


def undisturbed(commands: Commands, case: Case, folder: Path) -> Case:
    """The case with what it does and gives when nobody disturbs it."""
    out = case.begin(folder / "out")
    done = case.run(commands, out)
    if done.code:
        raise SystemExit(f"{case.name}: {done.text}")
    complete = tree(out)
    shutil.rmtree(out)
    return replace(case, calls=done.calls, seconds=done.seconds, complete=complete)


# -- one chain of kills ----------------------------------------------------------------------------------------------


def try_chain(case: Case, commands: Commands, seed: str, folder: Path) -> Chain:
    """Kill the command, perhaps again while it goes on, and run it to its end."""
    drawn, out = random.Random(seed), case.begin(folder / "out")
    places, moments, failure = list[str](), list[str](), ""
    try:
        while not places or (drawn.random() < 1 / 3 and len(places) < 4):
            moment = _moment(case, drawn)
            killed = case.run(commands, out, **moment)
            if killed.code != -signal.SIGKILL:  # it was done before
                if killed.code:
                    failure = f"exit {killed.code}: {killed.text}"
                break
            places.append(_place(out))
            moments.append(json.dumps(moment))
            check_kill(case, out)
        failure = failure or ended(case, case.run(commands, out), out)
    except AssertionError as error:
        failure = f"after the kill: {error}"
    shutil.rmtree(out)
    return Chain(case.name, tuple(places), tuple(moments), failure)


def _moment(case: Case, drawn: random.Random) -> dict[str, object]:
    """Settings of a run that is killed."""
    way = drawn.random()
    if way < 0.2:
        return {"kill_after_s": round(drawn.uniform(0.02, case.seconds), 4), "slow_s": 0.0005}
    tears = drawn.random() < 0.5
    begins = next(at for at, call in enumerate(case.calls) if _publishes(call))
    if way < 0.5:
        at = drawn.randint(1, len(case.calls) - begins)
        return {"at": at, "since": case.calls[begins], "tears": tears}
    return {"at": drawn.randint(1, len(case.calls)), "tears": tears}


def _publishes(call: str) -> bool:
    return call == "unlink config.json" or (
        call.startswith("replace model") and call.endswith(".safetensors")
    )


def _place(out: Path) -> str:
    """How far a killed run had come, by what it left."""
    work = out / ".streamconv"
    if not (work / "plan.json").exists():
        return PLACES[0] if not work.exists() or (work / "lock").exists() else PLACES[4]
    lines = work / "journal.jsonl"
    if lines.exists() and b'"publishing"' in lines.read_bytes():
        return PLACES[3]
    if [*work.glob("*.partial"), *work.glob("*.safetensors")]:
        return PLACES[2]
    return PLACES[1] if [*work.glob("*/calibration.json")] else PLACES[0]


def check_kill(case: Case, out: Path) -> None:
    """Raise AssertionError unless the folder is whole: the old model, the new one, or none that loads."""
    assert case.complete is not None
    others = [] if case.old is None else [tree(case.old)]
    check_final_names(out, case.complete, *others)
    for name in case.folders:
        check_final_names(out / name, below(case.complete, name))


def ended(case: Case, done: Outcome, out: Path) -> str:
    """Why the last run is not as it must be; nothing where it is."""
    if done.code:
        return f"run again: exit {done.code}: {done.text}"
    found, complete = tree(out), case.complete or {}
    differing = sorted(name for name in {*found, *complete} if found.get(name) != complete.get(name))
    return f"run again: {', '.join(differing)} differ" if differing else ""


# -- all of them -----------------------------------------------------------------------------------------------------


def try_kills(kills: int, seed: int, jobs: int, names: Sequence[str] = ()) -> dict[str, object]:
    """Results of at least so many kills, spread evenly over the commands."""
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        servers = [stack.enter_context(fork_server(*MODEL_MODULES)) for _ in range(jobs)]
        cases = [case for case in make_cases(folder) if not names or case.name in names]
        cases = [undisturbed(servers[0], case, folder) for case in cases]

        places, counted = count(), Counter[str]()

        def work(number: int) -> list[Chain]:
            own, chains = folder / str(number), list[Chain]()
            own.mkdir()
            while counted["kills"] < kills:
                place = next(places)
                case = cases[place % len(cases)]
                chains.append(try_chain(case, servers[number], f"{seed} {place}", own))
                counted["kills"] += len(chains[-1].places)
            return chains

        with ThreadPoolExecutor(jobs) as pool:
            chains = [chain for found in pool.map(work, range(jobs)) for chain in found]
    return summary(chains, seed)


def summary(chains: Sequence[Chain], seed: int) -> dict[str, object]:
    """Counts by command and place, and what failed."""
    counts = {command: Counter[str]() for command in dict.fromkeys(chain.command for chain in chains)}
    for chain in chains:
        counts[chain.command].update(chain.places)
    return {
        "made_by": "tools/kills",
        "seed": seed,
        "versions": {name: version(name) for name in ("streamconv", "torch", "transformers", "peft")},
        "python": sys.version.split()[0],
        "kills": sum(len(chain.places) for chain in chains),
        "runs_to_the_end": len(chains),
        "killed_again": sum(len(chain.places) > 1 for chain in chains),
        "by_clock": sum("kill_after_s" in moment for chain in chains for moment in chain.moments),
        "failures": [asdict(chain) for chain in chains if chain.failure],
        "by_command": {
            command: {place: found[place] for place in PLACES} for command, found in sorted(counts.items())
        },
    }


def table(by_command: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown: a row for each command, a column for each place."""
    lines = ["| command | " + " | ".join(PLACES) + " |", "|---|" + "--:|" * len(PLACES)]
    for command, counts in by_command.items():
        lines.append(f"| {command} | " + " | ".join(str(counts[place]) for place in PLACES) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, try_all: Callable[..., dict[str, object]] = try_kills) -> int:
    parser = argparse.ArgumentParser(prog="tools/kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument(
        "--command", action="append", default=[], help="only this one, by its name; none is written"
    )
    given = parser.parse_args(argv)
    started = time.monotonic()
    results = try_all(given.kills, given.seed, given.jobs, given.command)
    results["seconds"] = round(time.monotonic() - started)
    print(table(results["by_command"]))  # type: ignore[arg-type]  # as `summary` makes it
    print({key: value for key, value in results.items() if key != "by_command"})
    if not given.command:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(results["failures"]))


if __name__ == "__main__":
    sys.exit(main())
