"""The comparison of methods has all of them, and its adapters are such that they can be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamconv.adapters import ADAPTERS, read_adapter
from streamconv.adapters.base import Parameter
from streamconv.storage import open_adapter
from tools.bench import methods
from tools.bench.methods import CASES, IN, MODULE, OUT, PLAIN, broken, row, write_adapter
from tools.bench.results import RESULTS, load

# It changes no matrix.
LEFT_OUT = {"LN_TUNING"}
# What is drawn for others takes seconds, or a gigabyte.
LARGE = {"RandLoRA, r = 32", "SHiRA, r = 32", "C3A, blocks of 64"}
ROW = {"name": PLAIN, "to_lora": 1.04, "cpu_s": 2.0, "peak_bytes": 2**20, "planned_bytes": 2**21}


def test_every_method_is_compared() -> None:
    assert {case.peft_type for case in CASES.values()} == set(ADAPTERS) - LEFT_OUT
    assert [one["name"] for one in load(RESULTS / "bench-methods.json")["rows"]] == list(CASES)


def test_none_takes_more_than_it_may() -> None:
    assert not list(broken(load(RESULTS / "bench-methods.json")["rows"]))


@pytest.mark.parametrize("name", sorted(CASES.keys() - LARGE))
def test_adapters_are_read(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "adapter", CASES[name])
    weight = f"{MODULE}.weight"
    found = read_adapter(
        open_adapter(str(tmp_path / "adapter")), {weight: Parameter(weight, (OUT, IN))}, {}, None
    )
    assert [update.parameter for update in found.updates] == [weight]


def test_a_row_and_what_is_wrong_with_one() -> None:
    slow: dict[str, Any] = {**ROW, "to_lora": 3.06}
    reasoned = {**slow, "name": "RandLoRA, r = 32"}
    assert row(ROW) == "| LoRA, r = 16 | 1.0 | 2.0 s | 1 MiB | 2 MiB |  |"
    assert row(reasoned).endswith("| a product of full rank: 512 times the operations of LoRA of rank 16 |")
    assert list(broken([ROW, reasoned])) == []
    assert list(broken([slow])) == [f"{PLAIN}: 3.1 times the time of LoRA, without a reason"]
    assert list(broken([{**ROW, "peak_bytes": 2**22}])) == [f"{PLAIN}: over the plan's memory"]


def test_a_run_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small weight."""
    monkeypatch.setattr(methods, "OUT", 64)
    monkeypatch.setattr(methods, "IN", 128)
    small = methods.Case("IA3", methods.NO_RANK, {"ia3_l": (64, 1)})
    monkeypatch.setattr(methods, "CASES", {PLAIN: small})
    monkeypatch.setattr(methods, "broken", lambda rows: iter(()))  # of so small a merge, times say nothing
    options = ["--runs", "1", "--folder", str(tmp_path / "work"), "--results", str(tmp_path / "found.json")]
    methods.main(options)
    (found,) = load(tmp_path / "found.json")["rows"]
    assert (found["name"], found["peft_type"], found["runs"]) == (PLAIN, "IA3", 1)
    assert 0 < found["peak_bytes"] <= found["planned_bytes"]
    assert not (tmp_path / "work").exists()
