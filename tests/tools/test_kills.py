"""The tool that kills at random moments: its record, and a short run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile.commands import Outcome
from tests.hostile.test_kill import tree
from tests.models import Sizes, write_base
from tools import kills


def chain(command: str, *places: str, failure: str = "") -> kills.Chain:
    return kills.Chain(command, places, tuple('{"at": 1}' for _ in places), failure)


def test_what_is_recorded_says_that_nothing_was_lost() -> None:
    found = json.loads(kills.RESULTS.read_text())
    assert found["kills"] >= 300
    assert found["failures"] == []
    assert found["kills"] == sum(sum(counts.values()) for counts in found["by_command"].values())
    assert sum("--overwrite" in command for command in found["by_command"]) >= 2
    for place in kills.PLACES[1:4]:
        assert sum(counts[place] for counts in found["by_command"].values()) >= 20, place


def test_counts_are_of_kills_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kills, "RESULTS", tmp_path / "kills.json")
    chains = [chain("a", "shards", "publishing"), chain("b", "shards", failure="exit 1")]
    assert kills.main(["--seed", "7"], lambda kills_, seed, jobs, names: kills.summary(chains, seed)) == 1
    found = json.loads((tmp_path / "kills.json").read_text())
    assert (found["seed"], found["kills"], found["runs_to_the_end"], found["killed_again"]) == (7, 3, 2, 1)
    assert [each["command"] for each in found["failures"]] == ["b"]
    assert "| a | 0 | 0 | 1 | 1 | 0 |" in capsys.readouterr().out


def test_what_is_damaged_after_a_kill_is_seen(tmp_path: Path) -> None:
    """A shard that is not whole, a model that is neither, and an end that is another."""
    out = write_base(tmp_path / "out", Sizes(hidden=8, inner=8, layers=1, vocabulary=9).shapes)
    case = kills.Case("bf16", (), complete=tree(out))
    done = Outcome(0, "", 0.0, 1, 0.0, 0, (), {})
    kills.check_kill(case, out)
    assert kills.ended(case, done, out) == ""
    assert kills.ended(case, replace(done, code=3, text="Error"), out) == "run again: exit 3: Error"
    for name in ("model-00001-of-00003.safetensors", "tokenizer.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + b"?")
        with pytest.raises(AssertionError):
            kills.check_kill(case, out)
        assert kills.ended(case, done, out) == f"run again: {name} differ"
        (out / name).write_bytes(content)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_kills_at_random_lose_nothing() -> None:
    assert kills.try_kills(40, seed=1, jobs=2)["failures"] == []
