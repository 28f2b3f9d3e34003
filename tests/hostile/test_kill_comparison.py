"""A comparison that is killed and run again gives the same numbers, and does not do again what was done."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.forward.texts import save_tokenizer, write_text
from tests.hostile.commands import Commands
from tests.hostile.test_kill import spread
from tests.tiny import llama_config, save_adapter, save_base

POINTS = 3
TIMES = {"merge_seconds", "merge_resumed", "merge_peak_ram_bytes", "evaluate_seconds"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("killed")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    text = write_text(folder / "text.txt", 70)
    paths = ("--base", base, "--adapter", folder / "adapter", "--data", text)
    sizes = ("--tokens", "64", "--sequence-length", "32", "--greedy-tokens", "0", "--no-speed")
    strategies = ("--strategies", "unmerged-T,nearest-T,stochastic-T", "--device", "cpu")
    return tuple(map(str, ("compare", *paths, *sizes, *strategies)))


@pytest.fixture(scope="module")
def whole(
    model_commands: Commands, arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """What a run leaves that nobody disturbs, and its calls."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = model_commands.run(*arguments, "-o", out)
    assert done.code == 0, done.text
    return out, done.calls


def numbers(out: Path) -> dict[str, Any]:
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    return {
        row["name"]: {key: value for key, value in row["numbers"].items() if key not in TIMES} for row in rows
    }


def rows(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / ".comparison" / "rows").glob("*.json")}


def test_killed_anywhere_and_run_again_the_numbers_are_the_same(
    model_commands: Commands, arguments: tuple[str, ...], whole: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    expected, calls = numbers(whole[0]), whole[1]
    kept = 0
    for at in spread(len(calls), POINTS):
        out = tmp_path / str(at)
        killed = model_commands.run(*arguments, "-o", out, at=at, tears=True)
        assert killed.code == -signal.SIGKILL
        before = rows(out)
        again = model_commands.run(*arguments, "-o", out)
        assert again.code == 0, f"killed at {at}, {calls[at - 1]}: {again.text}"
        assert numbers(out) == expected, f"killed at {at}, {calls[at - 1]}"
        assert before.items() <= rows(out).items()
        assert {path.name for path in out.iterdir()} == {path.name for path in whole[0].iterdir()}
        kept += bool(before)
    assert kept >= 2, "too few runs had a row done when they were killed"


def test_ctrl_c_ends_it_with_what_is_done(
    model_commands: Commands, arguments: tuple[str, ...], whole: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    at = 1 + next(at for at, call in enumerate(whole[1], 1) if call.startswith("replace .nearest-T.json"))
    stopped = model_commands.run(*arguments, "-o", out, at=at, signal=signal.SIGINT)
    assert stopped.code == 130, stopped.text
    assert "run the same command again to go on" in stopped.text
    assert "Traceback" not in stopped.text
    before = rows(out)
    assert before
    assert model_commands.run(*arguments, "-o", out).code == 0
    assert before.items() <= rows(out).items()
