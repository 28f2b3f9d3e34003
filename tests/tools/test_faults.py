"""How a run with a fault is judged, and which faults are tried; a part of the sweep itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.fault_calls import END, ERRORS, KILL, ONCE_ONLY, SHORT, Fault, allowed, role
from tools.fault_judge import (
    Ended,
    Made,
    accepted,
    is_complete,
    judge,
    judge_again,
    tree,
    visible,
    was_hit,
    wrong_files,
)
from tools.fault_runs import Row, hits_in
from tools.faults import mended, outcomes, planned, results, spread, table, write

COMPLETE = {"config.json": "c", "model.safetensors": "m", "README.md": "r"}
OLD = {"config.json": "C", "model.safetensors": "M", "notes.txt": "n"}
MADE = Made(COMPLETE)
EIO = Fault("bf16", "pwrite64", "EIO", 3)
REFUSED = Ended(4, "Error: out cannot be written: Input/output error", 0.1, ("hit",))


@pytest.mark.parametrize("text", ["bf16 pwrite64 EIO 17", "nf4-dq fsync ENOSPC 3+"])
def test_a_fault_is_read_as_it_is_written(text: str) -> None:
    assert str(Fault.parse(text)) == text


def test_a_call_that_is_not_injected_is_refused() -> None:
    with pytest.raises(ValueError, match="reboot is none of"):
        Fault.parse("bf16 reboot EIO 1")


@pytest.mark.parametrize(
    ("text", "injection"),
    [
        ("bf16 read EIO 2", "inject=read:error=EIO:when=2"),
        ("bf16 read EIO 2+", "inject=read:error=EIO:when=2+"),
        (f"bf16 read {END} 2", "inject=read:retval=0:when=2"),
        (f"bf16 rename {KILL} 2", "inject=rename:signal=SIGKILL:when=2"),
    ],
)
def test_what_strace_is_told(text: str, injection: str) -> None:
    assert Fault.parse(text).injection == injection


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('1 openat(AT_FDCWD</home>, "/w/in/config.json", O_RDONLY) = -1 EIO', "input"),
        ("1 pwrite64(16</w/out/.streamconv/a.partial>, ..., 5, 0) = -1 EIO", "output"),
        ('1 unlinkat(5</w/out>, "lock", 0) = -1 EIO', "output"),
        ("1 write(2</w/text>, ..., 5) = -1 EIO", "terminal"),
        ("1 read(3</proc/1/status>, ..., 5) = -1 EIO", "system"),
        ("1 close(3</w/outside>) = -1 EIO", "system"),
        ("1 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, -1, 0) = -1 ENOMEM", "system"),
    ],
)
def test_whose_file_was_hit(line: str, expected: str) -> None:
    roots = {"/w/out": "output", "/w/in": "input", "/w/text": "terminal"}
    assert role(line, roots) == expected


@pytest.mark.parametrize(
    ("fault", "roles", "codes"),
    [
        ("bf16 pwrite64 EIO 1", ["output"], {0, 4}),
        ("bf16 read EIO 1", ["input"], {0, 3}),
        ("bf16 read EIO 1", ["input", "output"], {0, 3, 4}),
        ("bf16 write EIO 1", ["terminal"], {0}),
        ("bf16 pwrite64 ENOSPC 1", ["output"], {0, 5}),
        ("bf16 openat EDQUOT 1", ["input"], {0, 3, 5}),
        ("bf16 openat EMFILE 1", ["input"], {0, 5}),
        ("bf16 mmap ENOMEM 1", ["system"], {0, 5}),
        ("bf16 clone3 EAGAIN 1", ["system"], {0, 5}),
        ("bf16 flock EAGAIN 1", ["output"], {0, 4}),
        ("bf16 read EINTR 1", ["input"], {0}),
        ("bf16 pwrite64 short 1", ["output"], {0}),
        ("bf16 read EINTR 1", ["system"], {0, 3, 4, 5, 6}),
        ("bf16 close EINTR 1", ["output"], {0, 4}),
        ("push read end 1", ["input"], {0, 3, 7}),
        ("push newfstatat EACCES 1", ["input"], {0, 3, 4}),
        ("bf16 pwrite64 SIGKILL 1", [], {-9}),
    ],
)
def test_exit_codes_that_are_right(fault: str, roles: list[str], codes: set[int]) -> None:
    assert allowed(Fault.parse(fault), roles) == codes


def test_a_refusal_that_leaves_nothing_is_right() -> None:
    assert judge(EIO, REFUSED, {".streamconv/": "", ".streamconv/a": "x"}, MADE, ["output"]) == []


@pytest.mark.parametrize(
    ("ended", "found", "problem"),
    [
        (Ended(None, "", 20), {}, "hang"),
        (Ended(1, "Traceback (most recent call last)\nError", 1), {}, "traceback"),
        (Ended(5, "Error: full", 1), {}, "exit 5, not 0 or 4"),
        (Ended(4, "", 1), {}, "no word"),
        (Ended(0, "", 1), {}, "wrong success: -README.md -config.json -model.safetensors"),
        (REFUSED, COMPLETE | {"model.safetensors": "x"}, "wrong bytes: model.safetensors"),
        (REFUSED, {"model.safetensors": "x"}, "wrong bytes: model.safetensors"),
        (REFUSED, {"config.json": "c"}, "wrong files: -README.md -model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_run(ended: Ended, found: dict[str, str], problem: str) -> None:
    assert problem in judge(EIO, ended, found, MADE, ["output"])


def test_an_older_model_may_stand_whole_but_not_mixed() -> None:
    made = Made(COMPLETE | {"notes.txt": "n"}, OLD)
    assert wrong_files(OLD, made) == []
    assert wrong_files(COMPLETE | {"notes.txt": "n"}, made) == []
    assert wrong_files({**OLD, "model.safetensors": "m"}, made) != []
    assert wrong_files({"model.safetensors": "M"}, made) == []  # on its way out


def test_each_of_several_outputs_is_judged() -> None:
    both = COMPLETE | {"int8/": ""} | {f"int8/{name}": sha256 for name, sha256 in COMPLETE.items()}
    made = Made(both, outputs=("", "int8"))
    assert wrong_files(both, made) == []
    assert wrong_files(COMPLETE | {"int8/": ""}, made) == []
    wrong = both | {"int8/model.safetensors": "x"}
    assert wrong_files(wrong, made) == ["wrong files: ~model.safetensors", "wrong bytes: model.safetensors"]


def test_a_run_after_the_fault_makes_the_same_and_leaves_nothing() -> None:
    done = Ended(0, "", 1)
    assert judge_again(done, COMPLETE, MADE) == []
    assert judge_again(Ended(3, "Error", 1), COMPLETE, MADE) == ["again: exit 3"]
    assert judge_again(Ended(None, "", 1), COMPLETE, MADE) == ["again: hang"]
    assert judge_again(done, COMPLETE | {"README.md": "R"}, MADE) == ["again: ~README.md"]
    assert judge_again(done, COMPLETE | {".streamconv/": ""}, MADE) != []


def test_a_refused_rmdir_may_leave_an_empty_work_folder() -> None:
    assert is_complete(COMPLETE | {".streamconv/": ""}, MADE)
    assert not is_complete(COMPLETE | {".streamconv/": "", ".streamconv/lock": "x"}, MADE)


def test_what_is_accepted_has_a_reason_and_no_wrong_byte() -> None:
    left = COMPLETE | {".streamconv/": ""}
    assert "leaves an empty .streamconv" in accepted(Ended(0, "", 1), left, MADE)
    assert judge(EIO, Ended(0, "", 1), left, MADE, ["output"]) == []
    aborted = Ended(-6, "LLVM ERROR: Unable to allocate section memory!", 1, ("hit",))
    assert "LLVM ends a process" in accepted(aborted, {}, MADE)
    ended = Ended(1, "libgomp: Thread creation failed: Resource temporarily unavailable", 1, ("hit",))
    assert "OpenMP's library ends" in accepted(ended, {}, MADE)
    assert judge(EIO, aborted, {}, MADE, ["output"]) == []
    assert judge(EIO, aborted, {"config.json": "c"}, MADE, ["output"]) != []
    for ended in (Ended(-6, "Fatal Python error", 1), REFUSED, Ended(0, "", 1)):
        assert not accepted(ended, COMPLETE, MADE)


def test_what_is_being_written_is_not_seen(tmp_path: Path) -> None:
    for name in ("a.txt", ".a.txt.partial", ".streamconv/plan.json", "int8/.streamconv/x/y"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert visible(tree(tmp_path)).keys() == {"a.txt", "int8/"}
    assert tree(tmp_path / "nothing") == {}


def test_a_fault_that_did_not_come_is_not_counted() -> None:
    assert not was_hit(EIO, Ended(0, "", 1))
    assert was_hit(EIO, REFUSED)
    killed = Fault("bf16", "rename", KILL, 1)
    assert was_hit(killed, Ended(-9, "", 1))
    assert not was_hit(killed, Ended(0, "", 1))


def test_few_calls_are_tried_with_every_error_and_many_from_the_first_to_the_last() -> None:
    few = list(spread("bf16", "rename", 2, 100))
    assert {fault.at for fault in few} == {1, 2}
    assert {fault.error for fault in few} == set(ERRORS["rename"])
    assert len(few) == len(set(few)) == 2 * (2 * len(ERRORS["rename"]) - 1)
    many = list(spread("bf16", "newfstatat", 500, 40))
    assert len(many) == 40
    assert (many[0].at, many[-1].at) == (1, 500)
    assert {fault.error for fault in many} == set(ERRORS["newfstatat"])
    assert not any(fault.onward and fault.error in (KILL, *ONCE_ONLY) for fault in few + many)


def test_a_plan_keeps_to_its_limit_and_has_every_call() -> None:
    counts = {name: {"openat": 300, "pwrite64": 100, "ioctl": 50, "flock": 1} for name in ("bf16", "push")}
    faults, most = planned(counts, 300)
    assert 270 <= len(faults) <= 300
    assert {(fault.command, fault.call) for fault in faults} == {
        (name, call) for name, made in counts.items() for call in made if (name, call) != ("push", "ioctl")
    }
    assert most < 150 < planned(counts, 1000)[1]
    assert SHORT in {fault.error for fault in faults if fault.call == "pwrite64"}


def row(fault: Fault, code: int | None, *problems: str) -> tuple[Fault, Row]:
    return fault, Row(str(fault), True, code, problems, (), "", "", 0.1, "output", "")


def test_the_table_counts_calls_by_fault_and_exits(tmp_path: Path) -> None:
    onward = Fault("push", "pwrite64", "EIO", 1, onward=True)
    missed = (EIO, Row(str(EIO), False, 0, (), (), "", "", 0.1, "", ""))
    rows = [row(EIO, 4), row(EIO, 0), row(onward, None, "hang"), missed]
    cell = {"call": "pwrite64", "error": "EIO"}
    assert table(rows[:3]) == [
        {**cell, "when": "from", "points": {"push": 1}, "outcomes": {"hang": 1}, "bad": 1},
        {**cell, "when": "once", "points": {"bf16": 2}, "outcomes": {"0": 1, "4": 1}, "bad": 0},
    ]
    assert outcomes(each for _, each in [row(EIO, -9)]) == {"killed": 1}
    found = results(rows, {"bf16": {"pwrite64": 9}}, 5, 1.0)
    assert (found["faults"], found["not reached"], len(found["bad"])) == (3, 1, 1)
    write(found, tmp_path / "faults.json")
    text = (tmp_path / "faults.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found))
    assert sum('"pwrite64"' in line and '"bad"' in line for line in text.splitlines()) == 2


def test_what_was_bad_is_tried_again_and_counted_as_it_ends_now() -> None:
    other, gone = Fault("gptq", "pwrite64", "EIO", 5), Fault("bf16", "ioctl", "EINTR", 2)
    rows = [row(EIO, 1, "exit 1"), row(other, 4), row(gone, 1, "exit 1")]
    before = results(rows, {"bf16": {"pwrite64": 9}}, 9, 1.0)
    assert (before["faults"], len(before["bad"])) == (3, 2)
    found = mended(before, [row(EIO, 4)])
    assert (found["faults"], found["bad"], found["outcomes"]) == (2, [], {"4": 2})
    (kind,) = found["table"]
    assert (kind["points"], kind["outcomes"], kind["bad"]) == ({"bf16": 1, "gptq": 1}, {"4": 2}, 0)
    worse = mended(before, [row(EIO, 1, "exit 1")])
    assert [each["fault"] for each in worse["bad"]] == [str(EIO)]
    assert worse["outcomes"] == {"1": 1, "4": 1}


def test_a_call_that_another_came_between_is_told_whole(tmp_path: Path) -> None:
    lines = tmp_path / "strace"
    lines.write_text(
        '7  write(2</run/text>, "", 9 <unfinished ...>\n'
        '8  read(3</run/out/a>, "", 9) = 9\n'
        "7  <... write resumed>)              = -1 ENOSPC (No space left on device) (INJECTED)\n"
    )
    (line,) = hits_in(lines)
    assert line.endswith("(INJECTED)")
    assert role(line, {"/run/text": "terminal"}) == "terminal"


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the faults")
def test_a_part_of_the_sweep_finds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    line = [sys.executable, "-m", "tools.faults", "--commands", "bf16", "nf4-dq", "--sample", "60"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [*line, "--folder", str(tmp_path), "--out", str(out)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(out.read_text())["faults"] >= 50
