"""Killed at any call that changes the disk and run again, a merge into GGUF files gives the same bytes; while the first
of its files is there, all are.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.gguf.bases import write_llama
from tests.hostile.commands import Commands
from tests.hostile.test_kill import BUDGET, SIZES, WATERMARK_BYTES, Case, Tree, spread, tree
from tests.models import Sizes, write_adapter

BLOCKS = Sizes(hidden=256, inner=512, layers=2, vocabulary=300)
FIRST = "model-F16-00001-of-00002.gguf"


@pytest.fixture(scope="module")
def case(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("inputs")
    base, adapter = write_llama(folder / "base", SIZES), write_adapter(folder / "adapter", SIZES.shapes)
    paths = ("--base", str(base), "--adapter", str(adapter), "--max-ram", BUDGET)
    arguments = ("merge", *paths, "--quant", "gguf:f16", "--max-shard-size", "500kB")
    done = commands.run(*arguments, "-o", folder / "out", watermark_bytes=WATERMARK_BYTES)
    assert done.code == 0, done.text
    complete = tree(folder / "out")
    assert sum(name.endswith(".gguf") for name in complete) == 2
    return Case(arguments, done.calls, complete)


def check_final_names(out: Path, *complete: Tree) -> None:
    """Whatever moment it is: with the first file the folder is one of `complete`, and no file is a part of one."""
    found = {} if not out.exists() else tree(out)
    found = {name: sha256 for name, sha256 in found.items() if ".streamconv/" not in name}
    if FIRST in found:
        assert found in complete
    for name, sha256 in found.items():
        if name.endswith(".gguf"):
            assert sha256 in {files.get(name) for files in complete}, f"{name} is not whole"


def test_killed_anywhere_and_run_again_the_folder_is_the_same(
    commands: Commands, case: Case, tmp_path: Path
) -> None:
    resumed = 0
    for number, at in enumerate(spread(len(case.calls), 10)):
        out = tmp_path / str(at)
        assert case.run(commands, out, at, tears=number % 2 == 0).code == -signal.SIGKILL
        check_final_names(out, case.complete)
        again = case.run(commands, out)
        assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
        resumed += again.resumed_inside
    assert resumed >= 2, "files were not continued from their middle"


def test_killed_in_block_types_and_run_again(commands: Commands, tmp_path: Path) -> None:
    """Written anew, and kept in the files of the first."""
    base, adapter = (
        write_llama(tmp_path / "base", BLOCKS),
        write_adapter(tmp_path / "adapter", BLOCKS.shapes),
    )
    paths = ("--adapter", str(adapter), "--max-ram", "110MiB")
    anew = ("merge", "--base", str(base), *paths, "--quant", "gguf:q8_0", "--max-shard-size", "900kB")
    kept = ("merge", "--base", str(tmp_path / "anew"), *paths)
    for name, arguments in (("anew", anew), ("kept", kept)):
        done = commands.run(*arguments, "-o", tmp_path / name, watermark_bytes=WATERMARK_BYTES)
        assert done.code == 0, done.text
        case = Case(arguments, done.calls, tree(tmp_path / name))
        for at in spread(len(case.calls), 2):
            out = tmp_path / f"{name}-{at}"
            assert case.run(commands, out, at).code == -signal.SIGKILL
            again = case.run(commands, out)
            assert again.code == 0, f"killed at {at}, {case.calls[at - 1]}: {again.text}"
            assert tree(out) == case.complete, f"killed at {at}, {case.calls[at - 1]}"
    files = [name for name in tree(tmp_path / "kept") if name.endswith(".gguf")]
    assert files == [name for name in tree(tmp_path / "anew") if name.endswith(".gguf")]


def test_killed_while_an_older_model_of_the_same_names_is_replaced(
    commands: Commands, case: Case, tmp_path: Path
) -> None:
    """At every rename and deletion."""
    old = tmp_path / "old"
    without = [*case.arguments[:3], *case.arguments[5:]]
    assert commands.run("convert", *without[1:], "-o", old).code == 0
    before = tree(old)
    assert before[FIRST] != case.complete[FIRST]
    replacing = Case((*case.arguments, "--overwrite"), (), case.complete)
    shutil.copytree(old, tmp_path / "whole")
    whole = replacing.run(commands, tmp_path / "whole")
    assert tree(tmp_path / "whole") == case.complete, whole.text
    since = f"replace {FIRST}"
    published = whole.calls[whole.calls.index(since) :]
    points = [at for at, call in enumerate(published, 1) if call.startswith(("replace", "unlink", "rmdir"))]
    for at in points[::2]:
        out = tmp_path / str(at)
        shutil.copytree(old, out)
        assert replacing.run(commands, out, at, since=since).code == -signal.SIGKILL
        check_final_names(out, case.complete, before)
        again = replacing.run(commands, out)
        assert again.code == 0, f"killed at {at}: {again.text}"
        assert tree(out) == case.complete, f"killed at {at}"
        shutil.rmtree(out)
