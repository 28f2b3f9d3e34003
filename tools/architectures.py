"""Tries streamconv on tiny models of many architectures, with adapters by several versions of PEFT and transformers.

For each architecture and form of adapter, an interpreter of the environment named makes model and adapter and saves
the answers of the live model and the weights of PEFT's own merge (tools/architecture_adapters.py). Then `streamconv
merge` is run as a command on the files, and transformers opens the result. It is right if every weight is that of
PEFT's merge, and the logits are those of the live model, within `TOLERANCE` in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from streamconv.cli import main as streamconv_command
from tools.architecture_models import ARCHITECTURES, LIVE_DIFFERS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "results" / "architectures.json"
TOLERANCE = 1e-5
LEFT_OUT = "left_out.txt"
OUTCOMES = ("right", "merge", "refused", "none", "wrong")
FORMS = ("usual", "all-linear", "parameters")


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions that train: `packages` take the place of those of `.venv`."""

    name: str
    packages: tuple[str, ...]
    forms: tuple[str, ...]
    # Only architectures with experts, for whose adapters versions of PEFT have forms of their own.
    experts_only: bool = True


# requests and what it needs are what transformers 4 asks for beside its own.
_WITH_TRANSFORMERS_4 = (
    "transformers==4.57.6",
    "huggingface-hub==0.36.2",
    "tokenizers==0.22.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.3",
    "idna==3.20",
    "certifi==2026.10.19.post1",
)
ENVIRONMENTS = (
    Environment("peft-0.21", (), FORMS, experts_only=False),
    Environment("peft-0.19", ("peft==0.19.1",), FORMS),
    Environment("peft-0.18", ("peft==0.18.1",), ("usual", "parameters")),
    Environment(
        "peft-0.18-transformers-4", ("peft==0.18.1", *_WITH_TRANSFORMERS_4), FORMS, experts_only=False
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One try. `outcome` is right, merge (equal to PEFT's merge, which is not its live model), refused (by streamconv),
    none (the libraries make no such adapter) or wrong.

    `logits` is the norm of the difference over that of the live model's logits, `weights` the greatest such figure
    of a weight of the model, `merge` of the logits from those of PEFT's merge, `base` of the base's logits in both
    versions of transformers; None where nothing was opened. `said` is why, or what the command noted.
    """

    architecture: str
    kind: str
    environment: str
    form: str
    outcome: str
    logits: float | None = None
    weights: float | None = None
    merge: float | None = None
    base: float | None = None
    said: str = ""


def installed(environment: Environment, folder: Path) -> Mapping[str, str]:
    """Variables under which an interpreter of `.venv` has the environment's packages, installed where they are not."""
    place = folder / environment.name
    stamp = place / "made-from"
    if environment.packages and (not stamp.exists() or stamp.read_text() != "\n".join(environment.packages)):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        print(f"Installing {environment.packages[0]} into {place} ...", flush=True)
        subprocess.run([*pip, "--upgrade", "--target", str(place), *environment.packages], check=True)
        stamp.write_text("\n".join(environment.packages))
    path = os.pathsep.join([str(place), str(ROOT)] if environment.packages else [str(ROOT)])
    return os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }


def tried_in(environment: Environment, names: Sequence[str]) -> list[str]:
    return [name for name in names if not environment.experts_only or "experts" in ARCHITECTURES[name].kind]


def make(environment: Environment, names: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
    """Models and adapters of `names` by the environment's libraries."""
    line = [sys.executable, "-W", "ignore", "-m", "tools.architecture_adapters", str(folder)]
    subprocess.run(
        [*line, ",".join(environment.forms), *names],
        env=dict(variables),
        check=True,
        stderr=subprocess.DEVNULL,
    )


def forms_of(name: str, environment: Environment) -> Iterator[str]:
    for form in environment.forms:
        if form != "parameters" or "experts" in ARCHITECTURES[name].kind:
            yield form


def attempt(given: tuple[Path, str, str, str]) -> Outcome:
    """Merge by the command (folder, architecture, environment and form are given), and judge what it wrote."""
    folder, name, environment, form = given
    case = folder / name / form
    head = (name, ARCHITECTURES[name].kind, environment, form)
    for place in (folder / name / "base", case):
        if (place / LEFT_OUT).exists():
            return Outcome(*head, "none", said=(place / LEFT_OUT).read_text().strip())
    try:
        base = opened(name, folder / name / "base")
    except Exception as error:  # a base of other versions
        said = f"transformers {transformers.__version__} does not open the base itself: {_short(error)}"
        return Outcome(*head, "none", said=said)
    out = case / "out"
    line = [
        "merge",
        "--base",
        str(folder / name / "base"),
        "--adapter",
        str(case / "adapter"),
        "-o",
        str(out),
    ]
    ran = CliRunner().invoke(streamconv_command, [*line, "--json", "--quiet"])
    if ran.exit_code:
        said = " ".join(ran.stderr.split()).replace(f"{folder}/", "")[-1200:]
        return Outcome(*head, "refused" if ran.exit_code == 3 else "wrong", said=said or repr(ran.exception))
    try:
        found = judged(name, base, case, out)
    except Exception as error:  # whatever a loader says of our files is a finding
        return Outcome(*head, "wrong", said=_short(error))
    outcome, reason = verdict(name, found)
    notes = reason or " ".join(json.loads(ran.stdout).get("notes", ()))
    return Outcome(*head, outcome, found.logits, found.weights, found.merge, found.base, notes)


@dataclass(frozen=True, slots=True)
class Differences:
    """Relative differences, as those of `Outcome`."""

    logits: float
    weights: float
    merge: float
    base: float


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def judged(name: str, base: Any, case: Path, out: Path) -> Differences:
    inputs = load_file(case / "expected.safetensors")
    expected, base_expected = inputs.pop("logits"), inputs.pop("base_logits")
    model, merged = opened(name, out), opened(name, case / "merged")
    with torch.no_grad():
        logits, merged_logits = model(**inputs).logits, merged(**inputs).logits
        base_logits = base(**inputs).logits
    found, wanted = model.state_dict(), merged.state_dict()
    if found.keys() != wanted.keys():
        raise ValueError(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:4]}")
    floating = [key for key, tensor in wanted.items() if tensor.is_floating_point()]
    return Differences(
        logits=relative(logits, expected),
        weights=float(torch.tensor([relative(found[key], wanted[key]) for key in floating]).max()),
        merge=relative(logits, merged_logits),
        base=relative(base_logits, base_expected),
    )


def verdict(name: str, found: Differences) -> tuple[str, str]:
    """Outcome, and the reason where the live model is no measure. A figure that is no number makes it wrong."""
    if not (found.weights < TOLERANCE and found.merge < TOLERANCE):
        return "wrong", ""
    if found.logits < TOLERANCE:
        return "right", ""
    if not found.base < TOLERANCE:
        return "merge", "the versions of transformers compute other logits from the very same base"
    return ("merge", LIVE_DIFFERS[name]) if name in LIVE_DIFFERS else ("wrong", "")


def opened(name: str, folder: Path) -> Any:
    """The model in `folder` by the installed transformers, in float32; no key may be missing or left over."""
    loader = getattr(transformers, ARCHITECTURES[name].loader)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, complaints = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(complaints.values()):
        raise ValueError(f"{folder.name}: { ({key: value for key, value in complaints.items() if value}) }")
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-9))


