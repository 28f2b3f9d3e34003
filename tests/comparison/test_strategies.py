"""Which strategies there are, how others are asked for, and what becomes of them on a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest

import streamconv
from streamconv.comparison import strategies
from streamconv.comparison.strategies import (
    OWN,
    STRATEGIES,
    Ground,
    LeftOut,
    Strategy,
    asked_strategies,
    known_strategies,
    settle,
)
from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.rounding import ROUNDINGS

DENSE_BASE = Ground(None, "nf4-dq", has_text=True)


def names(found: Sequence[Strategy | LeftOut]) -> list[str]:
    return [each.name for each in found if isinstance(each, Strategy)]


def left_out(found: Sequence[Strategy | LeftOut]) -> dict[str, str]:
    return {each.strategy.name: each.reason for each in found if isinstance(each, LeftOut)}


def test_names_are_given_once_and_say_the_target() -> None:
    assert len({each.name for each in STRATEGIES}) == len(STRATEGIES)
    for each in STRATEGIES[1:]:
        assert f"-{each.target}" in each.name, each.name


def test_known_are_those_whose_format_and_options_are_there() -> None:
    for each in known_strategies():
        options = each.options or {}
        assert options.get("quant", OWN) in (OWN, "none", *FORMATS)
        assert options.get("rounding", "auto") in ("auto", *ROUNDINGS)
        assert options.keys() <= signature(streamconv.merge).parameters.keys()
    assert {"unmerged-F", "unmerged-T", "16bit-F", "16bit-T", "nearest-T", "nearest-F"} <= set(
        names(known_strategies())
    )


def test_a_format_that_is_registered_brings_its_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gptq", "awq", "w4a16", "w8a16"):
        monkeypatch.setattr(strategies, "FORMATS", {**vars(strategies)["FORMATS"], name: FORMATS["nf4"]})
    assert {"gptq-F", "gptq-T", "awq-F", "awq-T", "w4a16-F", "w8a16-F"} <= set(names(known_strategies()))
    monkeypatch.setattr(strategies, "FORMATS", {"nf4-dq": FORMATS["nf4-dq"]})
    assert not {"gptq-F", "awq-T", "w4a16-F", "w8a16-F", "int8-F"} & set(names(known_strategies()))


def test_on_a_dense_base() -> None:
    found = settle(known_strategies(), DENSE_BASE)
    assert not left_out(found)
    options = {each.name: each.options for each in found if isinstance(each, Strategy)}
    assert options["nearest-T"] == {"merge_base": "nf4-dq", "quant": "nf4-dq", "rounding": "nearest"}
    assert options["nearest-F"] == {"merge_base": "original", "quant": "nf4-dq", "rounding": "nearest"}
    assert options["unmerged-T"] is None
    on_fp4 = settle(known_strategies(), replace(DENSE_BASE, merge_base="fp4"))
    names_of_t = ("unmerged-T", "16bit-T", "nearest-T", "search-T")
    quants = {each.name: each.quant for each in on_fp4 if isinstance(each, Strategy)}
    assert [quants[name] for name in names_of_t] == [None, "none", "fp4", "fp4"]


def test_on_a_quantized_base_there_is_no_f() -> None:
    found = settle(STRATEGIES, Ground("nf4", "nf4-dq", has_text=True))
    for each in found:
        if isinstance(each, Strategy) and each.options is not None:
            assert each.merge_base == "original"
            assert each.target == "T"
    assert {name for name in left_out(found) if "-F" in name} == {
        each.name for each in STRATEGIES if each.target == "F"
    }
    assert "the base is itself nf4" in left_out(found)["nearest-F"]
    nearest = next(each for each in found if isinstance(each, Strategy) and each.name == "nearest-T")
    assert nearest.quant == "nf4"


def test_what_needs_text_is_left_out_without() -> None:
    found = settle(known_strategies(), replace(DENSE_BASE, has_text=False))
    assert set(left_out(found)) == {each.name for each in known_strategies() if each.calibrated}
    assert "--calibration" in left_out(found)["feedback-T"]
    on_int8 = settle(known_strategies(), replace(DENSE_BASE, merge_base="int8"))
    assert left_out(on_int8)["feedback-T"] == "codes of int8 cannot be chosen by calibration text"


def test_of_two_that_come_to_the_same_the_first_is_run() -> None:
    one = Strategy("one", "", "F", {"quant": "nf4"})
    found = settle([one, replace(one, name="two")], DENSE_BASE)
    assert names(found) == ["one"]
    assert left_out(found) == {"two": "the same as one"}
    unmerged = settle([*asked_strategies("unmerged-T"), Strategy("mine", "unmerged", "T")], DENSE_BASE)
    assert left_out(unmerged) == {"mine": "the same as unmerged-T"}


def test_by_name_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "plain: --quant nf4 --rounding SEARCH\n"
        "trained: --quant fp4 --merge-base fp4 --seed 7\n"
        "by-text: --quant nf4-dq --rounding feedback --calibration-gradient-tokens 0\n"
        "beside: unmerged\n"
    )
    found = {each.name: each for each in asked_strategies(f"nearest-T, base,{path}")}
    assert list(found) == ["nearest-T", "base", "plain", "trained", "by-text", "beside"]
    assert (found["beside"].target, found["beside"].options) == ("T", None)
    assert found["plain"].options == {"quant": "nf4", "rounding": "search", "merge_base": "original"}
    assert (found["plain"].target, found["trained"].target) == ("F", "T")
    assert found["trained"].options == {"quant": "fp4", "merge_base": "fp4", "seed": 7}
    assert [found[name].calibrated for name in ("plain", "trained", "by-text")] == [False, False, True]
    assert asked_strategies(["nearest-T", "base"]) == asked_strategies("nearest-T,base")
    assert asked_strategies(None) == known_strategies()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: --quant nf4 --rounding", "a: --rounding has no value"),
        ("a: --rounding nearest", "a: --quant is missing"),
        ("a: --quant nf5", "a: --quant nf5 is not known"),
        ("a: --quant nf4 --seed x", "a: --seed x is not a whole number"),
        (
            "a: --quant nf4 --out b",
            "a: --out cannot be chosen by a strategy; it may have --quant, --rounding",
        ),
        ("a: --quant 'nf4", "a: No closing quotation"),
        ("a: 4", "a must be options of a merge"),
        ("../a: --quant nf4", "cannot be a strategy's name"),
        (
            "a: unmerged --quant nf4",
            "a: unmerged is T with .* has no options, found --quant nf4; leave them out",
        ),
        ("a: unmerged --merge-base nf4", "has no options, found --merge-base nf4; leave them out"),
        ("nearest-T: --quant nf4", "nearest-T stands twice"),
    ],
)
def test_files_that_say_something_else(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(OptionError, match=message):
        asked_strategies(f"nearest-T,{path}")


def test_names_that_are_none() -> None:
    with pytest.raises(OptionError, match=r"nearest-t is not known; the nearest is nearest-\w"):
        asked_strategies("nearest-t")
    with pytest.raises(OptionError, match="--strategies is empty"):
        asked_strategies(" , ")
