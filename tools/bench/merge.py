"""What a merge costs against copying the files and against other ways to merge: same run, disk, cold cache, synced.

Each round runs every contender once, in turns forwards and backwards, after dropping inputs from the page cache.
Tables give medians over rounds; ratios to copying are taken within each round first. GB/s counts the input once.
Start-up is counted, and only streamconv hashes what it writes. Rounds of one kind, size and load are stored together
with the machine they ran on; a later run of these replaces them, so that all can be made in pieces. A load is a number
of processes that count, at the priority of what is measured.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.models import MODELS
from tools.bench.results import FOLDER, RESULTS, ROOT, load, machine, save
from tools.measure import Cost, folder_bytes, measure, torch_anon_bytes

COPY, STREAMCONV, RAW = "cp -r; sync", "streamconv merge", "reading and writing alone"
MADE_BY = "tools/bench/merge"
MERGEKIT = "mergekit==0.1.5"
MERGEKIT_VENV = ROOT / ".venv-mergekit"


# -- the other ways to merge, as commands ------------------------------------------------------------------------


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


# -- rounds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """From what the base is stored as, to what `--quant` makes of it; `bound`: compare with disk and encoder."""

    name: str
    base: str
    quant: str
    bound: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("bf16-bf16", "base", "keep"),
        Kind("bf16-nf4", "base", "nf4", bound=True),
        Kind("nf4-nf4", "base-nf4", "keep"),
        Kind("bf16-int8", "base", "int8"),
    )
}


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round. `peak_bytes` is anonymous memory above an interpreter with torch loaded."""

    contender: str
    round: int
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the rounds of one contender; `to_copy` is wall time over that of copying in the same round.

    `peak_bytes` is the highest of all rounds, `fastest` and `slowest` those of `to_copy`.
    """

    contender: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    gb_per_s: float
    to_copy: float | None
    fastest: float | None
    slowest: float | None


def copy_command(base: Path, out: Path) -> Sequence[str]:
    copy = 'cp -r --reflink=never "$1" "$2" && sync "$2"/* "$2"'
    return ("sh", "-c", copy, "sh", str(base), str(out))


def streamconv(*arguments: str | Path) -> Sequence[str]:
    return (sys.executable, "-m", "streamconv", *map(str, arguments), "--device", "cpu", "--quiet")


def contenders(
    kind: Kind, folder: Path, rivals: Sequence[Rival], output_bytes: int
) -> Mapping[str, Sequence[str]]:
    """Commands by name. All write to `folder/out`."""
    base, adapter, out = folder / kind.base, folder / "adapter", folder / "out"
    merge = ("merge", "--base", base, "--adapter", adapter, "--quant", kind.quant, "-o", out)
    raw = (sys.executable, "-m", "tools.bench.raw_io", str(base), str(out), str(output_bytes))
    return {
        COPY: copy_command(base, out),
        STREAMCONV: streamconv(*merge),
        **({RAW: raw} if kind.bound else {}),
        **{rival.name: rival.command(base, adapter, out) for rival in rivals},
    }


def run_round(
    commands: Mapping[str, Sequence[str]], folder: Path, number: int, torch_bytes: int
) -> list[Run]:
    """Every contender once, each into the same place, emptied before and after.

    What is compared most closely runs one after the other: disks change their mind within minutes.
    """
    close = [name for name in commands if name in {COPY, STREAMCONV, RAW}]
    rest = [name for name in commands if name not in close]
    runs = []
    for contender in (*close, *rest) if number % 2 == 0 else (*reversed(close), *reversed(rest)):
        shutil.rmtree(folder / "out", ignore_errors=True)
        drop_cache(folder)
        cost = checked(measure(commands[contender]), contender)
        peak = max(0, cost.peak_anon_bytes - torch_bytes)
        runs.append(Run(contender, number, cost.wall_s, cost.cpu_s, peak))
        print(f"  {contender}: {cost.wall_s:.1f} s, {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return runs


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that use a core each, if they get it, beside what is measured meanwhile."""
    running = [subprocess.Popen((sys.executable, "-c", "while True: pass")) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def checked(cost: Cost, what: str) -> Cost:
    if cost.exit_code:
        sys.exit(f"{cost.stderr[-4000:]}\n{what} ended with exit {cost.exit_code}")
    return cost


def drop_cache(folder: Path) -> None:
    """Write out all that is dirty and drop the files under `folder` from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# -- what is stored ---------------------------------------------------------------------------------------------


def summarize(runs: Sequence[Run], checkpoint_bytes: int) -> list[Summary]:
    copies = {run.round: run.wall_s for run in runs if run.contender == COPY}
    summaries = []
    for contender in sorted({run.contender for run in runs}, key=_place):
        own = [run for run in runs if run.contender == contender]
        wall_s = statistics.median(run.wall_s for run in own)
        ratios = [run.wall_s / copies[run.round] for run in own if run.round in copies]
        summaries.append(
            Summary(
                contender,
                wall_s,
                cpu_s=statistics.median(run.cpu_s for run in own),
                peak_bytes=max(run.peak_bytes for run in own),
                gb_per_s=checkpoint_bytes / wall_s / 1e9,
                to_copy=statistics.median(ratios) if ratios else None,
                fastest=min(ratios, default=None),
                slowest=max(ratios, default=None),
            )
        )
    return summaries


def _place(contender: str) -> int:
    return [COPY, RAW, STREAMCONV, *(rival.name for rival in RIVALS.values())].index(contender)


def bound_s(raw_s: float, input_bytes: int, encoder_bytes_per_s: float) -> float:
    """The least a quantizing merge could take: what the disk takes, or the encoder, if both work at once."""
    return max(raw_s, input_bytes / encoder_bytes_per_s)


def group_of(results: Mapping[str, Any], kind: str, size: str) -> Mapping[str, Any] | None:
    """What is stored of one kind and size, measured without a load."""
    found = (group for group in results.get("groups", ()) if _key(group) == (kind, size, 0))
    return next(found, None)


def _key(group: Mapping[str, Any]) -> tuple[str, str, int]:
    return group["kind"], group["size"], group.get("load", 0)


def store(path: Path, group: Mapping[str, Any]) -> None:
    """Put `group` in the place of what was stored of its kind, size and load; the others stay."""
    results = load(path)
    others = [old for old in results.get("groups", ()) if _key(old) != _key(group)]
    order = list(KINDS)
    groups = sorted(
        [*others, group], key=lambda one: (order.index(one["kind"]), float(one["size"]), one.get("load", 0))
    )
    save(path, MADE_BY, {"groups": groups})


# -- tables -----------------------------------------------------------------------------------------------------


def title(group: Mapping[str, Any]) -> str:
    source, target = group["kind"].split("-")
    load = group.get("load", 0)
    beside = f", {load} busy process{'es' * (load > 1)} beside" if load else ""
    return f"{source} to {target}, {group['checkpoint_bytes'] / 1e9:.2f} GB{beside}"


def table(group: Mapping[str, Any]) -> str:
    """A table of what is stored of one kind and size."""
    lines = [
        f"| {title(group)} | wall | CPU | CPU-s/GB | peak memory | GB/s | to copying |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in group["medians"]:
        is_bare = row["contender"] in {COPY, RAW}
        cells = (
            row["contender"],
            f"{row['wall_s']:.1f} s",
            f"{row['cpu_s']:.1f} s",
            f"{row['cpu_s'] / group['checkpoint_bytes'] * 1e9:.2f}",
            "" if is_bare else f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{row['gb_per_s']:.2f}",
            "" if row["to_copy"] is None else ratio(row),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(row: Mapping[str, Any]) -> str:
    """The ratio to copying, and between which it lay."""
    if row["contender"] == COPY:
        return "1"
    return f"{row['to_copy']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"


# -- running ----------------------------------------------------------------------------------------------------


def ensure_base(kind: Kind, folder: Path) -> None:
    """Make the 4-bit base of a kind that starts from one, by converting."""
    if not (folder / kind.base).is_dir():
        print(f"converting the base to {kind.base}", file=sys.stderr, flush=True)
        quant = kind.base.removeprefix("base-")
        command = streamconv("convert", "--base", folder / "base", "--quant", quant, "-o", folder / kind.base)
        checked(measure(command), "streamconv convert")


def output_bytes(kind: Kind, folder: Path) -> int:
    """What the merge will write, by running it once; this also warms what is compiled or loaded on first use."""
    merge = contenders(kind, folder, (), 0)[STREAMCONV]
    shutil.rmtree(folder / "out", ignore_errors=True)
    checked(measure(merge), STREAMCONV)
    return folder_bytes(folder / "out")


def run_group(
    kind: Kind,
    size: str,
    folder: Path,
    wanted: Sequence[str],
    rounds: int,
    rival_rounds: int,
    load: int,
    results: Path,
) -> None:
    """All rounds of one kind and size, stored after each; rivals take part in the first of them."""
    ensure_base(kind, folder)
    checkpoint = folder_bytes(folder / kind.base)
    reasons = {
        RIVALS[name].name: refusal(RIVALS[name], checkpoint) for name in wanted if kind.name == "bf16-bf16"
    }
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
    rivals = [rival for rival in RIVALS.values() if rival.name in reasons.keys() - left_out.keys()]
    make_checkpoint.check_disk(folder, int(2.1 * checkpoint) if rivals else int(1.1 * checkpoint))
    written = output_bytes(kind, folder)
    commands = contenders(kind, folder, rivals, written)
    group: dict[str, Any] = {
        "kind": kind.name,
        "size": size,
        "machine": machine(folder),
        "checkpoint_bytes": checkpoint,
        "output_bytes": written,
        "left_out": left_out,
        "load": load,
    }
    if kind.bound:
        rate = measure((sys.executable, "-m", "tools.bench.encoder_rate", str(folder / "base"), kind.quant))
        group["encoder_bytes_per_s"] = float(checked(rate, "the encoder alone").stdout)
    torch_bytes, runs = torch_anon_bytes(), []
    for number in range(rounds):
        print(f"{kind.name}, {size}x, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        names = {rival.name for rival in rivals} if number >= rival_rounds else set()
        at_once = {name: command for name, command in commands.items() if name not in names}
        with busy(load):
            runs += run_round(at_once, folder, number, torch_bytes)
        group |= {
            "medians": [asdict(row) for row in summarize(runs, checkpoint)],
            "runs": [asdict(run) for run in runs],
        }
        if kind.bound:
            group["to_bound"] = statistics.median(to_bound(group).values())
        store(results, group)
    print(f"\n{table(group)}\n", flush=True)
    if kind.bound:
        print(f"{STREAMCONV}: {group['to_bound']:.2f} times the bound of disk and encoder\n", flush=True)


def to_bound(group: Mapping[str, Any]) -> dict[int, float]:
    """Wall time of streamconv over the bound, by round."""
    raw, merge = (
        {run["round"]: run["wall_s"] for run in group["runs"] if run["contender"] == name}
        for name in (RAW, STREAMCONV)
    )
    rate, nbytes = group["encoder_bytes_per_s"], group["checkpoint_bytes"]
    return {number: merge[number] / bound_s(raw[number], nbytes, rate) for number in merge}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    # What is installed has its modules compiled, whatever is asked for where programs are worked on.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for size in options.sizes:
        folder = options.folder / f"{size}x"
        model = MODELS[options.model].of_size(int(float(size) * options.unit))
        if not (folder / "base").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            make_checkpoint.check_disk(folder, int(2.2 * model.nbytes))
            print(f"making a checkpoint of {model.layers} layers in {folder}", file=sys.stderr, flush=True)
            make_checkpoint.make(folder, model, parse_size("5GB"), rank=16, seed=0)
        rivals = options.rivals if size in options.rival_sizes else ()
        for kind in options.kinds:
            rounds = (options.runs, options.rival_runs or options.runs)
            run_group(KINDS[kind], size, folder, rivals, *rounds, options.load, options.results)
            if not options.keep and KINDS[kind].base != "base":
                shutil.rmtree(folder / KINDS[kind].base)
        if not options.keep:
            shutil.rmtree(folder)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=__doc__)
    parser.add_argument("--sizes", type=_numbers, default=("1", "2", "4"), help="in units; default 1,2,4")
    parser.add_argument("--unit", type=parse_size, default=parse_size("6GB"), help="rounded to whole layers")
    parser.add_argument("--kinds", type=_kinds, default=tuple(KINDS), help=f"default {','.join(KINDS)}")
    parser.add_argument("--rivals", type=_rivals, default=tuple(RIVALS), help="in bf16-bf16; or: none")
    parser.add_argument("--rival-sizes", type=_numbers, default=("1",), help="sizes they run at; default 1")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds of each kind and size")
    parser.add_argument(
        "--rival-runs", type=int, metavar="N", help="rounds that rivals take part in; default all"
    )
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="busy processes beside; default none"
    )
    parser.add_argument("--model", choices=MODELS, default="llama-8b", help="whose widths the checkpoint has")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints are made and merged")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there for another run")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-merge.json")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[str, ...]:
    """Sizes as they were written."""
    for size in text.split(","):
        float(size)
    return tuple(text.split(","))


def _kinds(text: str) -> tuple[str, ...]:
    return _listed(text, KINDS)


def _rivals(text: str) -> tuple[str, ...]:
    return _listed(text, RIVALS)


def _listed(text: str, known: Mapping[str, object]) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is not known; use {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
