"""Regular expressions that strangers write: what `re` would find, in a time that no pattern stretches."""

from __future__ import annotations

import re
import resource
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamconv.checkpoint.expressions import Expression
from streamconv.errors import AdapterError

NAME = "model.language_model.layers.10.self_attn.q_proj.and.more" + 40 * "a"
ATOMS = [
    *(
        "a",
        "b",
        ".",
        r"\.",
        r"\w",
        r"\d",
        "[ab]",
        "[^a.]",
        "(?:a|b|)",
        "(?:ab|a)",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
    ),
    *(
        r"(?<!a\.)",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\Z",
        "(?i:A)",
        "(?:(?:a|.b)*)",
        "(?!.*b)",
        "(?s:.)",
        "(?:(?:(?=a)\\w)+)",
    ),
    *("(?:^|a)", "(?:(?:a?){2})", "(?m:^)", "(?m:$)", "(?-i:b)", "(?!)", r"(?i:[^A])", "\n"),
]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}"]
PIECES = st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map("".join), max_size=4)
PATTERNS = st.recursive(
    PIECES.map("".join),
    lambda inner: st.tuples(inner, st.sampled_from("| "), inner).map(
        lambda it: f"(?:{it[0]}{it[1].strip()}{it[2]})?"
    ),
    max_leaves=3,
)
# Without an exclamation mark in the text it changes nothing, and gives `re` too many ways in which it might.
ANY_WAYS = "(?:(?:!*)*!)?"
# As programs write them.
REAL = [
    r".*\.layers\.[0-9]+\.(self_attn|mlp)\.(q_proj|v_proj)$",
    r"^(language_model(?=\.).*\.(o_proj|q_proj|gate_proj))$",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|k_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:up))",
    r"(.*\.)?(layers\.1\.mlp\.up_proj)$",
]
NAMES = [
    f"{top}layers.{layer}.{module}"
    for top in ("model.", "language_model.", "model.language_model.", "visual.", "")
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "norm")
]
BOMBS = [
    r"((\w+\.?)+)+!",
    r"(a|aa)+!",
    r"(\w|\w\w|\.)*!",
    *(".*" * 9 + "!", "a?" * 200 + "!", "(a|a)" * 60 + "!"),
    r"(?=(\w+\.?)+!)x",
    r"(?!(\w+\.?)+!)x",
    r"((((((\w*)*)*)*)*)*)*!",
    *("(a{9999}){9999}", "((.{0,9999}){0,9999}){0,9999}!", r"((){9999}){9999}!", r"(?:(?:\b){9999}){9999}!"),
    r"(?:(?:(?=a){9999}){9999}){9999}!",
    "(a|b)*" * 2000,
    "((.*.*)*x)*" * 1000,
    "(?i)" + "[\0-\uffff]" * 29,
]
REFUSED = {
    "(": "is not a regular expression: missing ), unterminated subpattern at position 0",
    "(?<=a+)b": "is not a regular expression: look-behind requires fixed-width pattern",
    "((.*)*)*(?<=a+)b": "is not a regular expression: look-behind requires fixed-width pattern",
    "a{99999999999}": "is not a regular expression: the repetition number is too large",
    "a{" + "9" * 5000 + "}": "is not a regular expression: Exceeds the limit",
    "(" * 5000 + ")" * 5000: "more than 100 brackets inside each other",
    "a" * 70_000: "is a regular expression of 70000 characters, and 65536 are the most",
    "(?i)" + "[\0-\uffff]" * 999: "ignores case in more than 30 sets",
    r"(.+)+\1+!": "back-references or possessive repeats; write it without",
    r"(?>(\w+)+)+!": "back-references or possessive repeats; write it without",
}


def refusal(why: str) -> AdapterError:
    return AdapterError(f"target_modules {why}")


def found(pattern: str, text: str) -> tuple[bool, bool]:
    expression = Expression(pattern, refusal)
    return expression.fits(text), expression.fits_all_of(text)


def found_by_re(pattern: str, text: str) -> tuple[bool, bool]:
    return re.match(pattern, text) is not None, re.fullmatch(pattern, text) is not None


@settings(max_examples=250, deadline=None)
@given(PATTERNS, st.text("aab.A1x\n", max_size=7))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sets_find_what_re_finds(pattern: str, text: str) -> None:
    try:
        expected = found_by_re(pattern, text)
    except re.error:
        assume(False)
    assert found(pattern, text) == expected
    assert found(f"(?:{pattern}){ANY_WAYS}", text) == expected


@pytest.mark.parametrize("pattern", REAL)
def test_real_expressions_mean_what_they_meant(pattern: str) -> None:
    hits = [found_by_re(pattern, name) for name in NAMES]
    assert [found(pattern, name) for name in NAMES] == hits
    assert [found(f"(?:{pattern}){ANY_WAYS}", name) for name in NAMES] == hits
    assert any(any(hit) for hit in hits)
    assert not all(all(hit) for hit in hits)


@pytest.mark.parametrize("pattern", BOMBS, ids=lambda pattern: pattern[:20])
def test_no_expression_takes_long_or_much(pattern: str) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not found(pattern, NAME)[1]
    assert not found(pattern, f"{NAME}." * 100)[1]
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


@pytest.mark.parametrize(("pattern", "why"), REFUSED.items(), ids=lambda text: text[:20])
def test_expressions_that_cannot_be_used_are_refused(pattern: str, why: str) -> None:
    with pytest.raises(AdapterError, match=f"target_modules .*{re.escape(why)}"):
        Expression(pattern, refusal)


def test_steps_of_all_texts_are_bounded() -> None:
    expression = Expression("|".join([r"(?:\w|x\w)*a"] * 2000), refusal)
    started = time.process_time()
    names = [f"{'a' * 500}{number}a" for number in range(100)]
    with pytest.raises(AdapterError, match="target_modules is a regular expression that takes too long"):
        [expression.fits_all_of(name) for name in names]
    assert time.process_time() - started < 10


def test_texts_that_come_again_cost_nothing_again() -> None:
    """As in a process that merges the same adapter many times."""
    pattern = "|".join([rf"(?:\w|x\w)*{letter}" for letter in "abc" * 20])
    names = [f"model.layers.{number}.q_proj" for number in range(30)]
    first = [Expression(pattern, refusal).fits_all_of(name) for name in names]
    for _ in range(300):
        assert [Expression(pattern, refusal).fits_all_of(name) for name in names] == first


def test_a_name_of_no_module_is_refused() -> None:
    with pytest.raises(AdapterError, match="a name of 20000 characters"):
        Expression("(a*)*b", refusal).fits("a" * 20_000)


def test_a_group_is_that_of_the_first_match() -> None:
    expression = Expression(r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.", refusal)
    assert expression.group("idx", "model.layers.3.layers.4.q") == "3"
    assert expression.group("idx", "model.norm") is None
    with pytest.raises(AdapterError, match="too involved a regular expression for this field"):
        Expression(r"(.*)*(?P<idx>\d+)", refusal).group("idx", "a1")


def test_back_references_are_left_to_re_where_it_has_few_ways() -> None:
    assert found(r"(?P<a>\w+)\.(?P=a)", "ab.ab") == (True, True)
    assert found(r"(?P<a>\w+)\.(?P=a)", "ab.b") == (False, False)