def try_all(names: Sequence[str], folder: Path, environments: Path, jobs: int) -> dict[str, Any]:
    """Contents of docs/results/architectures.json: versions of each environment, and every try."""
    outcomes: list[Outcome] = []
    versions = {}
    for environment in ENVIRONMENTS:
        tried = tried_in(environment, names)
        if tried:
            place = folder / environment.name
            make_all(environment, tried, place, installed(environment, environments), jobs)
            outcomes += attempt_all(environment, tried, place, jobs)
            versions[environment.name] = json.loads((place / "versions.json").read_text())
    tries = [asdict(outcome) for outcome in outcomes]
    return {"environments": versions, "tolerance": TOLERANCE, "outcomes": tries}


def make_all(
    environment: Environment, names: Sequence[str], place: Path, variables: Mapping[str, str], jobs: int
) -> None:
    shares = [names[start::jobs] for start in range(min(jobs, len(names)))]
    with ThreadPoolExecutor(jobs) as threads:
        for made in [threads.submit(make, environment, share, place, variables) for share in shares]:
            made.result()


def attempt_all(environment: Environment, names: Sequence[str], place: Path, jobs: int) -> Iterator[Outcome]:
    """Outcomes in order, each shown as it comes."""
    cases = [(place, name, environment.name, form) for name in names for form in forms_of(name, environment)]
    # Forked, so that the libraries are loaded once.
    with multiprocessing.get_context("fork").Pool(jobs) as processes:
        for outcome in processes.imap(attempt, cases):
            print(*_line(outcome), flush=True)
            yield outcome


def record(results: dict[str, Any], names: Sequence[str]) -> None:
    """Put `results` in place of what is recorded; where they are of some `names` alone, of those."""
    if names:
        kept = [
            each for each in json.loads(TARGET.read_text())["outcomes"] if each["architecture"] not in names
        ]
        order = {environment.name: place for place, environment in enumerate(ENVIRONMENTS)}
        rows = {name: place for place, name in enumerate(ARCHITECTURES)}
        results["outcomes"] = sorted(
            [*kept, *results["outcomes"]],
            key=lambda each: (order[each["environment"]], rows[each["architecture"]]),
        )
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


def _line(outcome: Outcome) -> tuple[str, ...]:
    measured = "" if outcome.logits is None else f"{outcome.logits:.1e} {outcome.weights:.1e}"
    said = outcome.said if outcome.outcome in ("wrong", "refused") else ""
    return (outcome.architecture, outcome.environment, outcome.form, outcome.outcome, measured, said)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/architectures", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="ARCHITECTURE", help="only these; the record keeps the others"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv" / "architectures")
    parser.add_argument(
        "--folder", type=Path, help="keep models and results here (default: a scratch folder)"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        results = try_all(given.names or list(ARCHITECTURES), folder, given.environments, given.jobs)
    outcomes = results["outcomes"]
    counts = {key: sum(each["outcome"] == key for each in outcomes) for key in OUTCOMES}
    print(f"{counts} in {time.monotonic() - started:.0f} s")
    record(results, given.names)
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
