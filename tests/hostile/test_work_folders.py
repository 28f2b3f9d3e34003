"""Work folders that somebody has been at: links, named pipes, strangers' files, damaged and missing work.

Nothing of anybody else's is touched, and no run that ends well leaves a byte that is not the undisturbed run's.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.commands import Commands, Outcome
from tests.hostile.test_kill import Tree, tree
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=72, layers=2, vocabulary=90)
WORK = ".streamconv"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@dataclass(frozen=True)
class Case:
    """A job, what its undisturbed run gives, and folders of runs that were killed at some moment."""

    base: Path
    adapter: Path
    whole: Tree
    finished: Path
    begun: Path  # one shard waits, the next is being written
    waiting: Path  # all shards wait
    halfway: Path  # the first shard is in place, the others wait

    def run(self, commands: Commands, out: Path, *options: str) -> Outcome:
        inputs = ("--base", str(self.base), "--adapter", str(self.adapter))
        return commands.run("merge", *inputs, "-o", out, *options, watermark_bytes=10_000)


@pytest.fixture(scope="module")
def case(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("work_folders")
    base = write_base(folder / "base", SIZES.shapes, shards=3)
    adapter = write_adapter(folder / "adapter", SIZES.shapes)
    command = ("merge", "--base", str(base), "--adapter", str(adapter))
    assert commands.run(*command, "-o", folder / "whole").code == 0
    moments = {
        "begun": f"replace {FIRST}.partial",
        "waiting": "unlink config.json",
        "halfway": f"replace {LAST}",
    }
    for name, since in moments.items():
        at = 20 if name == "begun" else 1
        killed = commands.run(*command, "-o", folder / name, at=at, since=since, watermark_bytes=10_000)
        assert killed.code == -signal.SIGKILL
    return Case(base, adapter, tree(folder / "whole"), folder / "whole", *(folder / name for name in moments))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's folder, which a link leads to."""
    (tmp_path / "victim" / "sub").mkdir(parents=True)
    for name in ("thesis.txt", FIRST, "plan.json", "sub/layer-00000.safetensors"):
        (tmp_path / "victim" / name).write_text("precious")
    return tmp_path / "victim"


