"""The proof that memory does not depend on the model: 20 GB with the layer widths of a 70B model, in 1.5 GiB.

The whole process, interpreter and torch included, runs inside a limit that ends it if it takes more; that the limit
holds is tried out first. `RssAnon` is what the process itself cannot give back, sampled; `peak` is what the kernel
counted, where it says, with the cache of the files read and written: that fills whatever the limit leaves.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamconv.sizes import parse_size
from tools.bench import make_checkpoint
from tools.bench.merge import checked, drop_cache, streamconv
from tools.bench.models import MODELS
from tools.bench.results import FOLDER, RESULTS, machine, save
from tools.measure import folder_bytes, measure, torch_anon_bytes

# -- a command inside a memory limit -----------------------------------------------------------------------------
#
# By the strictest means that this machine allows. A control group counts all that its processes cause, page cache
# included, which the kernel takes back under pressure (cgroups(7); Documentation/admin-guide/cgroup-v2.rst and
# cgroup-v1/memory.rst). RLIMIT_DATA bounds what a process may allocate, not what it touches (setrlimit(2)): it is the
# last resort.

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


# -- the proof ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proof:
    """One merge inside the limit; `anon_bytes` is the highest RssAnon seen, of the whole process."""

    output: str
    input_bytes: int
    output_bytes: int
    wall_s: float
    cpu_s: float
    anon_bytes: int
    anon_above_torch_bytes: int
    counted_peak_bytes: int | None


def prove(folder: Path, output: str, limit: Limit, torch_bytes: int) -> Proof:
    """Merge `folder/base` to `output` (`bf16` or a format), which is removed again."""
    base, out = folder / "base", folder / "out"
    quant = "keep" if output == "bf16" else output
    inputs = ("--base", base, "--adapter", folder / "adapter")
    shutil.rmtree(out, ignore_errors=True)
    drop_cache(folder)
    command = streamconv("merge", *inputs, "--quant", quant, "-o", out)
    cost = checked(measure(limit.wrap(command)), f"the merge to {output} inside {limit.name}")
    written = folder_bytes(out)
    shutil.rmtree(out)
    return Proof(
        output=output,
        input_bytes=folder_bytes(base),
        output_bytes=written,
        wall_s=cost.wall_s,
        cpu_s=cost.cpu_s,
        anon_bytes=cost.peak_anon_bytes,
        anon_above_torch_bytes=max(0, cost.peak_anon_bytes - torch_bytes),
        counted_peak_bytes=limit.peak(),
    )


HEADER = (
    "| output | read | written | wall | GB/s | RssAnon | above torch | peak |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
)


def row(proof: Mapping[str, Any]) -> str:
    """One line of the table, from a result as it is stored."""
    counted = proof["counted_peak_bytes"]
    cells = (
        proof["output"],
        f"{proof['input_bytes'] / 1e9:.1f} GB",
        f"{proof['output_bytes'] / 1e9:.1f} GB",
        f"{proof['wall_s']:.0f} s",
        f"{proof['input_bytes'] / proof['wall_s'] / 1e9:.2f}",
        f"{proof['anon_bytes'] / 2**20:.0f} MiB",
        f"{proof['anon_above_torch_bytes'] / 2**20:.0f} MiB",
        "not counted" if counted is None else f"{counted / 2**20:.0f} MiB",
    )
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/outofcore", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=parse_size("21GB"), help="rounded to whole layers")
    parser.add_argument("--limit", type=parse_size, default=parse_size("1.5GiB"))
    parser.add_argument("--outputs", default="nf4-dq,bf16", help="formats, one after the other")
    parser.add_argument(
        "--model", choices=MODELS, default="llama-70b", help="whose widths the checkpoint has"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER / "outofcore")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there for another run")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench-outofcore.json")
    options = parser.parse_args(arguments)
    folder, model = options.folder, MODELS[options.model].of_size(options.size)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        make_checkpoint.check_disk(folder, int(2.1 * model.nbytes))
        print(
            f"making {model.layers} layers, {model.nbytes / 1e9:.1f} GB, in {folder}",
            file=sys.stderr,
            flush=True,
        )
        make_checkpoint.make(folder, model, parse_size("5GB"), rank=16, seed=0)
    torch_bytes, proofs = torch_anon_bytes(), []
    about = {
        "machine": machine(folder),
        "model": options.model,
        "layers": model.layers,
        "limit_bytes": options.limit,
    }
    for output in options.outputs.split(","):
        with memory_limit(options.limit) as limit:  # a new one each: peaks are not reset
            print(f"merging to {output} inside {limit.name}", file=sys.stderr, flush=True)
            proofs.append(asdict(prove(folder, output, limit, torch_bytes)))
            about["limited_by"] = limit.name
        save(options.results, "tools/bench/outofcore", {**about, "proofs": proofs})
    if not options.keep:
        shutil.rmtree(folder)
    print(f"\n{about['limited_by']}, {options.limit / 2**20:.0f} MiB\n")
    print("\n".join((*HEADER, *map(row, proofs))), flush=True)


if __name__ == "__main__":
    main()
