"""A merge into NVFP4 that is killed in its survey, or after it, and run again gives the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.hostile.commands import Commands
from tests.hostile.test_kill import check_final_names, tree
from tests.hostile.test_kill_calibrated import Case
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=50)
FOUND = "greatest.json"


@pytest.fixture(scope="module")
def case(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("surveyed")
    base = write_base(folder / "base", SIZES.shapes)
    adapter = write_adapter(folder / "adapter", SIZES.shapes)
    paths = ("merge", "--base", base, "--adapter", adapter, "--quant", "nvfp4a16", "--device", "cpu")
    case = Case(commands, tuple(map(str, paths)))
    done = case.run(folder / "out")
    assert done.code == 0, done.text
    return Case(commands, case.arguments, done.calls, tree(folder / "out"))


def test_killed_anywhere_and_run_again_the_folder_is_the_same(case: Case, tmp_path: Path) -> None:
    assert case.complete is not None
    (named,) = (at for at, call in enumerate(case.calls, 1) if call.startswith("replace") and FOUND in call)
    # Before it is found, when it is, and in the midst of what is made with it.
    points = [named - 2, named, named + 1, named + (len(case.calls) - named) // 2]
    for number, at in enumerate(points):
        out = tmp_path / str(at)
        killed = case.run(out, at, tears=number % 2 == 0)
        assert killed.code == -signal.SIGKILL
        check_final_names(out, case.complete)
        is_found = at > named
        assert (out / ".streamconv" / "survey" / FOUND).exists() == is_found
        again = case.run(out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"


def test_what_a_survey_left_is_not_taken_if_a_bit_of_it_flips(case: Case, tmp_path: Path) -> None:
    (named,) = (at for at, call in enumerate(case.calls, 1) if call.startswith("replace") and FOUND in call)
    case.run(tmp_path / "out", named + 1)
    path = tmp_path / "out" / ".streamconv" / "survey" / FOUND
    path.write_bytes(path.read_bytes().replace(b"0x1.", b"0x3."))  # a bit of every number
    again = case.run(tmp_path / "out")
    assert again.code == 0, again.text
    assert tree(tmp_path / "out") == case.complete
