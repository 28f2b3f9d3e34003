"""Several runs into one folder: the same one again, another one, and two at once."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.commands import Commands
from tests.hostile.test_kill import tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=72, layers=2, vocabulary=90)
WORK = ".streamconv"


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def merge(self, out: Path, *options: str) -> tuple[str, ...]:
        return ("merge", "--base", str(self.base), "--adapter", str(self.adapter), "-o", str(out), *options)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes)
    return Inputs(write_base(tmp_path / "base", SIZES.shapes, shards=2), adapter)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_finished_run_given_again_changes_nothing(commands: Commands, inputs: Inputs, out: Path) -> None:
    first = commands.run(*inputs.merge(out, "--quant", "nf4"))
    assert first.code == 0, first.text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = commands.run(*inputs.merge(out, "--quant", "nf4", "--json"))
    assert again.code == 0
    assert again.calls == ()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    report = json.loads(again.text[again.text.index("{") :])  # after what was said of reading it again
    assert report["resumed"]
    assert report["kept_delta"] == json.loads((out / "streamconv.json").read_text())["kept_delta"]


def test_other_options_into_a_finished_folder_are_refused(
    commands: Commands, inputs: Inputs, out: Path
) -> None:
    assert commands.run(*inputs.merge(out)).code == 0
    before = tree(out)
    refused = commands.run(*inputs.merge(out, "--quant", "nf4"))
    assert refused.code == 4
    assert "is not empty" in refused.text
    assert tree(out) == before


@pytest.mark.parametrize("since", ["fsync journal.jsonl", "replace .config.json.partial"])
def test_other_options_into_an_unfinished_folder_are_refused_naming_them(
    commands: Commands, inputs: Inputs, out: Path, since: str
) -> None:
    """With a shard done, and with everything but config.json in place."""
    assert commands.run(*inputs.merge(out.with_name("whole"))).code == 0
    assert commands.run(*inputs.merge(out), at=1, since=since).code == -signal.SIGKILL
    before = tree(out)
    refused = commands.run(*inputs.merge(out, "--quant", "nf4"))
    assert refused.code == 4
    assert "holds an unfinished run with other inputs or options" in refused.text
    assert 'options.quant: then "keep", now "nf4"' in refused.text
    assert {name: content for name, content in tree(out).items() if name != f"{WORK}/lock"} == {
        name: content for name, content in before.items() if name != f"{WORK}/lock"
    }
    assert commands.run(*inputs.merge(out)).code == 0
    assert tree(out) == tree(out.with_name("whole"))


def test_no_resume_starts_anew_with_other_options(commands: Commands, inputs: Inputs, out: Path) -> None:
    assert commands.run(*inputs.merge(out.with_name("whole"), "--quant", "nf4")).code == 0
    assert commands.run(*inputs.merge(out), at=30).code == -signal.SIGKILL
    assert (out / WORK).exists()
    assert commands.run(*inputs.merge(out, "--quant", "nf4", "--no-resume")).code == 0
    assert tree(out) == tree(out.with_name("whole"))


def test_a_killed_rerun_of_a_finished_job_can_be_run_again(
    commands: Commands, inputs: Inputs, out: Path
) -> None:
    assert commands.run(*inputs.merge(out)).code == 0
    whole = tree(out)
    for options in (("--no-resume",), ()):
        assert commands.run(*inputs.merge(out, "--no-resume"), at=25).code == -signal.SIGKILL
        assert (out / "config.json").exists()
        assert commands.run(*inputs.merge(out, *options)).code == 0
        assert tree(out) == whole


def test_of_two_runs_at_once_the_second_is_told_who_is_first(
    commands: Commands, inputs: Inputs, out: Path
) -> None:
    assert commands.run(*inputs.merge(out.with_name("whole"))).code == 0
    first = commands.run(*inputs.merge(out), at=20, signal=signal.SIGSTOP)
    assert first.code == -signal.SIGSTOP
    before = tree(out)
    for options in ((), ("--quant", "nf4"), ("--no-resume",), ("--overwrite",)):
        second = commands.run(*inputs.merge(out, *options))
        assert second.code == 4
        assert f"{out} is in use by another run (process {first.process} on " in second.text
    assert tree(out) == before
    assert commands.run(goes_on=first.process).code == 0
    assert tree(out) == tree(out.with_name("whole"))


def test_what_was_refused_for_its_quality_may_be_replaced(
    commands: Commands, inputs: Inputs, out: Path
) -> None:
    """The gate: exit 7, nothing under a final name; again at once; then accepted, or made otherwise."""
    options = ("--quant", "nf4", "--rounding", "nearest", "--min-kept", "1")
    for _ in range(2):
        refused = commands.run(*inputs.merge(out, *options))
        assert refused.code == 7
        assert "of the fine-tune survives" in refused.text
        assert os.listdir(out) == [WORK]
    accepted = commands.run(*inputs.merge(out, *options[:-1], "0"))
    assert accepted.code == 0
    assert accepted.starts == {}  # nothing is computed again
    other = out.with_name("other")
    assert commands.run(*inputs.merge(other, *options)).code == 7
    assert commands.run(*inputs.merge(other)).code == 0
