"""`streamconv compare`: what it prints, and with which codes it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from streamconv.comparison import running
from streamconv.comparison.strategies import known_strategies
from streamconv.errors import ResourceError
from tests.cli.calls import Inputs, run, succeed
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import llama_config, save_adapter, save_base

SHORT = ("--sequence-length", "32", "--tokens", "64", "--greedy-tokens", "2", "--no-speed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("compared")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return Inputs(base, save_adapter(folder / "adapter", base, lora).path)


@pytest.fixture
def arguments(models: Inputs, tmp_path: Path) -> list[str]:
    text = write_text(tmp_path / "text.txt")
    return ["compare", *models.options, "--data", str(text), *SHORT, "-o", str(tmp_path / "out")]


def test_a_table_and_a_recommendation(arguments: list[str], tmp_path: Path) -> None:
    chosen = ["--strategies", "unmerged-T,nearest-T,feedback-T", "--max-bits", "12"]
    result = succeed(*arguments, *chosen)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["unmerged-T", "nearest-T"]
    assert lines[3].startswith("feedback-T: left out: it chooses codes by calibration text")
    assert lines[5].startswith(
        "* at most 12 bits a weight: take nearest-T. The only one that was compared; KL "
    )
    assert lines[6].startswith("  streamconv merge --base ")
    assert lines[-1].startswith(f"{tmp_path}/out/comparison.html shows it")
    said = result.stderr.splitlines()
    assert "[2/3] nearest-T: merging" in said
    assert "[2/3] nearest-T: evaluating" in said


def test_json_has_every_number(arguments: list[str], tmp_path: Path) -> None:
    found = json.loads(succeed(*arguments, "--strategies", "base,nearest-T", "--json").stdout)
    assert found == json.loads((tmp_path / "out" / "comparison.json").read_text())
    (base, nearest) = found["rows"]
    assert len(nearest["numbers"]["losses"]) == 2
    assert base["command"] is None


def test_quiet_says_nothing(arguments: list[str]) -> None:
    result = succeed(*arguments, "--strategies", "base", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_a_failure_tells_in_the_exit_code(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise ResourceError("there is no room")

    monkeypatch.setattr(running, "run", fail)
    result = run(*arguments, "--strategies", "base,nearest-T")
    assert result.exit_code == 5
    assert "nearest-T: failed at merging: ResourceError: there is no room" in result.stdout
    assert result.stderr.splitlines()[-1] == "1 of 2 strategies failed: nearest-T"


def test_the_list() -> None:
    lines = succeed("compare", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [each.name for each in known_strategies()]
    assert any(line.startswith("feedback-T ") and line.endswith("with --calibration") for line in lines)


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--strategies", "nearest"], 2, "--strategies: nearest is not known; the nearest is nearest-"),
        (["--merge-base", "q4"], 2, "--merge-base q4 is not known"),
        (["--tokens", "3"], 2, "--tokens 3 is less than one sequence"),
        (["--strategies", "base", "--tokens", "99999"], 3, "has 2000 tokens"),
        (["--strategies", "base", "--max-ram", "104MiB"], 5, "--max-ram is too small"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], given: list[str], code: int, message: str) -> None:
    result = run(*arguments, *given)
    assert result.exit_code == code, result.output
    assert message in result.stderr
