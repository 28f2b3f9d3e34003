"""Several workers make one output on a folder they share: bytes are those of one process, whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import streamconv
from streamconv.output.journal import Journal
from streamconv.sizes import format_size
from tests.gguf.bases import write_llama
from tests.hostile.commands import Commands, Outcome
from tests.hostile.test_kill import Tree, check_final_names, spread, tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=90)
WORK = ".streamconv"
# The first call for a shard: the lock of the whole is free then.
WRITING = "pwrite model-00003-of-00005.safetensors.partial"
FORMATS = {
    "keep": (),
    "nf4-dq": ("--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "20kB"),
    "gguf": ("--quant", "gguf:q8_0", "--max-shard-size", "60kB"),
    # with a pass before
    "nvfp4a16": ("--quant", "nvfp4a16", "--max-shard-size", "20kB"),
}
FINISHING = "replace model-00003-of-00005.safetensors.partial"


@dataclass(frozen=True)
class Case:
    """A command without its --out, and the folder that it gives when one process makes all."""

    commands: Commands
    arguments: tuple[str, ...]
    complete: Tree

    def run(self, out: Path, *options: str, at: int | None = None, kill: int = signal.SIGKILL) -> Outcome:
        return self.commands.run(
            *self.arguments, "-o", out, *options, at=at, signal=kill, watermark_bytes=10_000
        )

    def part(
        self, out: Path, part: str, *options: str, at: int | None = None, kill: int = signal.SIGKILL
    ) -> Outcome:
        return self.run(out, "--part", part, *options, at=at, kill=kill)

    def done(self, out: Path, part: str, *options: str) -> Outcome:
        made = self.part(out, part, *options)
        assert made.code == 0, made.text
        return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_base(folder / "base", SIZES.shapes, shards=5)
    write_llama(folder / "llama", replace(SIZES, vocabulary=300))
    write_adapter(folder / "adapter", SIZES.shapes)
    write_adapter(folder / "other", SIZES.shapes, seed=2)
    return folder


def made_alone(commands: Commands, inputs: Path, name: str, adapter: str = "adapter") -> Case:
    base = inputs / ("llama" if name == "gguf" else "base")
    arguments = (
        "merge",
        "--base",
        str(base),
        "--adapter",
        str(inputs / adapter),
        "--device",
        "cpu",
        *FORMATS[name],
    )
    out = inputs / f"{name}-of-{adapter}"
    done = commands.run(*arguments, "-o", out)
    assert done.code == 0, done.text
    return Case(commands, arguments, tree(out))


@pytest.fixture(scope="module")
def case(commands: Commands, inputs: Path) -> Case:
    return made_alone(commands, inputs, "keep")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "order"), [("keep", "12"), ("nf4-dq", "3142"), ("gguf", "21"), ("nvfp4a16", "21")]
)
def test_parts_give_the_bytes_of_one_process(
    commands: Commands, inputs: Path, out: Path, name: str, order: str
) -> None:
    """Shards, index, manifest, card, recipe and config, whoever comes last."""
    case, made = made_alone(commands, inputs, name), dict[str, str]()
    for number in order:
        assert not set(os.listdir(out) if out.exists() else ()) - {WORK}, (
            "nothing is in place before all is made"
        )
        report = json.loads(case.done(out, f"{number}/{len(order)}", "--json", "--quiet").text)
        assert report["part"] == f"part {number} of {len(order)}"
        is_last = number == order[-1]
        assert is_last == (report["left"] is None)
        if not is_last:
            assert not made.keys() & report["shards"].keys()
            made |= report["shards"]
    assert tree(out) == case.complete
    assert made.items() <= report["shards"].items()
    assert len(report["shards"]) > len(made) > 0


def test_all_at_once(inputs: Path, commands: Commands, tmp_path: Path) -> None:
    """Of a format with a pass before: one worker carries it out, the others wait for it."""
    case = made_alone(commands, inputs, "nvfp4a16")

    def make(number: int) -> streamconv.Report:
        return streamconv.merge(
            inputs / "base",
            inputs / "adapter",
            tmp_path / "out",
            quant="nvfp4a16",
            max_shard_size="20kB",
            device="cpu",
            part=f"{number}/3",
        )

    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(make, (1, 2, 3)))
    assert tree(tmp_path / "out") == case.complete
    assert any(report.left is None for report in reports)


def test_while_a_part_is_made_nobody_else_takes_it_or_puts_the_output_in_place(
    case: Case, inputs: Path, out: Path
) -> None:
    stopped = case.commands.run(
        *case.arguments, "-o", out, "--part", "1/2", since=WRITING, at=1, signal=signal.SIGSTOP
    )
    assert stopped.code == -signal.SIGSTOP
    other = str(inputs / "other")
    process = f"part 1 of 2, process {stopped.process} on "
    for refused, message in (
        (case.part(out, "1/2"), f"part 1 of 2 of {out} is in use by another run ({process}"),
        (case.part(out, "1/3"), f"is being made in another number of parts ({process}"),
        (
            case.part(out, "2/2", "--seed", "7"),
            "options.seed: then 0, now 7), and all parts of an output need the same",
        ),
        (case.part(out, "2/2", "--adapter", other), "(adapter: then "),
        (case.run(out), f"{out} is in use by another run ({process}"),
        (case.run(out, "--no-resume"), f"{out} is in use by another run ({process}"),
        (case.run(out, "--overwrite"), f"{out} is in use by another run ({process}"),
        (case.commands.run("verify", out), f"{out} is being written by another run ({process}"),
    ):
        assert (refused.code, message in refused.text) == (4, True), refused.text
    second = case.done(out, "2/2")
    assert "part 2 of 2 is made" in second.text
    assert "2 files are left" in second.text or "3 files are left" in second.text
    first = case.commands.run(goes_on=stopped.process)
    assert first.code == 0, first.text
    assert tree(out) == case.complete


def test_of_workers_that_are_done_the_last_alone_puts_the_output_in_place(case: Case, out: Path) -> None:
    """All files are there, and one that made some of them has not ended yet."""
    case.done(out, "1/2")
    other = Journal(out, {}, resume=True, part="part-1-of-2", worker="part 1 of 2")
    other.lock()
    early = case.done(out, "2/2")
    assert "all files are made; a worker that is still at it puts the output in place" in early.text
    assert os.listdir(out) == [WORK]
    other.close()
    case.done(out, "1/2")
    assert tree(out) == case.complete


def test_a_part_is_refused_while_one_process_makes_all(case: Case, out: Path) -> None:
    stopped = case.run(out, at=25, kill=signal.SIGSTOP)
    refused = case.part(out, "1/2")
    assert refused.code == 4
    assert f"{out} is in use by another run (process {stopped.process} on " in refused.text
    assert case.commands.run(goes_on=stopped.process).code == 0
    assert tree(out) == case.complete


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_part_that_was_stopped_anywhere_is_finished_by_a_rerun_of_it_or_without_parts(
    case: Case, tmp_path: Path, kill: signal.Signals
) -> None:
    calls = case.done(tmp_path / "undisturbed", "2/3").calls
    for number, at in enumerate(spread(len(calls) - 15, 4)):
        out = tmp_path / str(at)
        case.done(out, "1/3")
        stopped = case.part(out, "2/3", at=at, kill=kill)
        assert stopped.code in ((-kill,) if kill == signal.SIGKILL else (128 + kill, 0)), stopped.text
        if number % 2:
            assert not set(os.listdir(out)) - {WORK}
            case.done(out, "2/3")
            case.done(out, "3/3")
        else:
            again = case.run(out)
            assert again.code == 0, again.text
        assert tree(out) == case.complete, f"stopped at {at}, {calls[at - 1]}"


def test_the_last_worker_may_be_killed_anywhere_while_it_puts_all_together(
    case: Case, tmp_path: Path
) -> None:
    def all_but_the_last(out: Path) -> None:
        for part in ("1/3", "3/3"):
            case.done(out, part)

    all_but_the_last(tmp_path / "undisturbed")
    calls = case.done(tmp_path / "undisturbed", "2/3").calls
    # From where its own part is made: journal and shards of the others are taken over, and all is put in place.
    first = max(at for at, call in enumerate(calls, 1) if call.endswith(".safetensors.partial"))
    for number, at in enumerate(range(first, len(calls) + 1, max(1, (len(calls) - first) // 5))):
        out = tmp_path / str(at)
        all_but_the_last(out)
        assert case.part(out, "2/3", at=at).code == -signal.SIGKILL
        check_final_names(out, case.complete)
        again = case.run(out) if number % 3 == 0 else case.part(out, f"{number % 3}/3")
        assert again.code == 0, f"killed at {at}, {calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {calls[at - 1]}"


def test_another_number_of_parts_keeps_what_was_made(case: Case, out: Path) -> None:
    case.done(out, "2/2")
    killed = case.part(out, "1/2", at=25)
    assert killed.code == -signal.SIGKILL
    made = {number: case.done(out, f"{number}/4") for number in (4, 3, 2, 1)}
    assert tree(out) == case.complete
    begun = [name for each in made.values() for name in each.starts]
    kept = {name for name in case.complete if name.endswith(".safetensors")} - set(begun)
    assert len(kept) >= 2, "files of the second of two parts were made again"


def test_what_one_process_has_left_is_kept(case: Case, out: Path) -> None:
    killed = case.run(out, at=100)
    assert killed.code == -signal.SIGKILL
    done = [path.name for path in (out / WORK).glob("*.safetensors")]
    assert done
    parts = [case.done(out, part) for part in ("1/2", "2/2")]
    assert not {name for part in parts for name in part.starts} & set(done)
    assert tree(out) == case.complete


def test_more_parts_than_files(case: Case, out: Path) -> None:
    for number in range(1, 8):
        case.done(out, f"{number}/7")
    assert tree(out) == case.complete


def test_a_worker_that_is_started_once_more_finds_what_all_have_made(
    case: Case, inputs: Path, out: Path
) -> None:
    """As a batch system does; --overwrite replaces another model, and not this one again."""
    other = made_alone(case.commands, inputs, "keep", "other")
    assert other.run(out).code == 0
    assert "is not empty" in case.part(out, "1/2").text
    for part in ("1/2", "2/2"):
        assert other.complete.items() <= tree(out).items()
        case.done(out, part, "--overwrite")
    assert tree(out) == case.complete
    again = case.done(out, "1/2", "--overwrite")
    assert "was complete already" in again.text
    assert again.calls == ()


def test_a_shard_that_was_changed_before_all_is_put_together_is_made_anew(case: Case, out: Path) -> None:
    case.done(out, "1/2")
    first = min((out / WORK / "part-1-of-2").glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    last = case.done(out, "2/2")
    assert first.name in last.starts
    assert tree(out) == case.complete


def test_other_options_are_refused_where_a_part_was_left(case: Case, out: Path) -> None:
    killed = case.commands.run(*case.arguments, "-o", out, "--part", "1/2", since=FINISHING, at=2)
    assert killed.code == -signal.SIGKILL
    refused = case.part(out, "1/2", *FORMATS["nf4-dq"])
    assert refused.code == 4
    assert "inputs, options, versions or another kind of CPU or GPU (" in refused.text
    assert f"delete {out / WORK} while nothing is at work there to discard it" in refused.text
    whole = case.run(out, "--quant", "nf4")
    assert (whole.code, "pass --no-resume to discard it" in whole.text) == (4, True)
    assert case.run(out, "--quant", "nf4", "--no-resume").code == 0
    assert not (out / WORK).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--no-resume",),
            "--no-resume with --part would have each worker discard what the others have made",
        ),
        (("--also", "nf4"), "--part is for one output"),
        (("--low-disk",), "--low-disk with --part would have a worker remove shards"),
        (("--push-to", "me/merged"), "--push-to is for one worker that makes all"),
        (
            ("--max-shard-size", "1GB"),
            "the output is one file, and part 1 of 2 would be all of it or nothing",
        ),
    ],
)
def test_what_parts_cannot_do_is_refused_before_anything_is_written(
    case: Case, out: Path, options: tuple[str, ...], message: str
) -> None:
    refused = case.part(out, "1/2", *options)
    assert (refused.code, message in refused.text) == (2, True), refused.text
    assert not out.exists()


def test_the_plan_of_a_part_names_its_files(case: Case, out: Path) -> None:
    plan = ("plan", *case.arguments[1:], "--part", "2/2", "-o", str(out))
    shown = json.loads(case.commands.run(*plan, "--json").text)["part"]
    assert (shown["number"], shown["count"]) == (2, 2)
    made = json.loads(case.done(out, "2/2", "--json", "--quiet").text)
    assert shown["files"] == sorted(made["shards"])
    text = case.commands.run(*plan).text
    assert (
        f"\npart      2 of 2: {format_size(made['bytes_written'])} in {len(made['shards'])} files\n" in text
    )
