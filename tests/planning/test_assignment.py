"""Formats of single modules as they are given, and which of several rules counts for a module."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.errors import OptionError
from streamconv.formats import FORMATS, with_groups
from streamconv.planning.assignment import FormatRule, is_dense, read_rules, rule_for

TEXTS = ("lm_head=none", "re:.*=x.*=w8a16:g64", "mlp.down_proj=w4a16", "score=bfloat16", "a b=nf4")


def test_rules_are_read_as_they_are_written() -> None:
    rules = read_rules(TEXTS)
    assert tuple(map(str, rules)) == TEXTS
    assert rules[1] == FormatRule("re:.*=x.*", with_groups(FORMATS["w8a16"], 64), has_size=True)
    assert [is_dense(rule) for rule in rules] == [True, False, False, True, False]


def test_a_mapping_and_one_text_do_as_well() -> None:
    assert read_rules({"lm_head": "W8A16:G32", "mlp": "None"}) == read_rules(
        ["lm_head=w8a16:g32", "mlp=none"]
    )
    assert read_rules("mlp=nf4") == read_rules(["mlp=nf4"])


PATTERNS = ("q_proj", "self_attn", "layers.1", r"re:model\.layers\.[01]\.", "re:.*proj", "lm_head", "model")
MODULES = [f"model.layers.{n}.{end}" for n in (0, 1, 11) for end in ("self_attn.q_proj", "mlp.up_proj")] + [
    "lm_head"
]


@given(st.permutations(PATTERNS), st.integers(0, len(PATTERNS)), st.sampled_from(MODULES))
def test_the_last_rule_that_names_a_module_counts(patterns: list[str], count: int, module: str) -> None:
    """By the language of --ignore: a run of whole components anywhere, or an expression from the start."""
    rules = read_rules(dict.fromkeys(patterns[:count], "w8a16"))
    named = [
        pattern
        for pattern in patterns[:count]
        if (re.match(pattern[3:], module) if pattern.startswith("re:") else f".{pattern}." in f".{module}.")
    ]
    found = rule_for(module, rules)
    assert (found.pattern if found else None) == (named[-1] if named else None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lm_head"], "must be PATTERN=FORMAT"),
        (["=w8a16"], "must be PATTERN=FORMAT"),
        (["mlp=w9"], "--quant-for mlp=w9 is not known; use none, or one of float32"),
        (["mlp=keep"], "is not known"),
        (["mlp=w8a16:g63"], "has no groups of that size; use w8a16:g32, w8a16:g64"),
        (["mlp=w8a16:g" + "9" * 9999], "has no groups of that size"),
        (["mlp=nf4:g64"], "nf4 has no groups of that size; leave it out"),
        (["mlp=none:g64"], "is not known"),
        (["re:(=w8a16"], "--quant-for re:( is not a regular expression"),
        (["mlp=nf4", "mlp=int8"], "--quant-for mlp stands twice"),
    ],
)
def test_what_is_no_rule_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        read_rules(given)