def look(folder: Path) -> Tree:
    """The tree, links and odd files by what they are: the lock aside, whose text tells who was here last."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"to {path.readlink()}"
        elif path.is_file() or path.is_dir():
            found[name] = "" if path.is_dir() else path.read_bytes().hex()
        else:
            found[name] = "odd"
    found.pop(f"{WORK}/lock", None)
    return found


# -- links, and what else is no file of a run's own ------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-resume",), ("--overwrite",)], ids=" ".join)
@pytest.mark.parametrize("target", ["victim", "victim/sub", "nothing"])
def test_a_work_folder_that_is_a_link_is_refused(
    commands: Commands, case: Case, out: Path, victim: Path, target: str, options: tuple[str, ...]
) -> None:
    out.mkdir()
    (out / WORK).symlink_to(victim.parent / target)
    before = look(victim)
    refused = case.run(commands, out, *options)
    assert refused.code == 4, refused.text
    assert f"{out / WORK} is a link" in refused.text
    assert "choose another --out" in refused.text
    assert look(victim) == before
    assert os.listdir(out) == [WORK]


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "thesis.txt")


def link_to_folder(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def pipe(path: Path, victim: Path) -> None:
    del victim
    os.mkfifo(path)


def folder(path: Path, victim: Path) -> None:
    shutil.copytree(victim, path)


NAMES = (
    "lock",
    "plan.json",
    "journal.jsonl",
    FIRST,
    f"{LAST}.partial",
    ".config.json.partial",
    "calibration",
)


@pytest.mark.parametrize("harm", [link, link_to_folder, pipe, folder], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_of_a_run_is_refused_and_left_alone(
    commands: Commands, case: Case, out: Path, victim: Path, name: str, harm: Callable[[Path, Path], None]
) -> None:
    if (name, harm) == ("calibration", folder):
        pytest.skip("is a folder")
    shutil.copytree(case.begun, out)
    path = out / WORK / name
    path.unlink(missing_ok=True)
    harm(path, victim)
    before = look(out), look(victim)
    for options in ((), ("--no-resume", "--quant", "nf4")):
        refused = case.run(commands, out, *options)
        assert refused.code == 4, refused.text
        assert str(path) in refused.text
        assert (look(out), look(victim)) == before


@pytest.mark.parametrize(
    "stranger", ["thesis.txt", "sub/notes.txt", "holiday.safetensors", "calibration/thesis.txt"]
)
@pytest.mark.parametrize("has_lock", [False, True])
def test_what_somebody_else_keeps_in_a_work_folder_stays(
    commands: Commands, case: Case, out: Path, stranger: str, has_lock: bool
) -> None:
    path = out / WORK / stranger
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    if has_lock:
        (out / WORK / "lock").touch()
    for options in ((), ("--no-resume",), ("--overwrite",)):
        refused = case.run(commands, out, *options)
        assert refused.code == 4, refused.text
        assert stranger.partition("/")[0] in refused.text
        assert "not of its making" in refused.text
        assert path.read_text() == "precious"


def test_a_strangers_file_does_not_keep_a_run_from_going_on_and_outlives_it(
    commands: Commands, case: Case, out: Path
) -> None:
    shutil.copytree(case.begun, out)
    (out / WORK / "thesis.txt").write_text("precious")
    refused = case.run(commands, out, "--no-resume")
    assert refused.code == 4, refused.text
    done = case.run(commands, out)
    assert done.code == 0, done.text
    assert tree(out).keys() - case.whole.keys() == {f"{WORK}/", f"{WORK}/thesis.txt"}
    again = case.run(commands, out)
    assert again.code == 0, again.text
    assert (out / WORK / "thesis.txt").read_text() == "precious"


def test_an_output_folder_may_be_a_link(commands: Commands, case: Case, out: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk")
    assert case.run(commands, out).code == 0
    assert tree(tmp_path / "disk") == case.whole
    assert case.run(commands, out).code == 0


# -- work that is not what was journaled -----------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [3, 40, 20_000, -1], ids=["length", "header", "data", "end"])
@pytest.mark.parametrize(
    ("moment", "path"),
    [
        ("begun", f"{WORK}/{FIRST}"),
        ("waiting", f"{WORK}/{FIRST}"),
        ("waiting", f"{WORK}/{LAST}"),
        ("halfway", FIRST),
        ("halfway", f"{WORK}/{LAST}"),
    ],
)
def test_a_bit_of_a_finished_shard_is_seen_and_that_shard_made_anew(
    commands: Commands, case: Case, out: Path, moment: str, path: str, place: int
) -> None:
    shutil.copytree(getattr(case, moment), out)
    flip(out / path, place)
    again = case.run(commands, out)
    assert again.code == 0, again.text
    assert Path(path).name in again.starts
    assert tree(out) == case.whole


@pytest.mark.parametrize("place", [3, 40, 20_000])
@pytest.mark.parametrize("name", [FIRST, LAST])
def test_a_bit_of_a_finished_output_is_seen_by_the_same_command(
    commands: Commands, case: Case, out: Path, name: str, place: int
) -> None:
    shutil.copytree(case.finished, out)
    flip(out / name, place)
    told = case.run(commands, out)
    assert told.code == 7, told.text
    assert name in told.text
    assert "--overwrite makes it again" in told.text
    assert case.run(commands, out, "--overwrite").code == 0
    assert tree(out) == case.whole


def test_a_finished_output_that_lost_a_shard_is_told_so(commands: Commands, case: Case, out: Path) -> None:
    shutil.copytree(case.finished, out)
    (out / LAST).unlink()
    for options in ((), ("--no-verify",)):
        told = case.run(commands, out, *options)
        assert told.code == 7, told.text
        assert LAST in told.text
        assert "--overwrite makes it again" in told.text
    assert case.run(commands, out, "--overwrite").code == 0
    assert tree(out) == case.whole


DEEP = b"[" * 100_000


def flip_hash(content: bytes) -> bytes:
    """One digit of the first SHA-256 is another."""
    place = content.index(b'"sha256": "') + 12
    return content[:place] + (b"0" if content[place : place + 1] != b"0" else b"1") + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped hash": flip_hash,
    "number for hash": lambda content: content.replace(b'"sha256": "', b'"sha256": 3, "x": "', 1),
    "no hash": lambda content: content.replace(b'"sha256"', b'"sha"', 1),
    "list": lambda content: b"[1, 2]\n" + content,
    "deep": lambda content: DEEP + b"\n" + content,
    "deep, no end": lambda content: DEEP,
    "line gone": lambda content: b"".join(content.splitlines(keepends=True)[1:]),
    "line twice": lambda content: content.splitlines(keepends=True)[0] + content,
    "lines swapped": lambda content: b"".join(sorted(content.splitlines(keepends=True))),
    "of another run": lambda content: content.replace(b'"check": "', b'"check": "0', 1),
    "hole": lambda content: bytes(5_000_000) + content,
    "not text": lambda content: b"\xff\xfe" + content,
    "long line": lambda content: b'{"finished": "' + b"a" * 3_000_000 + b'"}\n' + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("moment", ["begun", "halfway"])
def test_a_damaged_journal_costs_work_and_no_more(
    commands: Commands, case: Case, out: Path, moment: str, damage: str
) -> None:
    shutil.copytree(getattr(case, moment), out)
    journal = out / WORK / "journal.jsonl"
    journal.write_bytes(DAMAGES[damage](journal.read_bytes()))
    again = case.run(commands, out)
    if moment == "halfway" and again.code == 4:  # what stands in its place could be anybody's
        assert "is not empty" in again.text
        again = case.run(commands, out, "--overwrite")
    assert again.code == 0, again.text
    assert tree(out) == case.whole


@pytest.mark.parametrize("content", [DEEP, b"[]", b'"x"', b"\0" * 100, b"", b'{"torch": 1}', b"{" * 9])
def test_a_damaged_plan_is_told_or_done_again(
    commands: Commands, case: Case, out: Path, content: bytes
) -> None:
    shutil.copytree(case.begun, out)
    (out / WORK / "plan.json").write_bytes(content)
    told = case.run(commands, out)
    assert told.code == 4, told.text
    assert "--no-resume" in told.text
    assert case.run(commands, out, "--no-resume").code == 0
    assert tree(out) == case.whole


@pytest.mark.parametrize("content", [DEEP, b"[]", b"\0" * 100, b"", b'{"digest": [1]}', b'{"shards": 1}'])
def test_a_damaged_manifest_is_no_finished_output(
    commands: Commands, case: Case, out: Path, content: bytes
) -> None:
    shutil.copytree(case.finished, out)
    (out / "streamconv.json").write_bytes(content)
    told = case.run(commands, out)
    assert told.code == 4, told.text
    assert "is not empty" in told.text
    assert case.run(commands, out, "--overwrite").code == 0
    assert tree(out) == case.whole


# -- while a run is at work ------------------------------------------------------------------------------------------


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip_data(path: Path) -> None:
    flip(path, 20_000)


def replace_by_link(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


SECOND = f"replace {FIRST}.partial"
CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "work folder lost early": (SECOND, lose, WORK),
    "output folder lost early": (SECOND, lose, "."),
    "lock lost": (SECOND, lose, f"{WORK}/lock"),
    "work folder lost late": ("unlink config.json", lose, WORK),
    "output folder lost late": ("unlink config.json", lose, "."),
    "journal and plan lost": ("unlink config.json", lose, f"{WORK}/journal.jsonl"),
    "waiting shard lost": ("unlink config.json", lose, f"{WORK}/{LAST}"),
    "waiting shard changed": ("unlink config.json", flip_data, f"{WORK}/{FIRST}"),
    "waiting shard replaced": ("unlink config.json", replace_by_link, f"{WORK}/{FIRST}"),
    "work folder lost halfway": (f"replace {LAST}", lose, WORK),
    "placed shard lost": (f"replace {LAST}", lose, FIRST),
    "placed shard changed": (f"replace {LAST}", flip_data, FIRST),
    "index lost": ("replace .config.json.partial", lose, "model.safetensors.index.json"),
    "placed shard changed last": ("replace .config.json.partial", flip_data, FIRST),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_while_a_run_is_at_work_is_missed_before_anything_passes_for_a_model(
    commands: Commands, case: Case, out: Path, change: str
) -> None:
    since, harm, name = CHANGES[change]
    inputs = ("--base", str(case.base), "--adapter", str(case.adapter))
    stopped = commands.run("merge", *inputs, "-o", out, at=1, since=since, signal=signal.SIGSTOP)
    assert stopped.code == -signal.SIGSTOP, stopped.text
    harm(out / name)
    ended = commands.run(goes_on=stopped.process)
    if change == "journal and plan lost":  # its lines were needed by nobody but a rerun
        assert ended.code in (0, 4), ended.text
    else:
        assert ended.code == 4, ended.text
    if ended.code:
        assert "run the same command again" in ended.text or "cannot be" in ended.text
        assert not (out / "config.json").exists()
        if harm is replace_by_link:
            (out / name).unlink()
            (out / "elsewhere").unlink()
        again = case.run(commands, out)
        if again.code == 4 and not (out / WORK).exists():  # nothing says any more whose shards these are
            for path in out.glob("*"):
                lose(path)
            again = case.run(commands, out)
        assert again.code == 0, again.text
    assert tree(out) == case.whole
