"""Numbers by pattern are those that trying every pattern in turn gives, however many there are."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.adapters.patterns import Patterns
from streamconv.checkpoint.expressions import Expression
from streamconv.errors import AdapterError

names = st.lists(st.sampled_from(["a", "b", "ab", "x-y", "1", "é"]), min_size=1, max_size=4).map(".".join)
texts = st.one_of(names, st.sampled_from(["a|b", ".*a", "b$", "a.b", "(a)", "[ab].1", "x-y"]))


def refuse(why: str) -> AdapterError:
    return AdapterError(f"rank_pattern {why}")


def expression_of(text: str) -> Expression:
    return Expression(rf"(.*\.)?({text})$", refuse)


@given(st.lists(texts, max_size=6, unique=True), names)
def test_the_first_that_fits_wins_as_when_all_are_tried(patterns: list[str], module: str) -> None:
    entries = [(text, number) for number, text in enumerate(patterns, 1)]
    wanted = next((number for text, number in entries if re.match(rf"(.*\.)?({text})$", module)), 0)
    assert Patterns(entries, expression_of, refuse).find(module, 0) == wanted


def test_a_dot_fits_any_letter() -> None:
    patterns = Patterns([("a.q", 1)], expression_of, refuse)
    assert [patterns.find(module, 0) for module in ("x.a.q", "aXq", "x.aXq", "xa.q", "a.q.r", "q")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]


def test_one_for_each_expert_is_no_matter_of_time() -> None:
    modules = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(60) for expert in range(400)
    ]
    patterns = Patterns([(module, number) for number, module in enumerate(modules)], expression_of, refuse)
    began = time.process_time()
    assert [patterns.find(module, -1) for module in modules] == list(range(len(modules)))
    assert time.process_time() - began < 20


def test_too_many_to_try_are_refused() -> None:
    patterns = Patterns([(f"(x{number})", number) for number in range(3000)], expression_of, refuse)
    modules = [f"model.layers.{number}.q_proj" for number in range(20_000)]
    began = time.process_time()
    with pytest.raises(AdapterError, match="rank_pattern has 3000 patterns, which are too many to try"):
        [patterns.find(module, 0) for module in modules]
    assert time.process_time() - began < 30


@given(st.lists(texts, max_size=6, unique=True), names)
def test_patterns_that_stand_below_a_name_do_so(patterns: list[str], module: str) -> None:
    def expression(text: str) -> Expression:
        return Expression(rf".*\.{text}$", refuse)

    entries = [(text, number) for number, text in enumerate(patterns, 1)]
    wanted = next((number for text, number in entries if re.match(rf".*\.{text}$", module)), 0)
    assert Patterns(entries, expression, refuse, is_below=True).find(module, 0) == wanted
