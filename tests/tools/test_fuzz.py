"""Targets of the fuzzing tool: honest files are read, mutated ones read or refused; and what the tool tells of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.errors import CheckpointError
from tools.fuzz.__main__ import CORPUS, described
from tools.fuzz.mutation import mutated_bytes, mutated_json, mutated_lines, mutated_shard
from tools.fuzz.targets import TARGETS, Target
from tools.fuzz.trial import Defect, try_input

# What a guided run of the tool tries in minutes by the ten thousands is tried here by the dozen.
INPUTS = 12


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return TARGETS[request.param](tmp_path_factory.mktemp("target"))


def test_honest_files_are_read(target: Target) -> None:
    for seed in target.seeds:
        assert try_input(target, seed).exit_code in {None, 2}  # 2: click's way to end after --print-recipe


@settings(max_examples=INPUTS, derandomize=True)
@given(number=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(target: Target, number: int) -> None:
    chance = random.Random(number)
    data = target.seeds[0]
    for _ in range(chance.choice((1, 1, 3))):
        data = target.mutate(data, chance)
    try_input(target, data)


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_every_input_of_the_corpus_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    for path in sorted((CORPUS / name).iterdir()):
        try_input(target, path.read_bytes())


class UnboundedError(CheckpointError):
    """As messages were before they had a bound."""

    def __str__(self) -> str:
        return str(self.args[0])


def refuse(length: int) -> None:
    error = UnboundedError("x")
    error.args = ("x" * length,)
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyError("x"), "KeyError"), (SystemExit(1), "SystemExit"), (RecursionError("x"), "Recursion")],
)
def test_other_errors_are_defects(error: BaseException, told: str) -> None:
    def fail(data: bytes) -> None:
        raise error

    with pytest.raises(Defect, match=told):
        try_input(Target((b"",), mutated_bytes, fail), b"")


def test_long_messages_are_defects() -> None:
    assert try_input(Target((b"",), mutated_bytes, lambda _: refuse(1999)), b"").exit_code == 3
    with pytest.raises(Defect, match="2001 characters"):
        try_input(Target((b"",), mutated_bytes, lambda _: refuse(2001)), b"")


def test_mutations_of_json_are_mostly_json() -> None:
    honest, chance = (
        json.dumps({"a": [1, {"b": "text"}], "c": None, "d": {"e": True}}).encode(),
        random.Random(0),
    )
    found = [mutated_json(honest, chance) for _ in range(300)]
    readable = 0
    for each in found:
        try:
            json.loads(each)
            readable += 1
        except (ValueError, RecursionError):
            pass
    assert readable > 200
    assert len(set(found)) > 200


def test_mutations_of_lines_change_a_line_or_their_order() -> None:
    honest, chance = b'{"a": 1}\n{"b": 2}\n{"c": 3}\n', random.Random(0)
    found = [mutated_lines(honest, chance) for _ in range(200)]
    kept = [sum(line in each.splitlines() for line in honest.splitlines()) for each in found]
    assert min(kept) >= 1
    assert len(set(found)) > 50


def test_mutations_of_shards_keep_the_header_readable() -> None:
    header = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    honest, chance = len(header).to_bytes(8, "little") + header + b"\1\2\3\4", random.Random(0)
    found = [mutated_shard(honest, chance) for _ in range(200)]
    fitting = sum(8 + int.from_bytes(each[:8], "little") <= len(each) for each in found)
    assert fitting > 150
    assert len(set(found)) > 100


def test_the_tool_tells_executions_and_the_first_defect() -> None:
    text = "stat::number_of_executed_units: 1234\nstat::peak_rss_mb: 300\n"
    report = {"outcomes": {"exit 3": 1000, "read": 234}, "slowest_s": 0.5}
    good = described(0, text, report)
    assert good == {"executions": 1234, "peak_rss_mb": 300, "defect": None, **report}
    assert described(77, f"DEFECT KeyError: x\n{text}", report)["defect"] == "KeyError: x"
    hanging = described(70, "==7== ERROR: libFuzzer: timeout after 10 seconds", {})
    assert "timeout" in hanging["defect"]
